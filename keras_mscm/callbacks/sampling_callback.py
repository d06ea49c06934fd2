"""What callbacks that draw samples every so many iterations share."""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_mscm import backend, checks
from keras_mscm.conditioning import completed
from keras_mscm.models import DenoisingModel

Drawings = dict[int | None, Iterator[np.ndarray]]

#: Arguments of `generate` that the callback sets itself.
OWN = ("num_images", "noise")


class SamplingCallback(keras.callbacks.Callback):
    """The base for a callback that draws samples every so many iterations.

    It draws them from always the same noise. It counts batches on the host, and
    reads the model's iteration only when a drawing is about due, because
    reading waits for the device. An iteration is an optimizer update, so it
    goes on where a resumed training does.

    Args:
        every: Iterations between two drawings, at least 1.
        num_images: How many images.
        labels: Their classes; 0, 1, ... in turn by default.
        context: Sequence conditioning, as for `generate`.
        context_mask: Which of it counts, as for `generate`.
        batch_size: Images at a time, at least 1.
        seed: Seed of the noise, and of what the sampler adds, in
            0..2**31 - 3.
        generate_with: Further arguments of the model's `generate`; its
            `num_steps` may be several.
    """

    def __init__(
        self,
        every: int,
        num_images: int,
        labels: Any,
        context: Any,
        context_mask: Any,
        batch_size: int,
        seed: int,
        generate_with: dict[str, Any],
    ):
        super().__init__()
        self.every = checks.check_positive_integer("every", every)
        self.num_images = checks.check_positive_integer(
            "num_images", num_images
        )
        batch_size = checks.check_positive_integer("batch_size", batch_size)
        self.batch_size = min(batch_size, self.num_images)
        # None is refused, because each drawing must be from the same noise.
        self.seed = checks.check_integer("seed", seed, 0, checks.SEED_END - 1)
        generate_with = dict(generate_with)
        #: The numbers of steps that are drawn; None is the model's own.
        self.num_steps = _several(generate_with.pop("num_steps", None))
        given = generate_with.pop("conditioning", {})
        if not isinstance(given, dict):
            raise checks.invalid(
                "conditioning", "a dictionary of arrays by name", given
            )
        short = {
            "labels": labels,
            "context": context,
            "context_mask": context_mask,
        }
        conditioning = {**given, **short}
        self.conditioning = {
            key: _entries(key, value, self.num_images)
            for key, value in conditioning.items()
            if value is not None
        }
        for name in OWN:
            if name in generate_with:
                raise ValueError(
                    f"`{name}` must not be given, because "
                    f"`{type(self).__name__}` draws `num_images` images from "
                    "always the same noise, by `seed`. Received: "
                    f"{name}={checks.describe(generate_with[name])}"
                )
        self.generate_with = generate_with

    def on_drawing(self, iteration: int, drawings: Drawings) -> None:
        """What to do with the images.

        Args:
            iteration: The optimizer updates so far.
            drawings: By the number of steps, the images in [-1, 1], in
                batches, drawn as they are asked for, from the same noise.
        """
        raise NotImplementedError

    def on_train_begin(self, logs: Any = None) -> None:
        """Checks the model, and the conditioning against it."""
        model = self.model
        if not isinstance(model, DenoisingModel):
            raise ValueError(
                f"`{type(self).__name__}` must be used with a DenoisingModel. "
                f"Received: {type(model).__name__}"
            )
        num, given = self.num_images, self.conditioning
        try:
            # All of it once, because labels are in turn over all images, and
            # not over each batch.
            self._parts = completed(model.conditioning, given, num)
            for num_steps in self.num_steps:
                arguments = self._arguments(0, num, num_steps)
                model.check_generate(num_images=num, **arguments)
        except TypeError as error:
            raise ValueError(
                f"`{type(self).__name__}` must be given arguments of "
                f"{type(model).__name__}.generate. Received: "
                f"{sorted(self.generate_with)}: {error}"
            ) from error
        # It is None until the first epoch, because only then is it known which
        # iteration the callbacks before this one have restored.
        self._last: int | None = None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Sees which iteration the epoch begins at."""
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        model = self.model
        self._begin = backend.integer(model.iteration)
        optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
        self._batches = optimizer.gradient_accumulation_steps or 1
        if self._last is None:
            self._last = self._begin
            self.on_first_iteration(self._begin)

    def on_first_iteration(self, iteration: int) -> None:
        """Called once per training, when what is to be resumed is restored."""

    # This isn't done when a batch ends, because Keras would then wait for the
    # device to hand over the loss of each batch.
    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Draws, if `batch` batches of the epoch bring it to its turn."""
        if self._is_due(self._begin + batch // self._batches):
            self._draw_if_due()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Draws, if the last batch has brought it to its turn."""
        self._draw_if_due()

    def _is_due(self, iteration: int) -> bool:
        return iteration // self.every > (self._last or 0) // self.every

    def _draw_if_due(self) -> None:
        iteration = backend.integer(self.model.iteration)
        # It is asked again, because loss scaling may have skipped an update.
        if self._is_due(iteration):
            self._last = iteration
            drawings = {k: self._draw(k) for k in self.num_steps}
            self.on_drawing(iteration, drawings)

    def _draw(self, num_steps: int | None = None) -> Iterator[np.ndarray]:
        # The noise is one stream, so that the batch size doesn't change it.
        rng = np.random.default_rng(self.seed)
        shape = self.model.space.shape
        for begin in range(0, self.num_images, self.batch_size):
            end = min(begin + self.batch_size, self.num_images)
            noise = rng.standard_normal((end - begin, *shape), dtype="float32")
            arguments = self._arguments(begin, end, num_steps)
            yield self.model.generate(noise=noise, **arguments)

    def _arguments(
        self, begin: int, end: int, num_steps: int | None
    ) -> dict[str, Any]:
        parts = {name: value[begin:end] for name, value in self._parts.items()}
        return {
            "conditioning": parts,
            "seed": (self.seed + begin) % checks.SEED_END,
            "batch_size": self.batch_size,
            "num_steps": num_steps,
            **self.generate_with,
        }


def _several(num_steps: Any) -> tuple[int | None, ...]:
    """The numbers of steps, of one or a list of them."""
    if num_steps is None:
        return (None,)
    allowed = "an integer, or a list of different ones"
    if not isinstance(num_steps, (list, tuple)):
        num_steps = (num_steps,)
    numbers = tuple(
        checks.check_positive_integer("num_steps", k)
        for k in checks.check_sequence("num_steps", num_steps, allowed)
    )
    if len({*numbers}) < len(numbers):
        raise checks.invalid("num_steps", allowed, num_steps)
    return numbers


def _entries(name: str, value: Any, num_images: int) -> np.ndarray:
    """An array of one entry per image."""
    try:
        array = np.asarray(keras.ops.convert_to_numpy(value))
    except Exception as error:  # whatever a backend raises
        raise checks.invalid(name, "an array", value) from error
    if array.dtype.kind not in "biuf":
        raise checks.invalid(name, "an array of numbers", value)
    if array.ndim == 0:
        raise checks.invalid(
            name, f"an array of one entry per image, {num_images}", value
        )
    if len(array) != num_images:
        raise ValueError(
            f"`{name}` must have one entry per image. Received: num_images="
            f"{num_images}, {len(array)} {name}"
        )
    return array
