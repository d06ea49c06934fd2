"""Checks of arguments; each raises a `ValueError` that says it all.

That is: the argument's name, what is allowed, and what came. A check hands the
value back as plain Python's, so that a configuration can hold it.
"""

import contextlib
import math
import os
import random
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

#: One more than the largest seed, because Keras takes seeds modulo this number
#: on TensorFlow, where larger ones would draw what smaller ones do.
SEED_END = 2**31 - 2
#: Numbers up to here, and their inverses, are finite in float32.
LARGEST = 1e30


def describe(value: Any) -> str:
    """A value for a message: short, and in one line, whatever it is."""
    kind = type(value).__name__
    # Because a message must not fail for what it is about, anything may go
    # wrong here.
    with contextlib.suppress(Exception):
        arrays = hasattr(value, "shape") and hasattr(value, "dtype")
        if arrays and not isinstance(value, np.generic):
            return f"{kind} of shape {tuple(value.shape)}, dtype {value.dtype}"
    text = "an object"
    with contextlib.suppress(Exception):
        text = " ".join(repr(value).split())
    text = text if len(text) <= 100 else f"{text[:97]}..."
    return f"{text} of type {kind}"


def invalid(name: str, allowed: str, value: Any) -> ValueError:
    """The error for an argument: what must be, and what came."""
    return ValueError(
        f"`{name}` must be {allowed}. Received: {name}={describe(value)}"
    )


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> str:
    """Raises unless `value` is one of the strings `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise invalid(name, f"one of {tuple(allowed)}", value)
    return value


def check_integer(
    name: str, value: Any, low: int, high: int = 2**31 - 1
) -> int:
    """Raises unless `value` is an integer of at least `low`, at most `high`."""
    allowed = f"an integer of at least {low}"
    if isinstance(value, (bool, np.bool_)) or not isinstance(
        value, (int, np.integer)
    ):
        raise invalid(name, allowed, value)
    if value < low:
        raise invalid(name, allowed, value)
    if value > high:
        raise invalid(name, f"{allowed} and at most {high}", value)
    return int(value)


def check_positive_integer(name: str, value: Any, high: int = 2**31 - 1) -> int:
    """Raises unless `value` is an integer of at least 1, at most `high`."""
    return check_integer(name, value, 1, high)


def check_number(
    name: str, value: Any, low: float, allowed: str, high: float = math.inf
) -> float:
    """Raises unless `value` is a finite number in [low, high].

    Args:
        name: The argument's name.
        value: What came.
        low: The smallest number allowed.
        allowed: What to say is allowed.
        high: The largest number allowed.

    Returns:
        The number, an int or float.
    """
    numbers = (int, float, np.integer, np.floating)
    if (
        isinstance(value, bool)
        or not isinstance(value, numbers)
        or not _is_finite(value)
        or not low <= value <= high
    ):
        raise invalid(name, allowed, value)
    return int(value) if isinstance(value, (int, np.integer)) else float(value)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def check_positive_number(name: str, value: Any) -> float:
    """Raises unless `value` is a finite number above 0."""
    return check_number(name, value, math.nextafter(0, 1), "a positive number")


def check_finite_number(name: str, value: Any) -> float:
    """Raises unless `value` is a finite number."""
    return check_number(name, value, -math.inf, "a finite number")


def check_boolean(name: str, value: Any) -> bool:
    """Raises unless `value` is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise invalid(name, "True or False", value)
    return bool(value)


def check_string(name: str, value: Any) -> str:
    """Raises unless `value` is a string that is not empty."""
    if not isinstance(value, str) or not value:
        raise invalid(name, "a string that is not empty", value)
    return str(value)


def check_function(name: str, value: Any, what: str = "a function") -> Callable:
    """Raises unless `value` can be called; a class is not meant.

    Args:
        name: The argument's name.
        value: What came.
        what: What to say is allowed.
    """
    if not callable(value) or isinstance(value, type):
        raise invalid(name, what, value)
    return value


def check_path(name: str, value: Any) -> Path:
    """Raises unless `value` is a path: a string that is not empty, or so."""
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise invalid(name, "a path", value)
    if "\0" in str(value):
        raise invalid(name, "a path without a null character", value)
    return Path(value)


