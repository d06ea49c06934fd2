"""Whatever ends a training: resumed, it is as if nothing had happened."""

import functools
import importlib.util
import itertools
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_mscm.callbacks import ResumeTraining

HERE = Path(__file__).parent
SCRIPT = HERE / "resumable.py"
spec = importlib.util.spec_from_file_location("resumable", SCRIPT)
resumable = importlib.util.module_from_spec(spec)
spec.loader.exec_module(resumable)
make_student, make_data = resumable.make_student, resumable.make_data
train, state_of = resumable.train, resumable.state_of

BACKEND = keras.backend.backend()
# PyTorch takes but one step at a time.
SEVERAL = {} if BACKEND == "torch" else {"steps_per_execution": 2}
BATCHES = resumable.STEPS * resumable.EPOCHS


@functools.cache
def uninterrupted(kind="finite", accumulation=None, several=False):
    """State and losses at the end of a training without the callback."""
    keras.utils.set_random_seed(0)
    student = make_student(accumulation, **(SEVERAL if several else {}))
    losses = train(student, make_data(kind))["loss"]
    return state_of(student), losses


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        np.testing.assert_array_equal(a, b)


def restarted():
    """A student as of a new process, in which other numbers are drawn."""
    keras.utils.set_random_seed(random.randrange(2**20))
    return make_student()


class At(keras.callbacks.Callback):
    """Does something before some batch of a `fit`, counted from 0."""

    def __init__(self, batch, do):
        super().__init__()
        self.left, self.do = batch, do

    def on_train_batch_begin(self, batch, logs=None):
        if self.left == 0:
            self.do(self.model)
        self.left -= 1


def interrupt(model):
    raise KeyboardInterrupt


def terminate(model):
    os.kill(os.getpid(), signal.SIGTERM)


def names(resume):
    return [path.name for path in resume.saves]


def train_until(batch, do, resume, student=None, data=None):
    """Trains a part, with `At` before the callback, so ahead of its saves."""
    student = student or make_student()
    train(student, data or make_data(), At(batch, do), resume)
    return student


@pytest.mark.parametrize(
    ("kind", "accumulation", "several", "save_freq", "stops"),
    [
        ("finite", 3, False, 4, [9]),
        ("endless", None, True, 2, [5, 8]),
        ("arrays", None, False, "epoch", [9]),
        *([("loader", None, False, 3, [9])] if BACKEND == "torch" else []),
    ],
)
def test_resumed_is_uninterrupted(
    kind, accumulation, several, save_freq, stops, tmp_path
):
    state, losses = uninterrupted(kind, accumulation, several)
    for seed, stop in enumerate([*stops, None]):
        keras.utils.set_random_seed(seed)  # only the first one's counts
        student = make_student(accumulation, **(SEVERAL if several else {}))
        data = make_data(kind)
        resume = ResumeTraining(tmp_path, save_freq)
        if stop is None:
            history = train(student, data, resume)
        else:
            with pytest.raises(KeyboardInterrupt):
                train_until(stop, interrupt, resume, student, data)
    assert_same(state_of(student), state)
    # Also the mean of the epoch that was begun by another process.
    resumed = history["loss"]
    assert 0 < len(resumed) < len(losses)
    np.testing.assert_array_equal(resumed, losses[-len(resumed) :])
    if kind == "endless":
        assert data["x"].first_batch == 0


def test_the_last_two_saves_are_models(tmp_path):
    resume = ResumeTraining(tmp_path, save_freq=3)
    left = tmp_path / ".00000003.keras.kill_123"
    left.mkdir()
    (left / "new.keras").write_bytes(b"half")
    with pytest.raises(KeyboardInterrupt):
        train_until(11, interrupt, resume)
    assert sorted(p.name for p in tmp_path.iterdir()) == names(resume)
    assert names(resume) == ["00000006.keras", "00000009.keras"]
    model = keras.saving.load_model(resume.saves[-1])
    student = restarted()
    with pytest.raises(KeyboardInterrupt):
        train_until(0, interrupt, resume, student)
    assert int(model.iteration) == 9
    loaded = [*model.network.weights, *model.ema_network.weights]
    weights = [*student.network.weights, *student.ema_network.weights]
    assert_same(
        [keras.ops.convert_to_numpy(weight) for weight in loaded],
        [keras.ops.convert_to_numpy(weight) for weight in weights],
    )


def test_a_full_disk(tmp_path):
    # The operating system takes no more than this of any file.
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    held = []

    def fill(model):
        held.extend(path.read_bytes() for path in resume.saves)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))

    def clear(model):
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert names(resume) == ["00000004.keras", "00000006.keras"]
        assert [path.read_bytes() for path in resume.saves] == held
        assert len([*tmp_path.iterdir()]) == 2

    resume = ResumeTraining(tmp_path, save_freq=2)
    keras.utils.set_random_seed(0)
    student = make_student()
    try:
        with pytest.warns(UserWarning, match="could not be saved") as warned:
            train(student, make_data(), At(7, fill), At(15, clear), resume)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    failed = [w for w in warned if "could not be saved" in str(w.message)]
    assert len(failed) == 4  # 8, 10, 12, 14
    assert "File too large" in str(failed[0].message)
    assert_same(state_of(student), uninterrupted()[0])
    assert names(resume) == ["00000018.keras", "00000020.keras"]


