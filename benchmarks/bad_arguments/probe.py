"""One call with one bad argument, and what came of it."""

import collections
import contextlib
import dataclasses
import io
import re
import signal
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from benchmarks.bad_arguments import values
from benchmarks.bad_arguments.public_api import Entry
from benchmarks.bad_arguments.starting import Started
from keras_mscm import checks

SECONDS = 10  # longer is a hang
GENERATED = 6  # values for each argument, besides `values.EDGES`

#: A `ValueError` that names the argument, what came and what is allowed.
CLEAR = "clear"
#: Another error, or one that doesn't say it.
UNCLEAR = "unclear"
#: A value that can't be right, and was taken.
SILENT = "silent"
#: It took all the time or memory.
CRASH = "crash"
#: A value that may be right, and worked.
WORKED = "worked"
# What a message may call an argument besides, an entry of it: in `y` there are
# labels, and here `{"x": 1}` is tried.
ALSO = {
    "y": ("labels",),
    "conditioning": ("x",),
    # What only a foreign network can tell.
    **dict.fromkeys(
        ("constants", "time_axes", "time_width"), ("network", "constant_x")
    ),
}
#: What must not be.
BAD = UNCLEAR, SILENT, CRASH


class Hanging(BaseException):
    """It takes too long."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one call.

    Attributes:
        entry: What was called.
        argument: The argument that was bad.
        value: What it was, in words.
        kind: One of the above.
        message: What was said.
    """

    entry: str
    argument: str
    value: str
    kind: str
    message: str

    def __str__(self) -> str:
        return (
            f"{self.kind}: {self.entry}({self.argument}={self.value}): "
            f"{self.message}"
        )


@contextlib.contextmanager
def _in_time() -> Iterator[None]:
    def late(*args):
        raise Hanging

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(entry: Entry, argument: str, value: Any) -> Outcome:
    """Calls with a value in the place of one good argument."""
    may_be = argument in entry.domains and entry.domains[argument].may_be(value)
    shown = checks.describe(value)

    def outcome(kind, message=""):
        message = " ".join(str(message).replace("\0", "").split())
        return Outcome(entry.name, argument, shown, kind, message[:300])

    try:
        with (
            _in_time(),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            made = entry.call(**{**entry.good(), argument: value})
            if entry.use is not None:
                entry.use(made)
    except Started:
        return outcome(WORKED) if may_be else outcome(SILENT, "started")
    except Hanging:
        return outcome(CRASH, f"takes more than {SECONDS} s")
    except (MemoryError, RecursionError) as error:
        return outcome(CRASH, type(error).__name__)
    except Exception as error:
        said = str(error)
        if _is_clear(error, said, entry, argument):
            return outcome(CLEAR, said)
        return outcome(UNCLEAR, f"{type(error).__name__}: {said}")
    return outcome(WORKED) if may_be else outcome(SILENT, "accepted")


def _is_clear(error: Exception, said: str, entry: Entry, argument: str) -> bool:
    names = "|".join(map(re.escape, (argument, *ALSO.get(argument, ()))))
    named = re.search(rf"\b({names})\b", said)
    if argument not in entry.domains:
        # By Python, and by Keras for its own classes.
        unknown = re.search("unexpected keyword|not recognized|Unrec", said)
        return bool(named and unknown) or "takes no arguments" in said
    # What is missing on disk is the one other error that is documented.
    kind = type(error) in (ValueError, FileNotFoundError)
    return kind and bool(named) and "Received" in said


def probe(
    entry: Entry,
    each: Callable[[Outcome], None],
    generated: int = GENERATED,
    every: int = 1,
) -> None:
    """Tries every argument with every edge value, and with generated ones.

    Args:
        entry: What to call.
        each: Told of every outcome.
        generated: Generated values for each argument.
        every: Of the edge values each how many-th is tried, others for each
            argument.
    """
    each(attempt(entry, "no_such_argument", 1))
    every *= entry.every
    for number, (argument, domain) in enumerate(entry.domains.items()):
        for value in values.EDGES[number % every :: every]:
            if not domain.needs_no_call(value):
                each(attempt(entry, argument, value))
    examples = generated * len(entry.domains) // entry.every
    if not examples:
        return

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(sorted(entry.domains)), values.VALUES)
    def generate(argument, value):
        # Of what may be right there is enough above, and it takes longer.
        if not entry.domains[argument].may_be(value):
            each(attempt(entry, argument, value))

    generate()


def count(outcomes: list[Outcome]) -> dict[str, int]:
    """How many there are of each kind."""
    kinds = collections.Counter(outcome.kind for outcome in outcomes)
    inputs = {"inputs": len(outcomes)}
    return inputs | {
        kind: kinds[kind] for kind in (CLEAR, WORKED, UNCLEAR, SILENT, CRASH)
    }