def check_seed(name: str, value: Any) -> int | None:
    """Raises unless `value` is a seed, an integer in 0..2**31 - 3, or None.

    No two of these give the same numbers, on any backend. None draws one from
    Python's `random`, which `keras.utils.set_random_seed` seeds.
    """
    if value is None:
        return None
    try:
        return check_integer(name, value, 0, SEED_END - 1)
    except ValueError:
        raise invalid(
            name, "an integer in 0..2**31 - 3, or None", value
        ) from None


def as_seed(name: str, value: Any) -> int:
    """A seed as `check_seed` allows it; for None one that is drawn."""
    value = check_seed(name, value)
    return random.randrange(SEED_END) if value is None else value


def check_sequence(name: str, value: Any, what: str) -> tuple:
    """Raises unless `value` is a list or tuple of at least one entry.

    Args:
        name: The argument's name.
        value: What came.
        what: What to say is allowed, such as "a list of metrics".
    """
    if not isinstance(value, (list, tuple)) or not value:
        raise invalid(name, what, value)
    return tuple(value)


def check_shape(name: str, value: Any, axes: Sequence[str]) -> tuple[int, ...]:
    """Raises unless `value` is a shape, positive integers for `axes`.

    Args:
        name: The argument's name.
        value: What came.
        axes: What its entries are called.
    """
    allowed = f"({', '.join(axes)}), integers of at least 1"
    if not isinstance(value, (list, tuple)) or len(value) != len(axes):
        raise invalid(name, allowed, value)
    try:
        return tuple(check_positive_integer(name, size) for size in value)
    except ValueError:
        raise invalid(name, allowed, value) from None


# Arrays of data.


def is_array(value: Any) -> bool:
    """Whether it is an array or tensor of at least one axis."""
    # Anybody's object may raise whatever it likes when it is asked.
    with contextlib.suppress(Exception):
        return hasattr(value, "dtype") and len(value.shape) > 0
    return False


def check_numbers(name: str, value: Any, dtype: str) -> np.ndarray:
    """Raises unless `value` is a number, or an array, that a dtype holds.

    Args:
        name: The argument's name.
        value: What came.
        dtype: `"float32"`, which rounds, `"int32"` or `"bool"`.
    """
    allowed = f"finite numbers that {dtype} holds"
    try:
        given = np.asarray(ops.convert_to_numpy(value))
        with np.errstate(all="ignore"):
            array = given.astype(dtype)
    except Exception as error:  # because it may be anybody's object
        raise invalid(name, allowed, value) from error
    exact = dtype == "float32" or np.array_equal(array, given)
    numbers = given.dtype.kind in "biuf" or given.dtype.name == "bfloat16"
    finite = numbers and np.all(np.isfinite(array))
    if not (finite and exact and given.size):
        raise invalid(name, allowed, value)
    return array


def check_float32(name: str, value: Any) -> float:
    """Raises unless a float32 holds the number, and its inverse."""
    allowed = f"a number in [-{LARGEST:g}, {LARGEST:g}]"
    return float(check_number(name, value, -LARGEST, allowed, LARGEST))


def per_channel(name: str, value: Any, channels: int) -> Any:
    """Raises unless `value` is a number, or one per channel."""
    if not isinstance(value, (list, tuple)) and not is_array(value):
        return check_float32(name, value)
    values = check_sequence(name, list(value), "a number per channel")
    if len(values) != channels:
        raise ValueError(
            f"`{name}` must be a number, or one per channel, {channels}. "
            f"Received: {len(values)}"
        )
    return tuple(check_float32(name, v) for v in values)


def check_times(name: str, value: Any) -> np.ndarray:
    """Raises unless `value` are the times between which steps lead.

    Returns:
        They, float32, `(number of steps + 1,)`.
    """
    allowed = "two times or more, falling from 1 to 0"
    times = check_numbers(name, value, "float32")
    if (
        times.ndim != 1
        or len(times) < 2
        or (times[0], times[-1]) != (1, 0)
        or np.any(np.diff(times) >= 0)
    ):
        raise invalid(name, allowed, value)
    return times


