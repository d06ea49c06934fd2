"""Reads a compiled program: its operations, their cycles, what they send."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

_BYTES = {"pred": 1, "f8e4m3fn": 1, "f8e5m2": 1}
_BYTES |= {f"{kind}{bits}": bits // 8 for kind in "su" for bits in (8, 16, 32)}
_BYTES |= {"s64": 8, "u64": 8, "bf16": 2, "f16": 2, "f32": 4, "f64": 8}

_OPERATION = re.compile(
    r"^\s+(?:ROOT )?%(?P<name>\S+) = (?P<shape>\(.*?\)|\S+) (?P<kind>[a-z-]+)\("
)
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%(?P<name>\S+) \(.*\{$")
_ARRAY = re.compile(r"\b([a-z]+\d+[a-z0-9]*|pred)\[([\d,]*)\]")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_SOURCE = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(r"\bcalls=%([\w.-]+)")
# What is sent while others compute begins in a fusion that does nothing else.
_BEGUN = re.compile(
    r'\(%([\w.-]+)\), custom_call_target="AsyncCollectiveStart"'
)
# A loop, its number of runs, or where that is seen in its condition and body.
_LOOP = re.compile(r"\bcondition=%([\w.-]+), body=%([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LESS = re.compile(r" compare\(%([\w.-]+), %([\w.-]+)\), direction=LT")
_PART = re.compile(r" get-tuple-element\(%[\w.-]+\), index=(\d+)")
_TUPLE = re.compile(r" tuple\((.*?)\)")
_ADDED = re.compile(r" add\(%[\w.-]+, %([\w.-]+)\)")
_CONSTANT = re.compile(r" constant\((\d+)\)")
_GROUP = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]+)\}|mesh\[)")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?: \{([^}]*)\})?")

# Bytes that a chip sends, of n that share, for each byte of the result, on the
# path that takes least: reduce-scatter, then all-gather.
_SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}


# Lines of a computation, by what each gives a value to.
_Lines = dict[str, re.Match]


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a compiled program, on one chip.

    Args:
        source: Where it comes from: layers, then the operation in JAX.
        kind: What it is called in XLA.
        cycles: The compiler's estimate of its cycles, in all its runs.
        sent_bytes: What it sends to other chips, in all its runs.
        runs: How often it is run.
        meanwhile: Whether it sends while others compute, by the compiler's own
            schedule.
    """

    source: str
    kind: str
    cycles: int
    sent_bytes: float
    runs: int
    meanwhile: bool = False


def read(text: str, loop_runs: int = 1) -> list[Operation]:
    """The operations that a compiled program runs.

    Args:
        text: `as_text()` of what JAX has compiled.
        loop_runs: How often a loop runs whose number of runs only its
            arguments tell.

    Returns:
        Those with cycles, and those that communicate.
    """
    computations: dict[str, _Lines] = {}
    entry = lines = None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = computations.setdefault(match["name"], {})
            entry = match["name"] if match["entry"] else entry
        elif lines is not None and (match := _OPERATION.match(line)):
            lines[match["name"]] = match
    if entry is None:
        raise ValueError("`text` must be a compiled program: it has no ENTRY")
    return list(_operations(computations, entry, 1, loop_runs))


def _operations(
    computations: dict[str, _Lines], name: str, runs: int, loop_runs: int
) -> Iterator[Operation]:
    for match in computations[name].values():
        if loop := _LOOP.search(match.string):
            condition, body = (computations.get(n, {}) for n in loop.groups())
            number = runs * _loop_runs(match.string, condition, body, loop_runs)
            yield from _operations(computations, loop[2], number, loop_runs)
            continue
        begun = None
        if called := _CALLED.search(match.string):
            begun = _begun(computations.get(called[1], {}))
        match = begun or match
        line = match.string
        cycles, source = _CYCLES.search(line), _SOURCE.search(line)
        kind = match["kind"].removesuffix("-start")
        sent = 0.0
        if kind in _SENT:
            sent = _SENT[kind](_group_size(line)) * _bytes(match)
        if cycles or sent:
            yield Operation(
                _readable(source[1]) if source else kind,
                kind,
                runs * int(cycles[1]) if cycles else 0,
                runs * sent,
                runs,
                meanwhile=begun is not None,
            )


