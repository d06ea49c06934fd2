"""Values that an argument may be given by mistake, and which are none.

What an argument allows is a `Domain`, which its annotation says; a short table
in `public_api` says the rest. A value outside of it is bad for certain. One
within it may still be bad, as one of a string's many is: it is either refused
as clearly, or it works.
"""

import collections.abc
import dataclasses
import functools
import inspect
import math
import os
import types
import typing
from pathlib import PurePath
from typing import Any

import keras
import numpy as np
from hypothesis import strategies as st

HUGE = 10**400  # beyond a float
VAST = 10**30  # beyond an int64


class Hostile:
    """Says nothing of itself, and can't be compared.

    But for `__iter__`: what a data set raises is its own to say.
    """

    def _refuse(self, *args):
        raise RuntimeError("hostile")

    __repr__ = __str__ = __eq__ = __bool__ = __len__ = _refuse
    __array__ = __float__ = __int__ = __index__ = _refuse
    __hash__ = object.__hash__


#: Tried for every argument.
EDGES: tuple = (
    *(None, True, False, np.True_, 0, -1, 1, 2, 3, VAST, HUGE, -HUGE),
    *(0.0, -0.5, 0.5, 1.0, 1.5, 1e300, math.nan, math.inf, -math.inf),
    *(np.int64(-1), np.int64(2), np.uint8(0), np.float64(0.25)),
    *(np.float32("nan"), np.float16("inf"), 1j, "", "x", "3", "\0", "é" * 50),
    *(b"", b"ab", [], (), [None], ["x"], [-1], [0.5], [True], (math.nan,)),
    *({}, {"x": 1}, set(), range(3), object(), Hostile(), Ellipsis, len),
    *(lambda: None, int, keras.Layer, keras, np.array(3), np.zeros(0)),
    *(np.ones((2, 2)), np.array(["x"]), np.array([None])),
)

_scalars = st.one_of(
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.floats(width=32).map(np.float32),
    st.integers(-128, 127).map(np.int8),
    st.integers(-(2**63), 2**63 - 1).map(np.int64),
    st.text(max_size=8),
    st.binary(max_size=8),
    st.complex_numbers(),
    st.booleans(),
    st.none(),
)
#: Generated besides.
VALUES = st.one_of(
    _scalars,
    st.lists(_scalars, max_size=4),
    st.lists(_scalars, max_size=4).map(tuple),
    st.dictionaries(st.text(max_size=4), _scalars, max_size=3),
    st.lists(st.floats(), max_size=4).map(np.array),
    st.lists(st.lists(st.integers(), max_size=2), max_size=2),
)


def kind(value: Any) -> str:
    """What a value is, in one word."""
    kinds = {
        (type(None),): "none",
        (bool, np.bool_): "bool",
        (int, np.integer): "int",
        (float, np.floating): "float",
        (str,): "str",
        (bytes,): "bytes",
        (type,): "class",
        (list, tuple, range): "list",
        (dict,): "dict",
        (np.ndarray,): "array",
        (PurePath,): "path",
    }
    for of, word in kinds.items():
        if isinstance(value, of):
            return word
    return "function" if callable(value) else "object"


@dataclasses.dataclass(frozen=True)
class Domain:
    """What an argument may be.

    Attributes:
        kinds: Kinds of value that may be good.
        low, high: The numbers that may be.
        free: Whether any string that is not empty may be.
        parts: The domain of a list's entries; None for any.
        length: Entries in a list, if there is but one number.
        empty: Whether a list, dictionary or array may be empty.
    """

    kinds: frozenset[str] = frozenset()
    low: float = math.nextafter(0, 1)
    high: float = math.inf
    free: bool = False
    parts: "Domain | None" = None
    length: int | None = None
    empty: bool = False

    def may_be(self, value: Any) -> bool:
        """Whether a value may be good, as far as one can know."""
        what = kind(value)
        if what not in self.kinds and not (
            what == "str" and "path" in self.kinds
        ):
            return False
        if what in ("int", "float"):
            return self.low <= value <= self.high and (
                what == "int" or math.isfinite(value)
            )
        if what == "str":
            return bool(value) and (
                "\0" not in value or "path" not in self.kinds
            )
        if what == "array":
            names = self.parts is not None and "str" in self.parts.kinds
            good = value.dtype.kind in ("U" if names else "biuf")
            return good and (self.empty or value.size > 0)
        if what == "dict":
            return self.empty or bool(value)
        if what == "list":
            if not value:
                return self.empty
            if self.length is not None and len(value) != self.length:
                return False
            return self.parts is None or all(map(self.parts.may_be, value))
        return True

    def needs_no_call(self, value: Any) -> bool:
        """Whether a value is good for certain, or only a call would tell.

        What a function does isn't known before training calls it.
        """
        kinds = "none", "bool", "function"
        return self.may_be(value) and kind(value) in kinds

    def __or__(self, other: "Domain") -> "Domain":
        return dataclasses.replace(
            self,
            kinds=self.kinds | other.kinds,
            low=min(self.low, other.low),
            parts=self.parts or other.parts,
            length=self.length or other.length,
        )


def of_annotation(annotation: Any) -> Domain | None:
    """What an annotation allows; None if it says nothing."""
    simple = {
        int: ("int",),
        float: ("int", "float"),
        bool: ("bool",),
        str: ("str",),
        type(None): ("none",),
        os.PathLike: ("path",),
        collections.abc.Callable: ("function",),
        collections.abc.Mapping: ("dict",),
        dict: ("dict",),
    }
    if annotation is Any or annotation is inspect.Parameter.empty:
        return None
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        domains = [of_annotation(part) for part in arguments]
        return (
            None
            if None in domains
            else functools.reduce(lambda one, other: one | other, domains)
        )
    if (origin or annotation) in simple:
        low = 1 if annotation is int else math.nextafter(0, 1)
        return Domain(frozenset(simple[origin or annotation]), low=low)
    if (origin or annotation) in (list, tuple, collections.abc.Sequence):
        parts = of_annotation(arguments[0]) if arguments else None
        fixed = origin is tuple and arguments and arguments[-1] is not Ellipsis
        length = len(arguments) if fixed else None
        return Domain(frozenset(["list"]), parts=parts, length=length)
    # Of a class: no value here is one of it.
    return Domain(frozenset(["instance"]))
