"""When it evaluates, what, and which weights are kept."""

import json
import os
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import MultistepConsistencyModel
from keras_mscm.callbacks import EvaluateSamples, evaluations
from keras_mscm.metrics import FrechetDistance, KernelDistance, Reference


class Recorder:
    """A metric of the images it has seen; says what it is told to."""

    def __init__(self, name="recorder", values=()):
        self.name, self.values = name, iter(values)
        self.sets = []
        self.reset_state()

    def reset_state(self):
        self.batches = []

    def update_state(self, images):
        self.batches.append(images)

    def result(self):
        self.sets.append(np.concatenate(self.batches))
        return next(self.values, float(self.sets[-1].mean()))


def train(model, images, callbacks, epochs=1, batch_size=4, **kw):
    return model.fit(
        images,
        batch_size=batch_size,
        epochs=epochs,
        callbacks=callbacks,
        verbose=0,
        shuffle=False,
        **kw,
    ).history


def make(metrics, every=2, num_images=3, **kw):
    kw = {"num_steps": 2, **kw}
    return EvaluateSamples(metrics, every=every, num_images=num_images, **kw)


def iterations(evaluate):
    return [entry["iteration"] for entry in evaluate.history]


def ema(model):
    return [ops.convert_to_numpy(w) for w in model.ema_network.weights]


def test_every_n_iterations(make_model, images):
    # 6 batches an epoch: within epochs and at their end.
    model, evaluate = make_model(), make([Recorder()], every=4)
    history = train(model, images, [evaluate], epochs=2)
    assert iterations(evaluate) == [4, 8, 12]
    # The logs have the latest: of iteration 4 and of 12.
    values = [entry["recorder"] for entry in evaluate.history]
    assert history["recorder"] == [values[0], values[2]]
    # A second training goes on at iteration 12.
    train(model, images, [evaluate], epochs=1)
    assert iterations(evaluate) == [16]


def test_iterations_are_updates(make_model, images):
    evaluate = make([Recorder()], every=2)
    model = make_model(accumulation=2)
    train(model, images, [evaluate], epochs=2)
    assert int(model.iteration) == 6
    assert iterations(evaluate) == [2, 4, 6]


def test_several_steps_per_execution(make_model, images):
    # PyTorch takes but one step at a time.
    steps = 1 if keras.backend.backend() == "torch" else 3
    evaluate = make([Recorder()], every=2)
    model = make_model(steps_per_execution=steps)
    train(model, images, [evaluate], epochs=2)
    expected = {1: [2, 4, 6, 8, 10, 12], 3: [3, 6, 9, 12]}
    assert iterations(evaluate) == expected[steps]


def test_the_samples_are_of_the_weights_at_that_iteration(make_model, images):
    recorder = Recorder()
    train(make_model(), images, [make([recorder], seed=5)], epochs=1)
    # The same training, stopped at each iteration.
    model = make_model()
    noise = np.random.default_rng(5).standard_normal((3, 4, 4, 1), "float32")
    for samples, part in zip(recorder.sets, np.split(images, 3), strict=True):
        train(model, part, [])
        expected = model.generate(noise=noise, num_steps=2, seed=5)
        np.testing.assert_allclose(samples, expected, atol=1e-6)


