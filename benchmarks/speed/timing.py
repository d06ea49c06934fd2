"""Times two things in turn, as a machine's speed drifts."""

import statistics
import time


def seconds(run):
    """How long a call takes."""
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def paired(ours, bare, rounds):
    """Runs two functions in turn; compares each pair.

    Args:
        ours: Function without arguments; or of none that returns seconds.
        bare: What it is compared with.
        rounds: Pairs that count; one more goes before, which may compile.

    Returns:
        Median seconds of both, and the median over the pairs of their ratio.
    """
    pairs = []
    for i in range(rounds + 1):
        # Who goes first takes turns too.
        order = (ours, bare) if i % 2 else (bare, ours)
        taken = {run: _time(run) for run in order}
        pairs.append((taken[ours], taken[bare]))
    pairs = pairs[1:]
    return {
        "seconds": statistics.median(a for a, _ in pairs),
        "bare_seconds": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
    }


def _time(run):
    begun = time.perf_counter()
    told = run()
    return told if isinstance(told, float) else time.perf_counter() - begun
