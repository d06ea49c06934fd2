"""Whatever is done to a model in whatever order, its state stays whole."""

import keras
import numpy as np
import pytest

from tests.models.data_forms import Batches

IMAGES = np.random.default_rng(0).uniform(-1, 1, (4, 4, 4, 1)).astype("float32")
BATCHES = 3  # in a fit


class Boom(Exception):
    """Somebody's own."""


class Stop(keras.callbacks.Callback):
    """Raises as a batch begins."""

    def __init__(self, error, batch):
        super().__init__()
        self.error, self.batch = error, batch

    def on_train_batch_begin(self, batch, logs=None):
        if batch == self.batch:
            raise self.error


def stream(bad=None):
    """A generator of batches; at one it raises, or yields a NaN."""
    for i in range(BATCHES):
        if i == 1 and bad == "raises":
            raise Boom
        yield (np.full_like(IMAGES, np.nan) if bad and i == 1 else IMAGES,)


class Walk:
    """A model, and what it should hold."""

    def __init__(self, model, folder, weights_of):
        self.model, self.folder = model, folder
        self.weights_of = weights_of
        self.updates = 0
        self.saved = None

    def fit(self):
        self.model.fit(Batches([IMAGES] * BATCHES), verbose=0)
        self.updates += BATCHES

    def fit_that_is_stopped(self, error, batch):
        with pytest.raises(type(error)):
            self.model.fit(
                Batches([IMAGES] * BATCHES),
                callbacks=[Stop(error, batch)],
                verbose=0,
            )
        self.updates += batch

    def a_callback_raises(self):
        self.fit_that_is_stopped(Boom(), 1)

    def an_interrupt_before_the_first_batch(self):
        self.fit_that_is_stopped(KeyboardInterrupt(), 0)

    def an_interrupt(self):
        self.fit_that_is_stopped(KeyboardInterrupt(), 2)

    def data_that_raise(self):
        # What `tf.data` makes of an exception is TensorFlow's own error.
        with pytest.raises(Exception):  # noqa: B017, PT011
            self.model.fit(stream("raises"), verbose=0)
        self._some_were_done()

    def data_that_are_bad(self):
        with pytest.raises(ValueError, match="batch 1 of x"):
            self.model.fit(stream("NaN"), verbose=0)
        self._some_were_done()

    def _some_were_done(self):
        # A framework may have read ahead.
        done = int(keras.ops.convert_to_numpy(self.model.iteration))
        assert self.updates <= done <= self.updates + 1
        self.updates = done

    def bad_arguments(self):
        for run in (
            lambda: self.model.fit(IMAGES + 9, verbose=0),
            lambda: self.model.generate(num_steps=0),
        ):
            with pytest.raises(ValueError, match="Received"):
                run()

    def evaluate(self):
        loss = self.model.evaluate(IMAGES, batch_size=4, verbose=0)
        assert np.isfinite(loss)

    def evaluate_that_fails(self):
        with pytest.raises(ValueError, match="batch 1 of x"):
            self.model.evaluate(stream("NaN"), verbose=0)

    def predict(self):
        inputs = {"z": IMAGES, "logsnr": np.zeros(4, "float32")}
        x = self.model.predict(inputs, batch_size=4, verbose=0)
        assert x.shape == IMAGES.shape

    def generate(self):
        images = self.model.generate(4, seed=1)
        assert images.shape == IMAGES.shape
        assert np.all(np.abs(images) <= 1)

    def save(self):
        self.model.save(self.folder / "model.keras")
        self.saved = self.updates, self.weights_of(self.model)

    def load(self):
        if self.saved is None:
            return
        self.model.load_weights(self.folder / "model.keras")
        self.updates, expected = self.saved
        for ours, theirs in zip(self.weights_of(self.model), expected):
            np.testing.assert_array_equal(ours, theirs)

    def check(self):
        model = self.model
        variables = [*model.variables, *model.optimizer.variables]
        for variable in variables:
            assert np.all(np.isfinite(keras.ops.convert_to_numpy(variable)))
        for counter in (model.iteration, model.optimizer.iterations):
            count = int(keras.ops.convert_to_numpy(counter))
            assert count == self.updates


ACTIONS = [
    name
    for name, value in vars(Walk).items()
    if callable(value) and not name.startswith(("_", "check", "fit_that"))
]


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_a_random_walk(kind, make_teacher, make_student, tmp_path, weights_of):
    make = {"teacher": make_teacher, "student": make_student}[kind]
    walk = Walk(make(), tmp_path, weights_of)
    if kind == "teacher":
        generate = walk.model.generate
        walk.model.generate = lambda *args, **kwargs: generate(
            *args, **{"num_steps": 2, **kwargs}
        )
    rng = np.random.default_rng(5)
    actions = [*ACTIONS, *rng.choice(ACTIONS, 25)]
    rng.shuffle(actions)
    for i, action in enumerate(actions):
        getattr(walk, action)()
        try:
            walk.check()
        except AssertionError as error:
            raise AssertionError(f"after {actions[: i + 1]}") from error
    assert walk.updates > 0
