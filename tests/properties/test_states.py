"""What a model is after any sequence of fits, drawings, files and failures.

A random walk, beside a model of it in NumPy: the trained weights as they were
after each batch, and from these what average, counters and files must be.
"""

import keras
import numpy as np
import pytest
from keras import ops

from benchmarks.bad_arguments.world import World
from keras_mscm import DiffusionModel

BATCH, DECAY = 4, 0.5
IMAGES = np.random.default_rng(0).uniform(-1, 1, (8, 4, 4, 1)).astype("float32")


def numbers(layer):
    return [np.array(ops.convert_to_numpy(w)) for w in layer.weights]


def state(model):
    """All that training changes, and nothing else may."""
    optimizer = model.optimizer.variables
    return {
        "network": numbers(model.network),
        "average": numbers(model.ema_network),
        "iteration": int(model.iteration),
        "optimizer": [np.array(ops.convert_to_numpy(v)) for v in optimizer],
    }


def assert_same(found, expected, atol=0.0):
    for key, values in expected.items():
        pairs = map(keras.tree.flatten, (found[key], values))
        for ours, theirs in zip(*pairs, strict=True):
            np.testing.assert_allclose(
                ours, theirs, atol=atol, rtol=0, err_msg=key
            )


class Follow(keras.callbacks.Callback):
    """Follows a training batch by batch, and stops it where it is told to."""

    def __init__(self, fail_after=None, error=None):
        super().__init__()
        self.fail_after, self.error, self.seen = fail_after, error, []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(numbers(self.model.network))
        if len(self.seen) == self.fail_after:
            raise self.error


def broken(good):
    """A stream of batches, one of which can't be read."""
    for _ in range(good):
        yield IMAGES[:BATCH]
    raise OSError("the disk is gone")


class Walk:
    """A model, and what it must be."""

    def __init__(self, folder, seed):
        self.folder, self.rng = folder, np.random.default_rng(seed)
        self.model = DiffusionModel(
            **World(folder).of_plain(ema_decay=DECAY, seed=seed)
        )
        self.model.compile(keras.optimizers.Adam(1e-2))
        self.expected = state(self.model)
        self.files = {}

    # What changes nothing.

    def generate(self):
        images = self.model.generate(BATCH, num_steps=2, seed=1)
        assert np.all(np.isfinite(images))

    def evaluate(self):
        assert np.isfinite(self.model.evaluate(IMAGES, batch_size=4, verbose=0))

    def predict(self):
        inputs = {"z": IMAGES[:BATCH], "logsnr": np.zeros(BATCH, "float32")}
        found = self.model.predict(inputs, batch_size=BATCH, verbose=0)
        assert found.shape == (BATCH, 4, 4, 1)

    def give_bad_images(self):
        with pytest.raises(ValueError, match="finite"):
            self.model.fit(np.full_like(IMAGES, np.nan), verbose=0)

    def give_bad_arguments(self):
        with pytest.raises(ValueError, match="num_steps"):
            self.model.generate(4, num_steps=0)

    def fail_in_predict(self):
        class Stop(keras.callbacks.Callback):
            def on_predict_batch_end(self, batch, logs=None):
                raise RuntimeError("stop")

        inputs = {"z": IMAGES[:BATCH], "logsnr": np.zeros(BATCH, "float32")}
        with pytest.raises(RuntimeError, match="stop"):
            self.model.predict(
                inputs, batch_size=BATCH, verbose=0, callbacks=[Stop()]
            )

    def fail_in_evaluate(self):
        class Stop(keras.callbacks.Callback):
            def on_test_batch_end(self, batch, logs=None):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self.model.evaluate(
                IMAGES, batch_size=BATCH, verbose=0, callbacks=[Stop()]
            )

    # What trains.

    def _fit(self, updates, follow, error=None, x=IMAGES):
        def fit():
            self.model.fit(
                x,
                batch_size=BATCH if x is IMAGES else None,
                epochs=2 if x is IMAGES else 1,
                callbacks=[follow],
                shuffle=False,
                verbose=0,
            )

        if error is None:
            fit()
        else:
            with pytest.raises(error):
                fit()
        assert len(follow.seen) in updates
        i, average = self.expected["iteration"], self.expected["average"]
        for weights in follow.seen:
            rate = 1 - min(DECAY, (1 + i) / (10 + i))
            average = [a + rate * (w - a) for a, w in zip(average, weights)]
            i += 1
        found = state(self.model)
        expected = {
            "network": [self.expected["network"], *follow.seen][-1],
            "average": average,
            "iteration": i,
        }
        assert_same(found, expected, atol=1e-5)
        assert int(self.model.optimizer.iterations) == i
        self.expected = found

    def fit(self):
        self._fit([4], Follow())

    def fail_in_a_callback(self):
        after = int(self.rng.integers(1, 5))
        error = RuntimeError("of the user's own")
        self._fit([after], Follow(after, error), RuntimeError)

    def interrupt(self):
        after = int(self.rng.integers(1, 5))
        self._fit(
            [after], Follow(after, KeyboardInterrupt()), KeyboardInterrupt
        )

    def fail_in_the_data(self):
        good = int(self.rng.integers(1, 4))
        # Keras reads a batch ahead.
        updates = range(good - 1, good + 1)
        self._fit(updates, Follow(), OSError, broken(good))

    # Files.

    def save(self):
        path = self.folder / f"{len(self.files)}.keras"
        self.model.save(path)
        self.files[path] = self.expected

    def load(self):
        """Into a new model, if there is a file."""
        if self.files:
            path = [*self.files][int(self.rng.integers(len(self.files)))]
            self.model = keras.saving.load_model(path)
            self.expected = self.files[path]

    def load_weights(self):
        """Of another time, into the same model."""
        path = self.folder / "kept.weights.h5"
        self.model.save_weights(path)
        kept = self.expected
        self.fit()
        self.model.load_weights(path)
        self.expected = kept

    STEPS = (
        *("generate", "evaluate", "predict", "give_bad_images"),
        *("give_bad_arguments", "fail_in_predict", "fail_in_evaluate"),
        *("fit", "fail_in_a_callback", "interrupt", "fail_in_the_data"),
        *("save", "load_weights"),
    )

    def walk(self, steps, loads):
        """Each step once, then more at random; loads at even distances."""
        order = [*self.rng.permutation(self.STEPS)]
        order += [*self.rng.choice(self.STEPS, steps)]
        for i in range(loads):
            order.insert((i + 1) * len(order) // (loads + 1), "load")
        taken = []
        for step in order:
            taken.append(str(step))
            try:
                getattr(self, step)()
                assert_same(state(self.model), self.expected)
            except BaseException as error:
                error.add_note(f"after {taken}")
                raise


def test_a_model_is_what_its_training_made_it(tmp_path):
    Walk(tmp_path, seed=1).walk(steps=12, loads=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_model_is_so_on_long_walks(seed, tmp_path):
    Walk(tmp_path, seed).walk(steps=100, loads=3)