def test_training_is_the_same_without(make_model, images):
    models = make_model(), make_model()
    train(models[0], images, [])
    train(models[1], images, [make([Recorder()], every=1)])
    for mine, theirs in zip(*map(ema, models), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_batches_have_no_say(make_model, images):
    model = make_model(num_classes=3)
    labels = np.arange(24) % 3
    sets = []
    for batch_size in (7, 2):
        recorder = Recorder()
        evaluate = make([recorder], num_images=7, batch_size=batch_size)
        evaluate.set_model(model)
        evaluate.on_train_begin()
        evaluate.on_drawing(0, {2: evaluate._draw(2)})
        sets += recorder.sets
    np.testing.assert_allclose(*sets, atol=1e-6)
    assert sets[0].shape == (7, 4, 4, 1)
    # Classes in turn, unless given.
    noise = np.random.default_rng(0).standard_normal((7, 4, 4, 1), "float32")
    expected = model.generate(noise=noise, labels=labels[:7], num_steps=2)
    np.testing.assert_allclose(sets[0], expected, atol=1e-6)
    history = train(model, images, [evaluate], y=labels)
    assert "recorder" in history


def test_the_best_weights_are_kept(make_model, images, tmp_path):
    path = tmp_path / "weights" / "best.weights.h5"
    values = [3.0, float("nan"), 1.0, 2.0]
    evaluate = make(
        [Recorder("other"), Recorder(values=values)],
        every=1,
        monitor="recorder",
        best_weights=path,
        results=tmp_path / "results.jsonl",
    )
    train(make_model(), images[:16], [evaluate])
    assert evaluate.best == evaluate.history[2]
    record = json.loads((tmp_path / "weights/best.weights.h5.json").read_text())
    assert record == evaluate.best
    assert record["iteration"] == 3
    assert record["recorder"] == 1.0
    # Nothing else is left behind.
    assert len([*path.parent.iterdir()]) == 2
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 2, 3, 4]

    best, until_3 = make_model(), make_model()
    best.load_weights(path)
    train(until_3, images[:12], [])
    for mine, theirs in zip(ema(best), ema(until_3), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-7)


def test_mode_max(make_model, images):
    evaluate = make([Recorder(values=[1.0, 3.0, 2.0])], mode="max")
    train(make_model(), images, [evaluate])
    assert evaluate.best["iteration"] == 4


def test_a_resumed_training_knows_the_best(make_model, images, tmp_path):
    path = tmp_path / "best.weights.h5"
    backup = tmp_path / "backup"

    class Crash(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    def fit(values, *more):
        evaluate = make([Recorder(values=values)], every=4, best_weights=path)
        restore = keras.callbacks.BackupAndRestore(backup)
        train(make_model(), images, [restore, evaluate, *more], epochs=2)
        return evaluate

    with pytest.raises(KeyboardInterrupt):
        fit([1.0], Crash())
    evaluate = fit([2.0, 3.0])
    assert iterations(evaluate) == [8, 12]
    assert evaluate.best["iteration"] == 4
    assert json.loads(evaluate._record.read_text())["recorder"] == 1.0
    # One that begins anew knows nothing of it.
    assert fit([2.0, 3.0, 4.0]).best["iteration"] == 4
    assert json.loads(evaluate._record.read_text())["recorder"] == 2.0


def test_with_metrics_of_this_library_and_of_keras(make_model, images):
    reference = Reference(images, lambda x: x[:, 0, :3, 0], name="noise")
    metrics = [
        FrechetDistance(reference),
        KernelDistance(reference, num_subsets=3, subset_size=6),
        keras.metrics.Mean(name="mean"),
    ]
    evaluate = make(metrics, every=6, num_images=8)
    history = train(make_model(), images, [evaluate])
    for name in ("frechet_distance", "kernel_distance", "mean"):
        assert isinstance(history[name][0], float)
    entry = evaluate.history[0]["frechet_distance"]
    assert entry["value"] == history["frechet_distance"][0]
    assert (entry["num_samples"], entry["num_reference"]) == (8, 24)
    json.dumps(evaluate.history)
    with pytest.raises(ValueError, match=r"`num_images`.*6.*kernel_distance"):
        make(metrics, num_images=5)


def test_keras_need_not_wait_for_each_batch(make_model):
    # A callback that takes part in the end of a batch has Keras read its loss.
    callbacks = keras.callbacks.CallbackList(
        [make([Recorder()])], model=make_model()
    )
    thread_safe = keras.backend.backend() != "tensorflow"
    assert callbacks._async_train == thread_safe


NAN = float("nan")


class Named:
    def __init__(self, name):
        self.name = name
        self.update_state = self.result = self.reset_state = None


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"metrics": []}, "`metrics` must be a list"),
        ({"metrics": [3]}, "`metrics` must be a list"),
        ({"metrics": Recorder()}, "`metrics` must be a list"),
        ({"metrics": [keras.metrics.Mean]}, "`metrics` must be a list"),
        ({"metrics": [Recorder(), Recorder()]}, "names of their own"),
        ({"metrics": [Named(3)]}, "names of their own, strings"),
        ({"metrics": [Named("loss")]}, "other than .*'loss'"),
        ({"metrics": [Named("iteration")]}, "other than .*'iteration'"),
        *(
            ({name: value}, f"`{name}` must be an integer of at least 1")
            for name in ("every", "num_images", "batch_size")
            for value in (0, -1, 1.5, NAN, True, None, "2", [2])
        ),
        *(
            ({"seed": value}, "`seed` must be an integer of at least 0")
            for value in (-1, 0.5, True, None, 2**31 - 2, 2**40, "0")
        ),
        ({"labels": [1, 2]}, r"`labels` must have one entry.*2 labels"),
        ({"labels": 1}, "`labels` must be an array of one entry per image, 3"),
        ({"labels": ["a", "b", "c"]}, "`labels` must be an array"),
        ({"labels": [[1], [2, 3], 4]}, "`labels` must be an array"),
        ({"context": np.float32(1)}, "`context` must be an array of one entry"),
        ({"noise": np.zeros((3, 4, 4, 1))}, "`noise` must not be given"),
        ({"monitor": "fid"}, r"`monitor` must be one of.*recorder"),
        ({"monitor": 3}, r"`monitor` must be one of"),
        ({"mode": "auto"}, "`mode` must be one of"),
        ({"mode": None}, "`mode` must be one of"),
        ({"best_weights": "best.h5"}, r"`best_weights` must end in"),
        ({"best_weights": 3}, "`best_weights` must be a path"),
        ({"best_weights": ""}, "`best_weights` must be a path"),
        ({"results": True}, "`results` must be a path"),
        ({"results": "a\0b"}, "`results` must be a path without a null"),
    ],
)
def test_bad_arguments(kw, message):
    with pytest.raises(ValueError, match=message):
        make(**{"metrics": [Recorder()], **kw})


