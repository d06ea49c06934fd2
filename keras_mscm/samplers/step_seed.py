"""The random state of one step of a sampler."""

import keras
from keras import ops

from keras_mscm import functional as F
from keras_mscm.functional.process import Tensor


class StepSeed(keras.random.SeedGenerator):
    """The random state of one step: a tensor, where Keras has a variable.

    A stochastic sampler's `step` gets one. Within a compiled loop nothing can
    be assigned. As a seed of `keras.random`'s functions it is good for one
    draw, which depends on how images are batched; `normal` is not.

    Args:
        state: Seed, and number of the first image, `(2,)`.
        step: Number of the step, from 0.
    """

    def __init__(self, state: Tensor, step: Tensor):
        self.state, self.step = state, step

    def normal(self, images: Tensor) -> Tensor:
        """Standard normal noise, each image's its own.

        Args:
            images: What it is for, `(batch, ...)`.
        """
        seed, first = ops.unstack(ops.cast(self.state, "int32"))
        number = first + ops.arange(ops.shape(images)[0], dtype="int32")
        # Draw 0 is the noise that sampling begins with.
        draw = ops.cast(self.step, "int32") + 1
        return F.normal(seed, number, draw, tuple(images.shape[1:]))

    def next(self, ordered: bool = True) -> Tensor:
        """A state that no other step has, for one of `keras.random`."""
        seed, first = ops.unstack(self.state)
        word, _ = F.threefry_2x32((seed, first), (-1, self.step))
        word = ops.cast(ops.bitwise_and(word, 2**31 - 1), seed.dtype)
        return ops.stack([word, ops.zeros_like(word)])
