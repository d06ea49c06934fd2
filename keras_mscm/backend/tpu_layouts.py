"""In which order the TPU compiler puts axes into memory.

It chooses well for each operation, but not for what stands between: a layout
that two neighbours disagree about keeps them from being one pass. Each function
returns what it is given.
"""

from typing import Any

import jax
from jax import numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint


def heads_first(x: Any) -> Any:
    """Image by image, head by head, places last.

    The compiler makes one pass of attention's two products only with the batch
    outside. Left alone, it may take the heads outside.

    Args:
        x: `(batch, places, heads, channels)`.
    """
    x = jnp.swapaxes(x, 1, 2)
    x = with_layout_constraint(x, Layout(major_to_minor=(0, 1, 3, 2)))
    return jnp.swapaxes(x, 1, 2)


def places_first(maps: Any) -> Any:
    """Place by place, and of each place image by image.

    Convolutions are computed so. Other layers, left alone, keep images
    outside: then normalisations and activations, which would be part of the
    convolutions, read and write all maps by themselves.

    Args:
        maps: `(batch, height, width, channels)`.
    """
    return with_layout_constraint(maps, Layout(major_to_minor=(1, 2, 0, 3)))


def unpooled(maps: Any) -> Any:
    """What is at each place four times, in a square.

    Repeated along the width, pairs of places would be padded to whole tiles of
    memory. A convolution by one leaves maps as others do, and what is added to
    them is added on the way.

    Args:
        maps: `(batch, height, width, channels)`.

    Returns:
        `(batch, 2 height, 2 width, channels)`.
    """
    one = jnp.eye(maps.shape[-1], dtype=maps.dtype)
    return jax.lax.conv_transpose(
        maps,
        jnp.broadcast_to(one, (2, 2, *one.shape)),
        strides=(2, 2),
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",  # or float32 would be rounded
    )