def test_numbers_of_numpy_are_plain(make_model, images):
    evaluate = make(
        [Recorder()],
        every=np.int64(2),
        num_images=np.int32(3),
        batch_size=np.uint8(2),
        seed=np.int64(2**31 - 3),  # of which each batch takes a next one
    )
    kept = evaluate.every, evaluate.num_images, evaluate.batch_size
    assert kept == (2, 3, 2)
    assert {*map(type, (*kept, evaluate.seed))} == {int}
    train(make_model(), images, [evaluate])
    assert iterations(evaluate) == [2, 4, 6]


@pytest.mark.once
@pytest.mark.parametrize("num_steps", [0, 2.5, (), (1, 0), (2, 2), "4"])
def test_numbers_of_steps_that_cannot_be(num_steps):
    with pytest.raises(ValueError, match="`num_steps` must be"):
        make([Recorder()], num_steps=num_steps)


def test_each_of_several_numbers_of_steps_has_a_number(make_model, images):
    model = make_model()
    evaluate = make([Recorder()], num_steps=(1, 2), monitor="recorder_2_steps")
    logs = {}
    evaluate.set_model(model)
    evaluate.on_train_begin()
    evaluate.on_epoch_begin(0)
    drawings = {k: evaluate._draw(k) for k in evaluate.num_steps}
    evaluate.on_drawing(0, drawings)
    evaluate.on_epoch_end(0, logs)
    assert {*logs} == {"recorder_1_step", "recorder_2_steps"}
    assert logs["recorder_1_step"] != logs["recorder_2_steps"]
    assert evaluate.best["recorder_2_steps"] == logs["recorder_2_steps"]


