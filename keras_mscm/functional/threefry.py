"""Random numbers that are a function of where they belong: Threefry-2x32.

A backend's own generator gives a batch its numbers one after the other, so
that an image's depend on the images before it. Here they depend on the seed,
the number of the image, the step and the place in the image, and on nothing
else: neither on the batch size nor on the backend.
"""

import math

from keras import ops

from keras_mscm import checks
from keras_mscm.functional.process import Tensor

# Salmon et al., table 2.
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def threefry_2x32(
    key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Threefry-2x32 of 20 rounds: 64 random bits for a key and a counter.

    Args:
        key: Two words of 32 bits, as int32 of shapes that broadcast.
        counter: Two words, likewise.

    Returns:
        Two words, int32.

    Reference:
        Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, 2011,
        section 3.3.
    """
    # Signed, because not every backend computes with unsigned integers.
    k0, k1, x0, x1 = (ops.cast(word, "int32") for word in (*key, *counter))
    keys = (k0, k1, k0 ^ k1 ^ _PARITY)
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for i in range(5):
        for places in _ROTATIONS[i % 2]:
            x0 = x0 + x1
            x1 = _rotated(x1, places) ^ x0
        x0 = x0 + keys[(i + 1) % 3]
        x1 = x1 + keys[(i + 2) % 3] + (i + 1)
    return x0, x1


def _rotated(word: Tensor, places: int) -> Tensor:
    """Bits moved to the left; what falls out comes in from the right."""
    return ops.left_shift(word, places) | _shifted(word, 32 - places)


def _shifted(word: Tensor, places: int) -> Tensor:
    """Bits moved to the right, with zeros coming in from the left."""
    return ops.right_shift(word, places) & (2 ** (32 - places) - 1)


def normal(
    seed: Tensor, number: Tensor, draw: Tensor, shape: tuple[int, ...]
) -> Tensor:
    """Standard normal numbers for images, each image's its own.

    Args:
        seed: Integer below 2**32, a scalar.
        number: Which image each is, integers, `(batch,)`.
        draw: How many draws came before, such as the step, a scalar.
        shape: Shape of an image, integers of at least 1.

    Returns:
        `(batch, *shape)`, float32.

    Raises:
        ValueError: If `shape` is something else.

    Reference:
        Box & Muller, *A note on the generation of random normal deviates*,
        1958.
    """
    if not isinstance(shape, (list, tuple)):
        raise checks.invalid("shape", "a tuple of integers", shape)
    for side in shape:
        checks.check_positive_integer("shape", side)
    size = math.prod(shape)
    # Each counter gives two numbers, a radius at an angle.
    place = ops.arange((size + 1) // 2, dtype="int32")
    key = seed, ops.cast(number, "int32")[:, None]
    # Of 24 bits, because a float32 has no more; never 0, which has no log.
    radius, angle = (
        (ops.cast(_shifted(word, 8), "float32") + 0.5) * 2.0**-24
        for word in threefry_2x32(key, (place[None], draw))
    )
    radius = ops.sqrt(-2.0 * ops.log(radius))
    angle = 2.0 * math.pi * angle
    numbers = ops.concatenate(
        [radius * ops.cos(angle), radius * ops.sin(angle)], axis=1
    )
    return ops.reshape(numbers[:, :size], (-1, *shape))
