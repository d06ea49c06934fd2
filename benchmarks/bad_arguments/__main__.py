"""Tries every argument of everything public with bad values.

    KERAS_BACKEND=torch python -m benchmarks.bad_arguments

Prints how many ended in an error that says it all ("clear"), in another one
("unclear"), in none ("silent") or not at all ("crash"), and each of those that
shouldn't be.
"""

import argparse
import collections
import contextlib
import os
import tempfile
import time
from pathlib import Path

import keras

from benchmarks.bad_arguments import probe
from benchmarks.bad_arguments.good_arguments import entries
from benchmarks.bad_arguments.starting import nothing_starts
from benchmarks.bad_arguments.world import World

MESSAGES = 3  # of one argument that are shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="part of a name")
    parser.add_argument(
        "--generated",
        type=int,
        default=probe.GENERATED,
        help="generated values for each argument",
    )
    parser.add_argument("--seconds", action="store_true", help="of each entry")
    options = parser.parse_args()
    outcomes: list[probe.Outcome] = []
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        os.chdir(folder)
        made = entries(World(Path(folder)))  # some of it is computed
        stack.enter_context(nothing_starts())
        for name, entry in made.items():
            if options.only in name:
                begin = time.perf_counter()
                probe.probe(entry, outcomes.append, options.generated)
                if options.seconds:
                    print(f"{time.perf_counter() - begin:7.2f} {name}")
        os.chdir("/")
    bad = [each for each in outcomes if each.kind in probe.BAD]
    grouped = collections.defaultdict(list)
    for each in bad:
        grouped[each.entry, each.argument, each.kind].append(each)
    for (entry, argument, kind), found in sorted(grouped.items()):
        values = dict.fromkeys(
            each.value.split(" of type")[0] for each in found
        )
        said = dict.fromkeys(each.message[:150] for each in found)
        print(f"{kind}: {entry}({argument}=) {len(found)} x, such as", end=" ")
        print(" | ".join(value[:20] for value in [*values][:12]))
        for message in [*said][:MESSAGES]:
            print(f"    -> {message}")
    counts = probe.count(outcomes)
    seconds = time.perf_counter() - began
    print(
        f"{keras.backend.backend()}: "
        + ", ".join(f"{counts[kind]:,} {kind}" for kind in counts)
        + f" in {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
