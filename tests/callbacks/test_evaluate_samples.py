"""When it evaluates, what, and which weights are kept."""

import json

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm.callbacks import EvaluateSamples
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
    return EvaluateSamples(
        metrics, every=every, num_images=num_images, num_steps=2, **kw
    )


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
        evaluate.on_drawing(0, evaluate._draw())
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


@pytest.mark.parametrize(
    ("kw", "message"),
    [
        ({"metrics": []}, "`metrics` must be a list"),
        ({"metrics": [3]}, "`metrics` must be a list"),
        ({"metrics": [Recorder(), Recorder()]}, "names of their own"),
        ({"every": 0}, "`every` must be at least 1"),
        ({"num_images": 0}, "`num_images` must be at least 1"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"seed": -1}, "`seed` must be"),
        ({"labels": [1, 2]}, r"`labels` must have one entry.*2 labels"),
        ({"monitor": "fid"}, r"`monitor` must be one of.*recorder"),
        ({"mode": "auto"}, "`mode` must be one of"),
        ({"best_weights": "best.h5"}, r"`best_weights` must end in"),
    ],
)
def test_bad_arguments(kw, message):
    with pytest.raises(ValueError, match=message):
        make(**{"metrics": [Recorder()], **kw})


def test_arguments_that_do_not_suit_the_model(make_model, images):
    cases = [
        (make_model(), {"labels": [0, 1, 2]}, "`labels` must not be given"),
        (make_model(3), {"labels": [0, 1, 3]}, "`labels` must be in 0"),
        (make_model(), {"steps": 3}, r"arguments of DiffusionModel.*steps"),
    ]
    for model, kw, message in cases:
        data = {"y": np.zeros(24, "int32")} if model.num_classes else {}
        evaluate = make([Recorder()], **kw)
        with pytest.raises(ValueError, match=message):
            train(model, images, [evaluate], **data)
        assert int(model.iteration) == 0


def test_the_model_is_looked_at_only_when_due(make_model, images, monkeypatch):
    evaluate = make([Recorder()], every=3)
    looks, look = [], evaluate._draw_if_due
    monkeypatch.setattr(
        evaluate, "_draw_if_due", lambda: (looks.append(1), look())
    )
    train(make_model(), images, [evaluate])
    assert iterations(evaluate) == [3, 6]
    assert len(looks) == 2
