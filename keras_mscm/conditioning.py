"""What a network is conditioned on: its inputs besides `z` and log-SNR.

A network declares them, by name, in its attribute `conditioning`. Data,
sampling, label dropout, guidance, callbacks and plans follow what it declares.
"""

import re
from collections.abc import Mapping
from typing import Any, Self, TypeAlias

import keras
import numpy as np
from keras import ops

from keras_mscm import checks
from keras_mscm.functional.process import Tensor, expand

Conditioning: TypeAlias = dict[str, Tensor]
"""Arrays by name, each of the length of the batch."""

DTYPES = ("float32", "int32", "bool")
# What a network is given besides.
RESERVED = ("z", "logsnr", "logsnr_end")


@keras.saving.register_keras_serializable(package="keras_mscm")
class Condition:
    """One input that a network is conditioned on, and what says nothing there.

    You want it when a network takes more than classes or a caption's tokens:
    a pooled embedding, a low-resolution image, several at once. `UViT` and the
    adapters declare theirs; for another network give the model
    `conditioning={name: Condition(...)}`.

    Args:
        shape: Of one example, with None for an axis whose length varies: `()`
            for a class, `(None, 768)` for a sequence.
        dtype: `"float32"`, `"int32"` or `"bool"`.
        null: What says nothing, for label dropout and classifier-free
            guidance: a number, or an array or `keras.Variable` of `shape` (the
            embedding of an empty caption, an untrained weight of the network).
            None if nothing does; then it is never left out.
        num_classes: For `"int32"`: 0..num_classes - 1 is allowed.
        mask: Name of the input, a `"bool"` one, that says which entries of the
            first axis count. If none do, that says nothing.

    Raises:
        ValueError: If an argument is none of these, or they disagree.

    Example:

    >>> caption = {
    ...     "context": Condition((None, 768), mask="context_mask"),
    ...     "context_mask": Condition((None,), "bool", null=False),
    ...     "pooled": Condition((768,), null=0.0),
    ... }
    """

    def __init__(
        self,
        shape: Any = (),
        dtype: str = "float32",
        *,
        null: Any = None,
        num_classes: int | None = None,
        mask: str | None = None,
    ):
        self.shape = _as_shape(shape)
        self.dtype = checks.check_choice("dtype", dtype, DTYPES)
        if num_classes is not None:
            num_classes = checks.check_positive_integer(
                "num_classes", num_classes, 2**31 - 2
            )
            if dtype != "int32" or self.shape:
                raise ValueError(
                    "`num_classes` must be given with dtype='int32' and "
                    f"shape=() alone. Received: dtype={dtype!r}, shape="
                    f"{self.shape}"
                )
        if mask is not None:
            mask = checks.check_string("mask", mask)
            if not self.shape:
                raise ValueError(
                    "`mask` must not be given with shape=(), which has no "
                    f"first axis. Received: mask={mask!r}"
                )
        self.num_classes, self.mask = num_classes, mask
        self.null = self._as_null(null)

    def _as_null(self, null: Any) -> Any:
        if null is None:
            return None
        if not isinstance(null, keras.Variable):
            null = checks.check_numbers("null", null, self.dtype)
        shape = tuple(null.shape)
        if shape and not _fits(shape, self.shape):
            raise ValueError(
                f"`null` must be a number, or of shape {self.shape}. "
                f"Received: shape {shape}"
            )
        return null

    @property
    def can_be_absent(self) -> bool:
        """Whether something says nothing here, by itself or by its mask."""
        return self.null is not None or self.mask is not None

    def absent(self, value: Tensor) -> Tensor:
        """What says nothing, of the shape of `value`, `(batch, *shape)`.

        Where the mask does so, or nothing can, that is `value` itself.
        """
        if self.null is None:
            return value
        null = ops.cast(ops.convert_to_tensor(self.null), value.dtype)
        return ops.broadcast_to(null, ops.shape(value))

    def default(self, num: int) -> np.ndarray | None:
        """What `num` examples have if nothing is given; None if they must."""
        if not self.can_be_absent:
            return None
        null = 0 if self.null is None else ops.convert_to_numpy(self.null)
        shape = [1 if size is None else size for size in self.shape]
        if np.ndim(null) == len(shape):
            shape = [*np.shape(null)]
        return np.broadcast_to(null, (num, *shape)).astype(self.dtype)

    def symbolic(self, batch: int | None = None, length: Any = None) -> Any:
        """A `keras.KerasTensor`, with `length` for the axes that vary."""
        shape = (length if size is None else size for size in self.shape)
        return keras.KerasTensor((batch, *shape), self.dtype)

    def check(self, name: str, value: Any) -> None:
        """Raises unless `value` is a batch of this.

        Args:
            name: What to call it in a message.
            value: What came.
        """
        if self.num_classes is not None:
            checks.check_labels(name, value, self.num_classes)
            return
        # A stored null stands in its place, and so says its length.
        shape = tuple(getattr(self.null, "shape", ())) or self.shape
        allowed = f"an array of {self.dtype}, {_axes(shape)}"
        if not checks.is_array(value) or not _fits(
            tuple(value.shape[1:]), shape
        ):
            raise checks.invalid(name, allowed, value)
        kind = str(value.dtype)
        good = "int" if self.dtype == "int32" else "float|int|bool"
        if not re.search(good, kind):
            raise checks.invalid(name, allowed, value)
        if "float" in kind and not np.all(
            np.isfinite(ops.convert_to_numpy(value))
        ):
            raise ValueError(
                f"`{name}` must be finite. Received: NaN or infinite numbers"
            )

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, for Keras' serialisation."""
        null = self.null
        if null is not None:
            null = ops.convert_to_numpy(null).tolist()
        return {
            "shape": self.shape,
            "dtype": self.dtype,
            "null": null,
            "num_classes": self.num_classes,
            "mask": self.mask,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The inverse of `get_config`."""
        return cls(**config)

    def __eq__(self, other: object) -> bool:
        return (
            type(other) is type(self)
            and self.get_config() == other.get_config()
        )

    def __hash__(self) -> int:
        return hash((type(self), self.shape, self.dtype))

    def __repr__(self) -> str:
        shape = f"shape={self.shape}, dtype={self.dtype!r}"
        classes = self.num_classes and f", num_classes={self.num_classes}"
        return f"Condition({shape}{classes or ''})"


Declared: TypeAlias = Mapping[str, Condition]
"""What a network is conditioned on, by name."""


def standard(
    num_classes: int | None = None, context_width: int | None = None
) -> dict[str, Condition]:
    """Classes, and a sequence with a mask: what `UViT` can be conditioned on.

    Args:
        num_classes: Number of classes, or None for none; the label
            `num_classes` says 'no class'.
        context_width: Width of the sequence's tokens, or None for none.
    """
    declared = {}
    if num_classes:
        declared["labels"] = Condition(
            (), "int32", null=num_classes, num_classes=num_classes
        )
    if context_width:
        declared["context"] = Condition(
            (None, context_width), mask="context_mask"
        )
        declared["context_mask"] = Condition((None,), "bool", null=False)
    return declared


def check_declared(name: str, declared: Any) -> dict[str, Condition]:
    """Raises unless `declared` is a dictionary of `Condition`s that agree.

    Args:
        name: The argument's name.
        declared: What came.
    """
    allowed = "a dictionary of name to `Condition`"
    if not isinstance(declared, Mapping):
        raise checks.invalid(name, allowed, declared)
    for key, condition in declared.items():
        if not isinstance(key, str) or not isinstance(condition, Condition):
            raise checks.invalid(name, allowed, declared)
        if key in RESERVED:
            raise ValueError(
                f"`{name}` must not name {', '.join(RESERVED)}, which every "
                f"network is given. Received: {key!r}"
            )
        mask = declared.get(condition.mask) if condition.mask else None
        if condition.mask and (mask is None or mask.dtype != "bool"):
            raise ValueError(
                f"`{name}` must declare the mask of {key!r}, a Condition of "
                f"dtype 'bool' named {condition.mask!r}. Received: "
                f"{sorted(declared)}"
            )
    return dict(declared)


def absent(declared: Declared, conditioning: Conditioning) -> Conditioning:
    """The conditioning of the same shapes that says nothing."""
    return {
        name: declared[name].absent(value)
        for name, value in conditioning.items()
    }


def dropped(
    declared: Declared, conditioning: Conditioning, drop: Tensor
) -> Conditioning:
    """The conditioning, which is left out as a whole for some examples.

    Args:
        declared: What the network takes.
        conditioning: Arrays by name.
        drop: For which examples, `(batch,)` of True and False.
    """
    without = absent(declared, conditioning)
    return {
        name: ops.where(expand(drop, value), without[name], value)
        for name, value in conditioning.items()
    }


def as_dictionary(y: Any) -> dict[str, Any]:
    """The conditioning that Keras hands over as `y`: labels or a dictionary."""
    if y is None:
        return {}
    return dict(y) if isinstance(y, dict) else {"labels": y}


def cast(declared: Declared, conditioning: Conditioning) -> Conditioning:
    """The conditioning in the dtypes that are declared."""
    return {
        name: ops.cast(value, declared[name].dtype)
        for name, value in conditioning.items()
    }


def check(declared: Declared, y: Any, num: int, name: str = "") -> None:
    """Raises unless `y` is the conditioning of `num` examples.

    Args:
        declared: What the network takes.
        y: Labels or dictionary, as `fit` takes them.
        num: Number of examples.
        name: What to call the data in a message; empty if their own names do.
    """

    def part(key):
        return f"{name} ({key})" if name else key

    given = as_dictionary(y)
    unknown = sorted(set(map(str, given)) - {*declared, "labels"})
    if unknown:
        raise ValueError(
            f"`{part('y')}` must be made of {[*declared]}, what the network "
            f"takes. Received: {unknown} besides"
        )
    if "labels" not in declared:
        checks.check_labels(part("labels"), given.get("labels"), None)
    for key, condition in declared.items():
        value = given.get(key)
        if value is None and condition.num_classes is None:
            raise ValueError(
                f"`{part(key)}` must be given: the network takes "
                f"{[*declared]}, in a dictionary by name. Received: "
                f"{checks.describe(value)}"
            )
        condition.check(part(key), value)
    for key, condition in declared.items():
        mask = condition.mask
        if mask and given[mask].shape[:2] != given[key].shape[:2]:
            raise ValueError(
                f"`{part(mask)}` must be an array of shape (batch, length) = "
                f"{tuple(given[key].shape[:2])}, as the {key} is. Received: "
                f"{checks.describe(given[mask])}"
            )
    for key, value in given.items():
        if value is not None and value.shape[0] != num:
            raise ValueError(
                f"`{part(key)}` must have one entry per image. Received: "
                f"{num} images, {value.shape[0]} {key}"
            )


def completed(
    declared: Declared, given: dict[str, np.ndarray], num: int
) -> dict[str, np.ndarray]:
    """What `generate` takes of what it was given: the rest says nothing.

    Labels that are not given are 0, 1, ... in turn, and a mask is True.

    Args:
        declared: What the network takes.
        given: Arrays by name.
        num: Number of examples.

    Raises:
        ValueError: If something isn't as declared, or is lacking.
    """
    given, supplied = dict(given), {*given}
    for name, condition in declared.items():
        if name in supplied:
            continue
        owner = next((k for k, c in declared.items() if c.mask == name), None)
        if condition.num_classes:
            given[name] = np.arange(num, dtype="int32") % condition.num_classes
        elif owner in supplied:
            given[name] = np.ones(given[owner].shape[:2], "bool")
        else:
            default = condition.default(num)
            if default is None or condition.mask in supplied:
                raise ValueError(
                    f"`{name}` must be given: the network takes "
                    f"{[*declared]}. Received: {sorted(supplied) or None}"
                )
            given[name] = default
    check(declared, given, num)
    return {
        name: np.asarray(given[name]).astype(condition.dtype, copy=False)
        for name, condition in declared.items()
    }


def _as_shape(shape: Any) -> tuple[int | None, ...]:
    allowed = "a tuple of sizes of at least 1, or None where it varies"
    if not isinstance(shape, (list, tuple)):
        raise checks.invalid("shape", allowed, shape)
    try:
        return tuple(
            None if size is None else checks.check_positive_integer("", size)
            for size in shape
        )
    except ValueError:
        raise checks.invalid("shape", allowed, shape) from None


def _fits(shape: tuple, declared: tuple) -> bool:
    return len(shape) == len(declared) and all(
        theirs in (size, None) for size, theirs in zip(shape, declared)
    )


def _axes(shape: tuple) -> str:
    sizes = ("length" if size is None else str(size) for size in shape)
    return f"(batch, {', '.join(sizes)})" if shape else "(batch,)"
