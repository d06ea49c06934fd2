"""What `fit` and `generate` cost beyond the mathematics: ours over bare.

Prints a JSON object a line: `python -m benchmarks.speed.overhead [--quick]`.
"""

import functools
import time

import keras
import numpy as np

from benchmarks.speed import bare, timing
from benchmarks.speed.models import arrays, student
from benchmarks.speed.rows import emit, main

# Compiling Keras' layers takes PyTorch minutes, and when it was tried what came
# out was no faster.
SLOW_TO_COMPILE = ("compile",)


class Epoch(keras.callbacks.Callback):
    """Times an epoch from its first step to its last result."""

    async_safe = True  # Keras waits for no step

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 0:
            self.begun = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds = time.perf_counter() - self.begun


def best(runs, once):
    """The fastest of several bare versions, by one call each after another."""
    timed = {}
    for kind, run in runs.items():
        if kind in SLOW_TO_COMPILE:
            continue
        call = functools.partial(once, run)
        call()  # compiles
        timed[kind] = min(timing.seconds(call) for _ in range(5))
    return min(timed, key=timed.get)


def fit(preset, batch_size, method, steps, rounds, bound):
    """One epoch of `fit` against the same steps in a loop.

    Both with the fastest compiler that there is for the bare step. On
    TensorFlow that may be XLA, which Keras leaves out on a CPU by default.
    """
    model = student(preset, method)
    x, y = arrays(model, steps * batch_size)
    runs = bare.step(model)

    def epoch():
        watch = Epoch()
        model.fit(
            x,
            y,
            batch_size=batch_size,
            shuffle=False,
            verbose=0,
            callbacks=[watch],
        )
        return watch.seconds

    def loop(run, steps=steps):
        for i in range(steps):
            part = slice(i * batch_size, (i + 1) * batch_size)
            loss = run(x[part], None if y is None else y[part])
        float(loss)

    kind = best(runs, lambda run: loop(run, 1))
    model.compile(
        optimizer=keras.optimizers.Adam(1e-4),
        jit_compile=True if kind == "XLA" else "auto",
    )
    result = timing.paired(epoch, lambda: loop(runs[kind]), rounds)
    emit(
        part="fit over bare steps",
        what=f"{preset}, batch {batch_size}, {method}, bare: {kind}",
        bound=bound,
        ratio=result["ratio"],
        milliseconds=1000 * result["seconds"] / steps,
    )


def generate(preset, num_steps, batch_size, rounds, bound):
    """`generate` against that many bare forward passes."""
    model = student(preset, "training", num_steps)
    shape = (batch_size, *model.image_shape)
    noise = np.random.default_rng(0).standard_normal(shape, dtype="float32")
    _, labels = arrays(model, batch_size)
    runs = {
        kind: bare.passes(run, model, num_steps, batch_size, labels)
        for kind, run in bare.forward(model).items()
        if kind not in SLOW_TO_COMPILE
    }

    def ours():
        model.generate(
            noise=noise, labels=labels, batch_size=batch_size, seed=0
        )

    ours()
    kind = best(runs, lambda run: run())
    repeats = max(1, min(100, int(0.2 / timing.seconds(ours))))

    def repeated(run):
        return lambda: [run() for _ in range(repeats)] and None

    result = timing.paired(repeated(ours), repeated(runs[kind]), rounds)
    extra = (result["seconds"] - result["bare_seconds"]) / repeats
    emit(
        part="generate over bare passes",
        what=f"{preset}, K = {num_steps}, batch {batch_size}, bare: {kind}",
        bound=bound,
        ratio=result["ratio"],
        milliseconds=1000 * result["seconds"] / repeats,
        extra_microseconds=1e6 * extra,
    )


def measure(quick):
    bound = 1.03 if keras.backend.backend() == "jax" else 1.05
    if quick:
        fit("grey28", 64, "training", 6, 5, bound)
        generate("grey28", 4, 16, 5, bound)
        return
    fit("digits", 64, "distillation", 40, 15, bound)
    fit("grey28", 64, "training", 6, 9, bound)
    for num_steps in (1, 4, 8):
        for batch_size in (1, 16, 256):
            rounds = 5 if batch_size == 256 else 15
            generate("grey28", num_steps, batch_size, rounds, bound)


if __name__ == "__main__":
    main(measure)
