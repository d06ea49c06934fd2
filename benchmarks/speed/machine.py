"""How near training and sampling come to the machine's matrix products."""

import statistics
import time

import keras
import numpy as np
from keras import ops

from benchmarks.speed import timing
from benchmarks.speed.models import arrays, student
from benchmarks.speed.rows import emit, main
from keras_mscm import backend

SIZE = 4096


def peak():
    """FLOP/s of a float32 product of square matrices, the best of five."""
    a = np.random.default_rng(0).random((SIZE, SIZE), dtype="float32")
    a = ops.convert_to_tensor(a)
    product = backend.compile_inference(lambda a: ops.matmul(a, a), [])
    if keras.backend.backend() == "tensorflow":
        # Faster than XLA's.
        import tensorflow as tf

        product = tf.function(lambda a: tf.matmul(a, a))

    def run():
        ops.convert_to_numpy(product(a)[0, 0])

    run()
    return 2 * SIZE**3 / min(timing.seconds(run) for _ in range(5))


class Steps(keras.callbacks.Callback):
    """The time at the end of each step."""

    async_safe = False

    def __init__(self):
        super().__init__()
        self.times = []

    def on_train_batch_end(self, batch, logs=None):
        float(logs["loss"])  # computed by now
        self.times.append(time.perf_counter())


def training(preset, batch_size, method, steps=7):
    """FLOP/s of `fit`, and seconds of a step."""
    model = student(preset, method)
    model.compile(optimizer=keras.optimizers.Adam(1e-4))
    x, y = arrays(model, steps * batch_size)
    watch = Steps()
    model.fit(x, y, batch_size=batch_size, verbose=0, callbacks=[watch])
    seconds = statistics.median(np.diff(watch.times[1:]))
    evaluations = {"training": 4, "distillation": 5}[method]
    flops = evaluations * model.network.flops() * batch_size
    return flops / seconds, seconds


def sampling(preset, batch_size, num_steps=8):
    """FLOP/s of `generate`, and seconds of a call."""
    model = student(preset, "training", num_steps)

    def run():
        model.generate(batch_size, batch_size=batch_size, seed=0)

    run()
    seconds = statistics.median(timing.seconds(run) for _ in range(3))
    flops = num_steps * model.network.flops() * batch_size
    return flops / seconds, seconds


def measure(quick):
    highest = peak()
    emit(part="matrix product", what=f"{SIZE}^3", gflops=highest / 1e9)
    sizes = [("grey28", 128), ("colour64", 32)]
    if not quick:
        sizes += [("digits", 128), ("wide28", 128), ("wide64", 32)]
    for preset, batch_size in sizes:
        measured = {
            "CT step": training(preset, batch_size, "training"),
            "CD step": training(preset, batch_size, "distillation"),
            "generate, K = 8": sampling(preset, batch_size),
        }
        for what, (flops, seconds) in measured.items():
            emit(
                part="share of the matrix product",
                what=f"{preset}, batch {batch_size}, {what}",
                preset=preset,
                kind=what,
                gflops=flops / 1e9,
                share=flops / highest,
                milliseconds=1000 * seconds,
                images_per_second=batch_size / seconds,
            )


if __name__ == "__main__":
    main(measure)
