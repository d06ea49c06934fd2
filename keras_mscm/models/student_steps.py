"""For which numbers of steps a student is, and how they are drawn."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_mscm import checks
from keras_mscm.functional.process import Tensor
from keras_mscm.models.arguments import takes_logsnr_end

StudentSteps = int | tuple[int, ...] | str

ANY = "any"
#: Steps that `generate` takes by default of a student of any number.
DEFAULT_OF_ANY = 8
MOST = 2**20


def check(value: Any) -> StudentSteps:
    """Raises unless `student_steps` is a number, several, or `"any"`."""
    if isinstance(value, str):
        return checks.check_choice("student_steps", value, (ANY,))
    if not isinstance(value, (list, tuple)):
        return checks.check_positive_integer("student_steps", value, MOST)
    allowed = "an integer, a list of different ones, or 'any'"
    steps = tuple(
        checks.check_positive_integer("student_steps", k, MOST)
        for k in checks.check_sequence("student_steps", value, allowed)
    )
    if len({*steps}) < len(steps):
        raise checks.invalid("student_steps", allowed, value)
    return tuple(sorted(steps))


def check_weights(value: Any, steps: StudentSteps) -> tuple[float, ...] | None:
    """Raises unless `step_weights` are one for each number of steps."""
    if value is None:
        return None
    if not isinstance(steps, tuple):
        raise ValueError(
            "`step_weights` must not be given unless `student_steps` are "
            f"several numbers. Received: student_steps={steps!r}"
        )
    allowed = f"a list of a positive number for each of {steps}"
    weights = checks.check_sequence("step_weights", value, allowed)
    if len(weights) != len(steps):
        raise checks.invalid("step_weights", allowed, value)
    return tuple(
        checks.check_positive_number("step_weights", w) for w in weights
    )


def take_end(network: Any) -> None:
    """Lets a network be told where its prediction is to lead.

    Raises:
        ValueError: If it can't be.
    """
    if takes_logsnr_end(network):
        return
    if not callable(getattr(network, "take_logsnr_end", None)):
        raise ValueError(
            "`network` must be one that can be told where its step ends, for "
            "several student_steps: a `UViT`, an adapted network that knows "
            "its time embedding, a functional model with an input "
            "'logsnr_end', or a layer that says `takes_logsnr_end = True`. "
            "Received: "
            f"{checks.describe(network)}"
        )
    network.take_logsnr_end()


def largest(steps: StudentSteps) -> int:
    """The largest number of steps; of `"any"`, the 1 that is needed."""
    if isinstance(steps, str):
        return 1
    return max(steps) if isinstance(steps, tuple) else steps


def draw(
    steps: Sequence[int], weights: Sequence[float] | None, uniform: Tensor
) -> Tensor:
    """One of several numbers of steps for each example.

    Args:
        steps: The numbers.
        weights: How often each is drawn, relative to the others; equally by
            default.
        uniform: Numbers uniform in [0, 1), `(batch,)`.

    Returns:
        Floats, `(batch,)`.
    """
    shares = np.ones(len(steps)) if weights is None else np.asarray(weights)
    bounds = (np.cumsum(shares) / np.sum(shares))[:-1]
    bounds = ops.convert_to_tensor(bounds, "float32")
    place = ops.sum(
        ops.cast(uniform[:, None] >= bounds[None], "int32"), axis=-1
    )
    return ops.take(ops.convert_to_tensor(steps, "float32"), place)