def _begun(lines: _Lines) -> re.Match | None:
    """What a fusion begins to send, if that is what it is for."""
    begun = (_BEGUN.search(match.string) for match in lines.values())
    return next((lines[match[1]] for match in begun if match), None)


def _loop_runs(line: str, condition: _Lines, body: _Lines, default: int) -> int:
    """What the loop says, or what its counter comes to, if that is known.

    The counter is a part of what goes round, which is less than a constant and
    to which another is added.
    """
    if trips := _TRIPS.search(line):
        return int(trips[1])

    def find(pattern, lines, name=None):
        found = lines.get(name or next(reversed(lines), None))
        return found and pattern.search(found.string)

    compared, parts = find(_LESS, condition), find(_TUPLE, body)
    part = compared and find(_PART, condition, compared[1])
    limit = compared and find(_CONSTANT, condition, compared[2])
    if not (part and limit and parts):
        return default
    counter = re.findall(r"%([\w.-]+)", parts[1])[int(part[1])]
    added = find(_ADDED, body, counter)
    step = added and find(_CONSTANT, body, added[1])
    return math.ceil(int(limit[1]) / int(step[1])) if step else default


def _bytes(match: re.Match) -> float:
    """Of an operation's result."""
    sizes = [
        _BYTES[dtype] * math.prod(map(int, filter(None, shape.split(","))))
        for dtype, shape in _ARRAY.findall(match["shape"])
        if dtype in _BYTES
    ]
    if match["kind"] in ("all-gather-start", "collective-permute-start"):
        return max(sizes)  # beside the result stands what went in
    return sum(sizes)


def _group_size(line: str) -> int:
    """Of how many chips each hears."""
    if mesh := _MESH.search(line):
        axes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        names = re.findall(r"'([^']+)'", mesh[2] or "")
        return math.prod(int(axes[name]) for name in names)
    if group := _GROUP.search(line):
        return int(group[1]) if group[1] else len(group[2].split(","))
    return 2


def _readable(source: str) -> str:
    """`jit(step)/transpose(jvp(net))/up_1_2/add`: `gradient: net/up_1_*/add`.

    Blocks of a stage are told apart by their last number; here they are one.
    """
    parts = re.split(r"/(?![^(]*\))", source)
    if parts[0].startswith("jit("):
        parts = parts[1:]
    way = ""
    if parts and parts[0].startswith("transpose("):
        way = "gradient: "
    elif parts and parts[0].startswith("jvp("):
        way = "forward: "
    names = [re.sub(r"^(?:\w+\()*(.*?)\)*$", r"\1", part) for part in parts]
    names = [re.sub(r"_\d+$", "_*", name) for name in names if name]
    return way + "/".join(names)


def by_source(operations: list[Operation]) -> list[tuple[str, int, int]]:
    """Source, number and cycles of the operations, the costliest first."""
    cycles: collections.Counter[str] = collections.Counter()
    count: collections.Counter[str] = collections.Counter()
    for operation in operations:
        cycles[operation.source] += operation.cycles
        count[operation.source] += operation.runs
    return [(source, count[source], n) for source, n in cycles.most_common()]


def sent_bytes(
    operations: list[Operation], meanwhile: bool = False
) -> dict[str, float]:
    """Bytes that a chip sends, by the kind of collective operation.

    Args:
        operations: What is run.
        meanwhile: Of those that send while others compute, or of those for
            which the chip waits.
    """
    sent: collections.Counter[str] = collections.Counter()
    for operation in operations:
        if operation.sent_bytes and operation.meanwhile == meanwhile:
            sent[operation.kind] += operation.sent_bytes  # type: ignore
    return dict(sent)
