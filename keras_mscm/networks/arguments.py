"""What the arguments of networks and their layers may be.

The bounds are far beyond any use. They are there because a slip, such as a
zero too many, should be reported at once, and not by memory that runs out.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from keras_mscm import checks

#: The largest side, number of channels, or width of anything.
MAX_SIZE = 2**16
#: The largest number of blocks of a stage.
MAX_DEPTH = 2**10
#: The largest ratio of a hidden layer's width to its channels.
MAX_RATIO = 2**8
#: The largest number of classes.
MAX_CLASSES = 2**24
#: The largest rate of a wave of time, in radians over all of it.
MAX_TIME_RATE = 1000.0


def check_size(name: str, value: Any, high: int = MAX_SIZE) -> int:
    """Raises unless `value` is an integer of at least 1, at most `high`."""
    return checks.check_positive_integer(name, value, high)


def check_optional(name: str, value: Any, high: int = MAX_SIZE) -> int | None:
    """As `check_size`, or None."""
    if value is None:
        return None
    try:
        return check_size(name, value, high)
    except ValueError:
        allowed = f"an integer of at least 1 and at most {high}, or None"
        raise checks.invalid(name, allowed, value) from None


def check_rate(name: str, value: Any) -> float:
    """Raises unless `value` is a rate of dropout, in [0, 1)."""
    below_1 = math.nextafter(1, 0)
    return checks.check_number(name, value, 0, "a number in [0, 1)", below_1)


def check_even(name: str, value: Any) -> int:
    """Raises unless `value` is a width of as many sines as cosines."""
    allowed = f"an even integer of at least 4 and at most {MAX_SIZE}"
    try:
        width = checks.check_integer(name, value, 4, MAX_SIZE)
    except ValueError:
        raise checks.invalid(name, allowed, value) from None
    if width % 2:
        raise checks.invalid(name, allowed, value)
    return width


def check_time_rate(name: str, value: Any) -> float:
    """Raises unless `value` is a rate of the fastest wave of time."""
    allowed = f"a number in [2, {MAX_TIME_RATE:g}]"
    return float(checks.check_number(name, value, 2, allowed, MAX_TIME_RATE))


def check_widths(name: str, value: Any) -> tuple[int, ...]:
    """Raises unless `value` is one size per stage, of one stage or more."""
    # There are no more stages, because one pooling more would leave nothing of
    # the largest image.
    stages = MAX_SIZE.bit_length()
    allowed = (
        f"a list or tuple of 1 to {stages} integers, one per stage, each of at "
        f"least 1 and at most {MAX_SIZE}"
    )
    if len(checks.check_sequence(name, value, allowed)) > stages:
        raise checks.invalid(name, allowed, value)
    return _each(name, value, check_size, allowed)


def check_depths(name: str, value: Any, stages: int) -> tuple[int, ...]:
    """Raises unless `value` is a number of blocks for each stage."""
    allowed = (
        "a list or tuple of integers, one per stage, each of at least 1 and "
        f"at most {MAX_DEPTH}"
    )
    if not isinstance(value, (list, tuple)):
        raise checks.invalid(name, allowed, value)

    def check(name, value):
        return check_size(name, value, MAX_DEPTH)

    return _per_stage(name, value, stages, check, allowed)


def check_switches(name: str, value: Any, stages: int) -> tuple[bool, ...]:
    """Raises unless `value` is a boolean for each stage, or one for all."""
    allowed = "True or False, or one of these per stage"
    return _per_stage(name, value, stages, checks.check_boolean, allowed)


def check_rates(name: str, value: Any, stages: int) -> tuple[float, ...]:
    """Raises unless `value` is a dropout rate for each stage, or for all."""
    allowed = "a number in [0, 1), or one of these per stage"
    return _per_stage(name, value, stages, check_rate, allowed)


def _per_stage(
    name: str, value: Any, stages: int, check: Callable, allowed: str
) -> tuple:
    """One for each stage, from that or from one for all."""
    if not isinstance(value, (list, tuple)):
        value = (value,) * stages
    if len(value) != stages:
        raise ValueError(
            f"`{name}` must have one entry per stage, as `widths` has, here "
            f"{stages}. Received: {name}={checks.describe(value)}"
        )
    return _each(name, value, check, allowed)


def _each(name: str, values: Sequence, check: Callable, allowed: str) -> tuple:
    try:
        return tuple(check(name, value) for value in values)
    except ValueError:
        raise checks.invalid(name, allowed, values) from None


def check_image_shape(value: Any, multiple: int) -> tuple[int, ...]:
    """Raises unless `value` is a shape that divides into what a network sees.

    Args:
        value: What came.
        multiple: What height and width must be multiples of.
    """
    axes = ("height", "width", "channels")
    shape = checks.check_shape("image_shape", value, axes)
    if max(shape) > MAX_SIZE:
        allowed = f"({', '.join(axes)}), each at most {MAX_SIZE}"
        raise checks.invalid("image_shape", allowed, value)
    if any(side % multiple for side in shape[:2]):
        raise ValueError(
            f"The sides of `image_shape` must be multiples of {multiple} "
            "(`patch_size` times 2 per pooling). Received: "
            f"image_shape={shape}"
        )
    return shape


def check_heads(
    widths: Sequence[int], attention: Sequence[bool], head_width: int
) -> None:
    """Raises unless stages that attend divide into heads."""
    for width, attends in zip(widths, attention):
        if attends and width % head_width:
            raise ValueError(
                "`widths` of stages with attention must be multiples of "
                f"`head_width`={head_width}. Received: {width} in "
                f"widths={tuple(widths)}"
            )


def check_head(channels: int, head_width: int) -> None:
    """Raises unless a layer's channels divide into heads."""
    if channels % head_width:
        raise ValueError(
            f"`head_width` must divide the channels, {channels}. Received: "
            f"head_width={head_width}"
        )


def check_inputs(
    inputs: Any, num_classes: int | None, context_width: int | None
) -> None:
    """Raises unless `inputs` is a dictionary of what a network takes."""
    names = ["z", "logsnr"]
    if num_classes:
        names.append("labels")
    if context_width:
        names += ["context", "context_mask"]
    allowed = f"a dictionary of tensors, with the keys {names}"
    if not isinstance(inputs, dict):
        raise checks.invalid("inputs", allowed, inputs)
    lacking = [name for name in names if inputs.get(name) is None]
    if lacking:
        raise ValueError(
            f"`inputs` must be {allowed}. Received: none for {lacking}, as the "
            f"keys are {list(inputs)}"
        )


def check_trainable(policy: Any) -> None:
    """Raises if weights of this policy would be NaN after a step or two."""
    if policy.variable_dtype == "float16":
        raise ValueError(
            "`dtype` must be a policy whose variables aren't float16, for "
            "training: squares of gradients are 0 in it, and Adam divides by "
            "their root. Take 'mixed_float16', which computes in float16. "
            f"Received: dtype={policy.name!r}"
        )
