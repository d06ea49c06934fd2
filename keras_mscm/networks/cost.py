"""What a UViT costs."""

import math
from typing import Any

from keras_mscm import checks


def flops(network: Any, context_length: int = 128) -> int:
    """FLOPs of one forward pass for one image.

    A multiplication and its addition are two. Dense layers, convolutions
    and attention are counted, which is nearly all.

    Args:
        context_length: Tokens of the context, where there is one.

    Returns:
        Number of floating-point operations.

    Raises:
        ValueError: If `context_length` isn't an integer of at least 0.
    """
    context_length = checks.check_integer("context_length", context_length, 0)
    pixels = math.prod(network.image_shape) * network.widths[0]
    flops = network.embed_noise.flops() + 4 * pixels  # entry and exit
    length = 0
    if network.embed_end:
        flops += network.embed_end.flops()
    if network.embed_context:
        flops += network.embed_context.flops()
        length = context_length + 1  # the null token
    for stage, blocks in network._stages():
        sides = network._sides[stage]
        extra = [length] if network.attention[stage] else []
        flops += sum(block.flops(*sides, *extra) for block in blocks)
    for i, (widen, narrow) in enumerate(zip(network.widen, network.narrow)):
        for dense in (widen, narrow):
            flops += 2 * math.prod(network._sides[i + 1] + dense.kernel.shape)
    return flops
