"""Values that somebody passes by mistake, and what a call makes of them."""

import contextlib
import inspect
import signal
import traceback
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

BAD = {
    "None": None,
    "True": True,
    "False": False,
    "nan": float("nan"),
    "inf": float("inf"),
    "-inf": float("-inf"),
    "np.nan": np.float32("nan"),
    "-1": -1,
    "0": 0,
    "0.5": 0.5,
    "2.5": 2.5,
    "-0.5": -0.5,
    "10**30": 10**30,
    "1j": 1j,
    "words": "words",
    "empty": "",
    "bytes": b"words",
    "null": "a\0b",
    "[]": [],
    "()": (),
    "{}": {},
    "[None]": [None],
    "['a']": ["a"],
    "(0, 0, 0)": (0, 0, 0),
    "array": np.array([0.5, np.nan]),
    "objects": np.array([None, "a"]),
    "object": object(),
    "lambda": lambda *args: None,
    "class": int,
    "module": np,
}

#: Of each kind of argument, which of them it allows.
KINDS = {
    "integer from 1": (),
    "integer from 0": ("0",),
    "number": ("-1", "0", "0.5", "2.5", "-0.5"),
    "number from 0": ("0", "0.5", "2.5"),
    "number above 0": ("0.5", "2.5"),
    "number from 1": ("2.5",),
    "in [0, 1]": ("0", "0.5"),
    "in [0, 1)": ("0", "0.5"),
    "seed": ("0", "None"),
    "boolean": ("True", "False"),
    "function": ("lambda",),
    "object": (),
    "text": ("words", "null"),
    "path": ("words",),
    # What is taken as it comes, because only the run can tell.
    "free": tuple(BAD),
}


@dataclass
class Call:
    """A public call, with arguments that it takes.

    Args:
        function: What is called, by keywords.
        good: Arguments of which nothing is bad.
        kinds: Of each argument its kind, a name in `KINDS`, and which bad
            values it allows besides. None is allowed where it is the default.
        like: What says the defaults, if `function` doesn't.
    """

    function: object
    good: dict
    kinds: dict = field(default_factory=dict)
    like: object = None

    def allowed(self, name):
        kind = self.kinds[name]
        kind, *besides = (kind,) if isinstance(kind, str) else kind
        parameter = inspect.signature(self.like or self.function)
        parameter = parameter.parameters.get(name)
        if parameter is not None and parameter.default is None:
            besides.append("None")
        return {*KINDS[kind], *besides}


class Hang(BaseException):
    """It took too long."""


@contextlib.contextmanager
def at_most(seconds):
    def stop(number, frame):
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(call, name, value):
    """What comes of a bad value: clear, unclear, silent or crash; and why."""
    try:
        with at_most(30):
            call.function(**{**call.good, name: value})
    except ValueError as error:
        text = str(error)
        if f"`{name}" in text and "Received" in text:
            return "clear", ""
        return "unclear", f"ValueError: {text[:150]}"
    except Hang:
        return "crash", "took 30 seconds"
    except Exception as error:
        *_, last = traceback.extract_tb(error.__traceback__)
        place = f"{last.filename.split('/')[-1]}:{last.lineno}"
        return "unclear", f"{type(error).__name__} at {place}: {error}"[:150]
    return "silent", ""


def survey(calls):
    """Counts outcomes over all calls, arguments and bad values.

    Returns:
        A `Counter` of outcomes, and the offenders.
    """
    counts, offenders = Counter(), []
    for title, call in calls.items():
        for name in call.kinds:
            for key, value in BAD.items():
                if key in call.allowed(name):
                    continue
                counts["tried"] += 1
                found, why = outcome(call, name, value)
                counts[found] += 1
                if found != "clear":
                    offenders.append(f"{found}: {title}({name}={key}) {why}")
    return counts, offenders