def test_arguments_that_do_not_suit_the_model(make_model, images):
    cases = [
        (make_model(), {"labels": [0, 1, 2]}, "`labels` must not be given"),
        (make_model(3), {"labels": [0, 1, 3]}, "`labels` must be in 0"),
        (make_model(3), {"labels": [0, 1, -1]}, "`labels` must be in 0"),
        (make_model(3), {"labels": [0.0, 1.0, 2.0]}, "`labels` must be"),
        (make_model(), {"context": np.zeros((3, 1, 2))}, "`y` must be made"),
        (make_model(), {"steps": 3}, r"arguments of DiffusionModel.*steps"),
        (make_model(), {"sampler": "ddim"}, "`sampler` must be"),
        (make_model(), {"schedule": "cosine"}, "`schedule` must be"),
        (make_model(), {"guidance_scale": NAN}, "`guidance_scale` must be"),
        (make_model(), {"guidance_scale": 2.0}, "label_dropout > 0"),
    ]
    for model, kw, message in cases:
        data = {"y": np.zeros(24, "int32")} if model.num_classes else {}
        kw = {"num_steps": 2, "every": 2, "num_images": 3, **kw}
        evaluate = EvaluateSamples([Recorder()], **kw)
        with pytest.raises(ValueError, match=message):
            train(model, images, [evaluate], **data)
        assert int(model.iteration) == 0


def test_steps_that_the_student_can_not_take(make_model, images):
    student = MultistepConsistencyModel.from_teacher(
        make_model(), student_steps=8
    )
    student.compile("sgd")
    evaluate = EvaluateSamples([Recorder()], every=1, num_images=2, num_steps=3)
    with pytest.raises(ValueError, match="`num_steps` must be"):
        train(student, images, [evaluate])
    assert int(student.iteration) == 0
    assert student._compiled_samplers == {}


@pytest.mark.parametrize(
    "result",
    [None, "0.5", True, np.zeros(2), {}, {"value": None}, {"value": "low"}],
)
def test_a_result_that_is_no_number(make_model, images, result):
    evaluate = make([Recorder(values=[result])])
    with pytest.raises(ValueError, match="`metrics` must return a number"):
        train(make_model(), images, [evaluate])


@pytest.mark.parametrize(
    "result", [1, np.float32(1), np.ones(()), {"value": np.int64(1), "n": "x"}]
)
def test_numbers_of_any_kind(make_model, images, result):
    evaluate = make([Recorder(values=[result])], every=6)
    history = train(make_model(), images, [evaluate])
    assert history["recorder"] == [1.0]
    json.dumps(evaluate.history)


# Files that are not its own.


def refused(make_model, images, message, **kw):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        train(model, images, [make([Recorder()], **kw)])
    assert int(model.iteration) == 0


def held(folder):
    """What is in a folder, links as such."""
    return {
        str(path.relative_to(folder)): (
            os.readlink(path)
            if path.is_symlink()
            else path.read_bytes()
            if path.is_file()
            else None
        )
        for path in sorted(folder.rglob("*"))
    }


def weights_of_another(path):
    inputs = keras.Input((1,))
    keras.Model(inputs, keras.layers.Dense(1)(inputs)).save_weights(path)


@pytest.mark.parametrize(
    "put",
    [
        weights_of_another,
        lambda path: path.write_bytes(b"mine"),
        lambda path: path.mkdir(),
        lambda path: path.symlink_to("nowhere"),
        *(
            lambda path, text=text: Path(f"{path}.json").write_text(text)
            for text in (
                "",
                "no JSON",
                "[1]",
                "{}",
                '{"iteration": 3}',
                '{"iteration": -1, "recorder": 1.0}',
                '{"iteration": 3, "recorder": "low"}',
                '{"iteration": 3, "recorder": NaN}',
            )
        ),
        lambda path: Path(f"{path}.json").mkdir(),
    ],
)
def test_best_weights_of_someone_else_are_refused(
    make_model, images, tmp_path, put
):
    path = tmp_path / "best.weights.h5"
    put(path)
    before = held(tmp_path)
    message = "`best_weights` must be where nothing but.*best.weights.h5"
    refused(make_model, images, message, best_weights=path)
    assert held(tmp_path) == before


@pytest.mark.parametrize(
    "content",
    [b"mine", b"{}\n", b'{"a": 1}\n', b"\xff\n", b"\0\0", b"1\n", b'{"it'],
)
def test_results_of_someone_else_are_refused(
    make_model, images, tmp_path, content
):
    path = tmp_path / "results.jsonl"
    path.write_bytes(content)
    message = "`results` must be where nothing but evaluations.*results.jsonl"
    refused(make_model, images, message, results=path)
    assert path.read_bytes() == content
    path.unlink()
    path.mkdir()
    refused(make_model, images, message, results=path)


