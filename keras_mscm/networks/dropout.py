"""Dropout whose mask is a hash: cheap, and the same on every backend."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_mscm import backend, checks
from keras_mscm.functional.process import Tensor
from keras_mscm.networks.arguments import check_rate


@keras.saving.register_keras_serializable(package="keras_mscm")
class Dropout(keras.layers.Dropout):
    """For dropout that costs next to nothing, and is the same on any backend.

    It is `keras.layers.Dropout` whose random bits are a hash of the layer's
    seed, the number of calls so far, the example and the place in it. That is
    a handful of integer operations, which compilers fuse; JAX's generator of
    random numbers is much dearer on a CPU. An example's mask depends neither on
    the backend, nor on the other examples, nor on the number of replicas.

    Args:
        rate: The part that is dropped, in [0, 1).
        noise_shape: None, because each element has a bit of its own. It is an
            argument because configurations of `keras.layers.Dropout` have it.
        seed: Seed, in 0..2**31 - 3. None draws one, as
            `keras.utils.set_random_seed` says.
        **kwargs: As for any Keras layer.

    Call arguments:
        inputs: Tensor, `(batch, ...)`.
        training: Whether to drop.
        state: What `draw` has returned: calls with the same one drop the same.
            By default each call draws one.

    Call returns:
        Tensor of the same shape.

    Raises:
        ValueError: If an argument isn't as above.

    Example:

    >>> layer = Dropout(0.5, seed=1)
    >>> x = ops.ones((2, 1000))
    >>> 0.45 < float(ops.mean(layer(x, training=True) == 0)) < 0.55
    True

    Reference:
        The hash is the 32-bit finaliser of least bias of C. Wellons, *Hash
        Prospector*, 2018 to 2022.
    """

    def __init__(
        self,
        rate: float,
        noise_shape: None = None,
        seed: int | None = None,
        **kwargs: Any,
    ):
        if noise_shape is not None:
            raise checks.invalid("noise_shape", "None", noise_shape)
        super().__init__(
            check_rate("rate", rate),
            seed=checks.check_seed("seed", seed),
            **kwargs,
        )

    def draw(self) -> Tensor | None:
        """What the next mask is a hash of; None at rate 0.

        Returns:
            Seed and number of calls, int32, `(2,)`. One more call is counted.
        """
        if not self.rate:
            return None
        return ops.cast(self.seed_generator.next(), "int32")

    def call(
        self,
        inputs: Tensor,
        training: bool = False,
        state: Tensor | None = None,
    ) -> Tensor:
        if not training or not self.rate:
            return inputs
        state = self.draw() if state is None else state
        return _fused(inputs, state, first_example(inputs), rate=self.rate)


def seeds_apart(seed: int | None, number: int, drops: bool) -> list[int]:
    """Makes seeds for several layers of one seed.

    They are far apart, because a backend may take seed + counter for its state.

    Args:
        seed: Seed; None draws one.
        number: How many.
        drops: Whether any layer will use its seed.
    """
    if seed is None and not drops:
        seed = 0  # because a draw would change which seeds the weights draw
    seed = checks.as_seed("seed", seed)
    words = np.random.SeedSequence(seed).generate_state(number) >> 1
    return [int(word) for word in words % checks.SEED_END]


def first_example(x: Tensor) -> Tensor:
    """Index in the whole batch of the first example of this replica's shard.

    Args:
        x: The shard, `(batch, ...)`.
    """
    index, _ = backend.replica()
    return ops.cast(index * ops.shape(x)[0], "int32")


def dropped(x: Tensor, state: Tensor, first: Tensor, rate: float) -> Tensor:
    """`x` with some of its elements set to 0, and the others scaled up.

    Args:
        x: `(batch, ...)`.
        state: What `Dropout.draw` has returned.
        first: What `first_example` has returned.
        rate: The share of elements that become 0, in (0, 1).
    """
    keep = _keep(x, state, first, rate)
    return ops.where(keep, x / (1 - rate), 0)


_fused = backend.fused(dropped)


def _keep(x: Tensor, state: Tensor, first: Tensor, rate: float) -> Tensor:
    """True with probability `1 - rate`, of the shape of `x`."""
    seed, count = ops.unstack(state)
    example = first + ops.arange(ops.shape(x)[0], dtype="int32")
    place = ops.arange(math.prod(x.shape[1:]), dtype="int32")
    key = _hash(example + _hash(seed + _hash(count)))
    bits = _hash(ops.bitwise_xor(place, key[:, None]))
    # The bound is for rates that round to 1, because 2**31 is no int32.
    threshold = min(round(rate * 2**32) - 2**31, 2**31 - 1)
    return ops.reshape(bits >= threshold, ops.shape(x))


def _hash(bits: Tensor) -> Tensor:
    """Mixes 32 bits, signed because not every backend has unsigned ones."""
    bits = _folded(bits, 16) * 0x21F0AAAD
    bits = _folded(bits, 15) * 0x735A2D97
    return _folded(bits, 15)


def _folded(bits: Tensor, places: int) -> Tensor:
    """`bits ^ (bits >> places)`, with zeros coming in from the left."""
    shifted = ops.bitwise_right_shift(bits, places)
    # The mask is a tensor because Keras 3.15.1 on JAX would make a float of the
    # number where bfloat16 is the default.
    low = ops.convert_to_tensor(2 ** (32 - places) - 1, "int32")
    shifted = ops.bitwise_and(shifted, low)
    return ops.bitwise_xor(bits, shifted)
