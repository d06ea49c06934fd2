"""Memory layouts with which the TPU compiler can fuse neighbours.

It chooses a good layout for each operation, but not for the copies between two
of them: operations that disagree about the layout of a tensor aren't fused. A
function that lays out returns the values that it is given.
"""

from typing import Any

import jax
from jax import numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint


def heads_first(x: Any) -> Any:
    """Lays heads out image by image, head by head, places last.

    The compiler fuses the two products of attention only if the batch is the
    outermost axis. Left alone, it may choose the heads for that.

    Args:
        x: `(batch, places, heads, channels)`.
    """
    x = jnp.swapaxes(x, 1, 2)
    x = with_layout_constraint(x, Layout(major_to_minor=(0, 1, 3, 2)))
    return jnp.swapaxes(x, 1, 2)


def places_first(maps: Any) -> Any:
    """Lays feature maps out place by place, all images of a place together.

    Convolutions take and leave this layout. Other layers, left alone, keep
    images outermost; then normalisations and activations are not fused into the
    convolutions, and read and write all maps by themselves.

    Args:
        maps: `(batch, height, width, channels)`.
    """
    return with_layout_constraint(maps, Layout(major_to_minor=(1, 2, 0, 3)))


def unpooled(maps: Any) -> Any:
    """Nearest-neighbour upsampling by two, as a transposed convolution.

    A repetition along the width would pad each pair of places to a whole tile
    of memory. A convolution by ones leaves maps in the layout of the other
    convolutions, and an addition that follows is fused into it.

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
        precision="highest",  # because float32 would be rounded else
    )