@pytest.mark.parametrize(
    ("left", "lines"),
    [
        (b"", 0),
        (b'{"iteration": 1, "recorder": NaN}\n', 1),
        (b'{"iteration": 1, "recorder": 2.0}', 1),  # copied without its end
        (b'{"iteration": 1, "recorder": 2.0}\n{"ite', 1),
        (b'{"iteration": 1, "rec', 0),
    ],
)
def test_results_are_appended(make_model, images, tmp_path, left, lines):
    path = tmp_path / "results.jsonl"
    path.write_bytes(left)
    train(make_model(), images, [make([Recorder()], results=path)])
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [e["iteration"] for e in found] == [1] * lines + [2, 4, 6]


def test_where_nothing_can_be_written(make_model, images, tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "in", Path("/proc/none")):
        for name, file in (("results", "r"), ("best_weights", "a.weights.h5")):
            message = f"`{name}` must be where files can be written"
            refused(make_model, images, message, **{name: folder / file})


def test_what_it_has_left_is_replaced(make_model, images, tmp_path):
    path = tmp_path / "best.weights.h5"

    def train_anew(*values):
        evaluate = make([Recorder(values=values)], every=2, best_weights=path)
        train(make_model(), images, [evaluate])
        return json.loads(evaluate._record.read_text())

    assert train_anew(1.0, 2.0, 3.0)["recorder"] == 1.0
    # Killed before the record was written; while the weights were.
    Path(f"{path}.json").unlink()
    left = tmp_path / ".best.weights.h5.abcd_123"
    left.mkdir()
    (left / "new.weights.h5").write_bytes(b"half")
    # Something else of nearly the same name.
    for name in (".best.weights.h5.mine", ".best.weights.h5.abcd_124"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes").touch()
    assert train_anew(5.0, 4.0, 6.0)["recorder"] == 4.0
    assert [p.name for p in sorted(tmp_path.iterdir())] == [
        ".best.weights.h5.abcd_124",
        ".best.weights.h5.mine",
        path.name,
        f"{path.name}.json",
    ]
    # Of version 0.1 the weights say nothing, only the record does.
    with h5py.File(path, "a") as file:
        del file.attrs[evaluations.MARK]
    assert train_anew(7.0, 8.0, 9.0)["recorder"] == 7.0


def test_killed_between_weights_and_record(make_model, images, tmp_path):
    path = tmp_path / "best.weights.h5"
    evaluate = make([Recorder(values=[3.0, 2.0, 4.0])], best_weights=path)
    model = make_model()
    train(model, images, [evaluate])
    Path(f"{path}.json").write_text('{"iteration": 2, "recorder": 3.0}')
    evaluate = make([Recorder(values=[2.5, 5.0, 5.0])], best_weights=path)
    train(model, images, [evaluate])
    assert evaluate.best == {"iteration": 4, "recorder": 2.0}


def test_the_model_is_looked_at_only_when_due(make_model, images, monkeypatch):
    evaluate = make([Recorder()], every=3)
    looks, look = [], evaluate._draw_if_due
    monkeypatch.setattr(
        evaluate, "_draw_if_due", lambda: (looks.append(1), look())
    )
    train(make_model(), images, [evaluate])
    assert iterations(evaluate) == [3, 6]
    assert len(looks) == 2


def test_a_reference_of_other_images_is_refused_before_training(
    make_model, images
):
    other = np.linspace(-1, 1, 5 * 48).reshape(5, 4, 4, 3).astype("float32")
    reference = Reference(other, lambda x: x[:, 0, :3, 0], name="other")
    model, evaluate = make_model(), make([FrechetDistance(reference)])
    with pytest.raises(ValueError, match=r"`metrics`.*\(4, 4, 3\)"):
        train(model, images, [evaluate])
    assert int(model.iteration) == 0
