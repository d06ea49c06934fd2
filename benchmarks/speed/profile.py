"""What JAX's profiler sees of an epoch of `fit`: who waits for whom.

Prints a JSON object: `python -m benchmarks.speed.profile`.
"""

import collections
import tempfile
from pathlib import Path

import jax
import keras

from benchmarks.speed.models import arrays, student
from benchmarks.speed.rows import emit, main

PRESET, BATCH, STEPS = "digits", 64, 40
STEP = "PjitFunction(train_step)"
EXECUTION = "ThunkExecutor::Execute"


def traced(run, folder):
    """What each thread did in a second run, by the threads' lines."""
    run()  # compiles
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would slow Python down
    with jax.profiler.trace(str(folder), profiler_options=options):
        run()
    (file,) = Path(folder).rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    (plane,) = (p for p in planes if p.name == "/host:CPU")
    return [
        [(e.name, e.start_ns, e.start_ns + e.duration_ns) for e in line.events]
        for line in plane.lines
    ]


def covered(spans):
    """Nanoseconds that lie in at least one span."""
    total, reached = 0, 0
    for begin, end in sorted(spans):
        total += max(0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def kind(name):
    """An operation's kind: `dot.186` is a `dot`."""
    return name.split(".")[0]


def measure(quick):
    model = student(PRESET, "distillation")
    model.compile(optimizer=keras.optimizers.Adam(1e-4))
    x, y = arrays(model, STEPS * BATCH)

    def epoch():
        model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)

    with tempfile.TemporaryDirectory() as folder:
        lines = traced(epoch, folder)
    (training,) = (
        line for line in lines if any(name == STEP for name, *_ in line)
    )
    calls = collections.Counter(name for name, *_ in training)
    steps = [begin for name, begin, _ in training if name == STEP]
    begun, last = min(steps), max(steps)
    # What reads a loss waits on threads of its own, behind the steps.
    waits = sum(
        name.endswith("::Await") and begin < last for name, begin, _ in training
    )
    executing = [
        (begin, end)
        for line in lines
        for name, begin, end in line
        if name == EXECUTION and begin >= begun
    ]
    span = max(end for _, end in executing) - begun
    spent = collections.Counter()
    for line in lines:
        for name, begin, end in line:
            # On XLA's threads, an operation stands within an execution.
            if line is not training and "::" not in name:
                spent[kind(name)] += end - begin
    emit(
        part="profile of fit",
        what=f"{PRESET}, batch {BATCH}, distillation, {STEPS} steps",
        transfers_to_the_device_per_step=calls["DevicePut"] / STEPS,
        waits_of_the_training_thread=waits,
        share_of_time_computing=covered(executing) / span,
        operations=", ".join(
            f"{name} {time / spent.total():.0%}"
            for name, time in spent.most_common(4)
        ),
    )


if __name__ == "__main__":
    main(measure)