def test_sigterm(tmp_path, capsys):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    try:
        ours = signal.getsignal(signal.SIGTERM)
        resume = ResumeTraining(tmp_path)
        keras.utils.set_random_seed(0)
        with pytest.raises(SystemExit) as exit:
            train_until(8, terminate, resume)
        assert exit.value.code == 0
        said = capsys.readouterr().out
        assert "SIGTERM: training can be resumed from" in said
        assert signal.getsignal(signal.SIGTERM) is ours
        assert heard == []
        assert names(resume) == ["00000005.keras", "00000008.keras"]

        # While batches are passed over, there is nothing to save.
        student = restarted()
        with pytest.raises(SystemExit) as exit:
            train_until(1, terminate, resume, student)
        assert exit.value.code == 0
        assert names(resume) == ["00000005.keras", "00000008.keras"]

        # A second one is for whoever heard them before.
        def twice(model):
            terminate(model)
            terminate(model)

        with pytest.raises(SystemExit):
            train_until(9, twice, resume, student)
        assert heard == [1]
        assert names(resume) == ["00000010.keras", "00000014.keras"]

        # Also if training fails is it theirs again.
        with pytest.raises(KeyboardInterrupt):
            train_until(0, interrupt, resume, student)
        terminate(None)
        assert heard == [1, 1]
    finally:
        signal.signal(signal.SIGTERM, before)
    student = restarted()
    train(student, make_data(), resume)
    assert_same(state_of(student), uninterrupted()[0])


def test_a_training_that_is_stopped_or_finished(tmp_path):
    def stop(model):
        model.stop_training = True

    resume = ResumeTraining(tmp_path)
    keras.utils.set_random_seed(0)
    student = train_until(7, stop, resume)
    assert names(resume) == ["00000005.keras", "00000008.keras"]
    student = restarted()
    train(student, make_data(), resume)
    state = state_of(student)
    assert_same(state, uninterrupted()[0])

    new = restarted()
    assert train(new, make_data(), resume) == {}
    assert_same(state_of(new), state)
    history = train(student, make_data(), resume, epochs=resumable.EPOCHS + 2)
    assert len(history["loss"]) == 2
    # Without it, Keras begins at epoch 0.
    assert len(train(student, make_data(), epochs=1)["loss"]) == 1


def test_what_is_not_finite_is_not_saved(tmp_path):
    def spoil(model):
        velocity = model.optimizer.variables[-1]
        velocity.assign(np.full(velocity.shape, np.nan))

    # After what is saved before batch 7, whose loss is finite still.
    resume = ResumeTraining(tmp_path, save_freq=1)
    with pytest.raises(FloatingPointError):
        train(make_student(), make_data(), resume, At(7, spoil))
    assert names(resume) == ["00000006.keras", "00000007.keras"]


# In processes of their own.

SAVE_FREQ = 3


def start(folder, kind, dying=0):
    root = HERE.parent.parent
    return subprocess.Popen(
        [sys.executable, SCRIPT, folder, kind, str(SAVE_FREQ), str(dying)],
        env={
            **os.environ,
            "KERAS_BACKEND": BACKEND,
            "PYTHONPATH": str(root),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def progress(folder):
    """The iterations before each batch, in order, of all the processes."""
    file = folder / "progress"
    return file.read_bytes().split() if file.exists() else []


def wait_for_batches(process, folder, number):
    """Waits until so many batches were begun since it started."""
    before = len(progress(folder))
    while process.poll() is None and len(progress(folder)) < before + number:
        time.sleep(0.001)


def killed(folder, kind, batches, seconds):
    """Whether a process was killed, so long after it began some batch."""
    process = start(folder, kind)
    wait_for_batches(process, folder, batches)
    time.sleep(seconds)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode != 0


def finished(folder, kind):
    process = start(folder, kind)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    end = np.load(folder / "end.npz")
    assert_same([end[name] for name in end], uninterrupted(kind)[0])


def assert_little_was_lost(folder):
    """Each process began within an interval of where the last one ended."""
    iterations = [int(line) for line in progress(folder)]
    back = [b - a for a, b in itertools.pairwise(iterations)]
    assert min(back) >= -SAVE_FREQ
    assert iterations[-1] == BATCHES - 1


def test_a_process_killed_while_it_saves(tmp_path):
    # It writes its second save: the first one is what there is.
    process = start(tmp_path, "finite", dying=2)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    saves = ResumeTraining(tmp_path / "saves")
    assert names(saves) == ["00000003.keras"]
    assert len([*(tmp_path / "saves").glob(".00000006.keras.*")]) == 1
    finished(tmp_path, "finite")
    assert_little_was_lost(tmp_path)


@pytest.mark.slow
def test_a_process_told_to_end(tmp_path):
    process = start(tmp_path, "finite")
    wait_for_batches(process, tmp_path, 6)
    process.terminate()
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert "SIGTERM: training can be resumed from" in output
    assert not (tmp_path / "end.npz").exists()
    finished(tmp_path, "finite")
    assert_little_was_lost(tmp_path)


@pytest.mark.slow
def test_killed_many_times(tmp_path):
    # In batches, so that it gets on however slow the machine is.
    rng, kills = random.Random(0), 0
    for number, kind in enumerate(itertools.cycle(["finite", "endless"])):
        folder = tmp_path / str(number)
        folder.mkdir()
        while killed(folder, kind, rng.randint(1, 12), rng.uniform(0, 0.1)):
            kills += 1
        finished(folder, kind)
        assert_little_was_lost(folder)
        print(f"{kills} kills in {number + 1} trainings")
        if kills >= 20 and number:
            break