def check_images(name: str, images: Any, image_shape: Sequence[int]) -> None:
    """Raises unless `images` is a batch of float images in [-1, 1].

    Args:
        name: What to call them in a message.
        images: An array or tensor, `(batch, *image_shape)`.
        image_shape: Height, width and channels.
    """
    check_image_shape(name, images, image_shape)
    dtype = keras.backend.standardize_dtype(images.dtype)
    low, high = _range_of(images)
    if math.isnan(low) or math.isnan(high):
        images = ops.convert_to_numpy(images)
        raise ValueError(
            f"`{name}` must be finite. Received: {int(np.isnan(images).sum())} "
            f"NaN of {images.size}"
        )
    if "float" not in dtype or low < -1 or high > 1:
        hint = ""
        if high > 1 and low >= 0:
            hint = " Integers 0..255 become that by `images / 127.5 - 1`."
        raise ValueError(
            f"`{name}` must be floats in [-1, 1].{hint} Received: dtype "
            f"{dtype} from {low:g} to {high:g}"
        )


def check_image_shape(
    name: str, images: Any, image_shape: Sequence[int]
) -> None:
    """Raises unless `images` has the shape of a batch of images.

    Arguments as in `check_images`.
    """
    if not is_array(images):
        raise invalid(name, "an array of images", images)
    shape, expected = tuple(images.shape), tuple(image_shape)
    if shape[1:] != expected:
        hint = ""
        if len(shape) == 4 and shape[1:] == (expected[-1], *expected[:-1]):
            hint = " Move the channels last: `np.moveaxis(images, 1, -1)`."
        raise ValueError(
            f"`{name}` must be images of shape (batch, height, width, "
            f"channels) = (batch, {', '.join(map(str, expected))}).{hint} "
            f"Received: shape {shape}"
        )
    if 0 in shape:
        raise ValueError(f"`{name}` has no images. Received: shape {shape}")


def lies_in_0_1(images: Any) -> bool:
    """Whether images look like [0, 1], in which others keep theirs."""
    low, high = _range_of(images)
    return low >= 0 and high > 0


def unit_range(name: str, images: Any) -> str:
    """What to say of images that look like [0, 1]."""
    low, high = _range_of(images)
    return (
        f"`{name}` must be floats in [-1, 1], and look like [0, 1], as none "
        "is below 0. Rescale them by `images * 2 - 1`, or say that this is "
        f"meant: `nonnegative=True`. Received: from {low:g} to {high:g}"
    )


def check_signed(name: str, images: Any) -> None:
    """Raises if all there is of images looks like [0, 1]."""
    if lies_in_0_1(images):
        raise ValueError(unit_range(name, images))


def warn_unsigned(name: str, images: Any) -> None:
    """Warns if the first images of a stream look like [0, 1]."""
    if lies_in_0_1(images):
        warnings.warn(unit_range(name, images), stacklevel=3)


def check_labels(name: str, labels: Any, num_classes: int | None) -> None:
    """Raises unless `labels` is a vector of classes, or None without any."""
    if num_classes is None:
        if labels is not None:
            raise ValueError(
                f"`{name}` must not be given: the network has no classes "
                f"(num_classes=None). Received: {describe(labels)}"
            )
        return
    if labels is None:
        raise ValueError(
            f"`{name}` must be given: the network has num_classes="
            f"{num_classes}. Received: None. Give batches as (images, labels), "
            f"labels integers 0..{num_classes - 1}"
        )
    integers = hasattr(labels, "dtype") and "int" in str(labels.dtype)
    if not integers or len(labels.shape) != 1 or 0 in labels.shape:
        raise ValueError(
            f"`{name}` must be an array of integers of shape (batch,). "
            f"Received: {describe(labels)}"
        )
    labels = ops.convert_to_numpy(labels)
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(bad):
        raise ValueError(
            f"`{name}` must be in 0..{num_classes - 1} (num_classes="
            f"{num_classes}). Received: labels from {int(labels.min())} to "
            f"{int(labels.max())}, the first of {len(bad)} bad ones at "
            f"{bad[0]}"
        )


def _range_of(images: Any) -> tuple[float, float]:
    """Least and largest number, NaN where there is any."""
    images = ops.convert_to_numpy(images)
    return float(images.min()), float(images.max())
