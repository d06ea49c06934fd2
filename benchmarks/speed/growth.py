"""How time and memory grow: over batch, image size, width, K and devices.

On JAX, whose compiler tells the memory of a step. Steps are of consistency
distillation (K: of `generate`), around one point: 32x32 images, patches of 4,
width 128, batch 32.
"""

import gc
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import jax
import keras

from benchmarks.speed import timing
from benchmarks.speed.models import arrays, state_of
from benchmarks.speed.rows import emit, main
from keras_mscm import DiffusionModel, MultistepConsistencyModel, UViT

POINT = dict(batch=32, size=32, width=128)
OVER = {
    "batch": (8, 16, 32, 64),
    "size": (16, 32, 48),
    "width": (64, 128, 256),
}
DEVICES = (1, 2, 4, 8)


def make(size, width, student_steps=8):
    network = UViT(
        image_shape=(size, size, 3),
        patch_size=4,
        widths=(width,),
        depths=(4,),
        attention=True,
        embedding_width=128,
    )
    model = MultistepConsistencyModel.from_teacher(
        DiffusionModel(network), student_steps=student_steps, teacher_steps=64
    )
    model.compile(optimizer=keras.optimizers.Adam(1e-4))
    return model


def temporaries(model, batch):
    """Bytes that a step needs besides its state, by the compiler."""
    images, labels = arrays(model, batch)
    step = jax.jit(model.train_step, donate_argnums=0)
    compiled = step.lower(state_of(model), (images, labels)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def step_seconds(model, batch, steps=3):
    """The median of several epochs, each over its number of steps."""
    images, _ = arrays(model, steps * batch)

    def epoch():
        model.fit(images, batch_size=batch, verbose=0)

    epoch()
    epoch()  # on one device JAX compiles again for its own outputs
    return statistics.median(timing.seconds(epoch) for _ in range(2)) / steps


def over(axis):
    for value in OVER[axis]:
        point = {**POINT, axis: value}
        model = make(point["size"], point["width"])
        flops = 5 * model.network.flops() * point["batch"]
        emit(
            part="growth",
            what=f"over {axis}",
            axis=axis,
            value=value,
            gflop=flops / 1e9,
            milliseconds=1000 * step_seconds(model, point["batch"]),
            temporary_mib=temporaries(model, point["batch"]) / 2**20,
        )


def over_steps():
    for num_steps in (1, 2, 4, 8, 16):
        model = make(POINT["size"], POINT["width"], num_steps)

        def run(model=model):
            model.generate(32, batch_size=32, seed=0)

        run()
        seconds = statistics.median(timing.seconds(run) for _ in range(5))
        emit(
            part="growth",
            what="over K, generate",
            axis="K",
            value=num_steps,
            gflop=num_steps * model.network.flops() * 32 / 1e9,
            milliseconds=1000 * seconds,
        )


def on_devices():
    """One of `DEVICES`, in this process: the same global batch on all."""
    distribution = keras.distribution.DataParallel()
    keras.distribution.set_distribution(distribution)
    model = make(POINT["size"], POINT["width"])
    emit(
        part="growth",
        what="over virtual devices, which share the cores",
        axis="devices",
        value=len(jax.devices()),
        milliseconds=1000 * step_seconds(model, POINT["batch"]),
    )


def over_devices():
    for count in DEVICES:
        flags = f"--xla_force_host_platform_device_count={count}"
        subprocess.run(
            [sys.executable, "-m", __spec__.name],
            env={**os.environ, "XLA_FLAGS": flags, "GROWTH_DEVICES": "1"},
            check=True,
        )


def peak_memory():
    """The peak of a process that trains, over what was computed.

    Beyond what the process has before: frameworks and their compiled code take
    half a GiB whatever the model, so a tiny one is trained first.
    """
    tiny = make(16, 64)
    tiny.fit(arrays(tiny, 8)[0], batch_size=8, verbose=0)
    del tiny
    gc.collect()
    before = _resident()
    model = make(64, 1024)
    batch = 8
    images, _ = arrays(model, 2 * batch)
    held = sum(v.nbytes for part in state_of(model) for v in part)
    computed = held + temporaries(model, batch) + images.nbytes
    gc.collect()  # the diffusion model that the student was made from
    _forget_peak()
    model.fit(images, batch_size=batch, verbose=0)
    peak = _peak() - before
    emit(
        part="peak memory of fit over computed",
        what=f"width 1024, 256 tokens, batch {batch}",
        bound=1.2,
        ratio=peak / computed,
        measured_mib=peak / 2**20,
        weights_and_state_mib=held / 2**20,
        computed_mib=computed / 2**20,
    )


def _status(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _resident():
    return _status("VmRSS")


def _peak():
    return _status("VmHWM")


def _forget_peak():
    """The peak from here on, and not that of the compiler."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(quick):
    if os.environ.get("GROWTH_DEVICES"):
        on_devices()
        return
    peak_memory()
    if quick:
        return
    for axis in OVER:
        over(axis)
    over_steps()
    over_devices()


if __name__ == "__main__":
    main(measure)
