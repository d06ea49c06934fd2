"""What saves memory in training, and what it costs in time.

Command:   python -m benchmarks.memory
Writes:    benchmarks/memory.md

A step of consistency distillation with the network of the preset colour64, on
32 images: in float32, in mixed_bfloat16, with rematerialised blocks, with the
gradient accumulated over 4 batches of 8, and all at once. On JAX, whose
compiler tells how much memory a step needs besides the state that it is given.
Every setting runs in a process of its own. Its time is CPU time, which other
work on the machine changes little. What a pass of the network keeps for the
gradient is told by PyTorch, with and without rematerialisation. The same
settings on TPUs, with more images, are the planner's (`pip install
'keras-mscm[tpu]'`).
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np

from benchmarks.speed.__main__ import circumstances
from benchmarks.speed.models import arrays, state_of
from benchmarks.speed.rows import emit
from benchmarks.tables import markdown
from keras_mscm import DiffusionModel, MultistepConsistencyModel, UViT

PRESET, IMAGES = "colour64", 32
TOPOLOGY, IMAGES_ON_TPUS = "v5e:2x2", 1024
SETTINGS = {
    "float32": {},
    "mixed_bfloat16": {"dtype": "mixed_bfloat16"},
    "remat": {"remat": True},
    "accumulation over 4": {"batches": 4},
    "remat, accumulation over 4": {"remat": True, "batches": 4},
    "mixed_bfloat16, remat, accumulation over 4": {
        "dtype": "mixed_bfloat16",
        "remat": True,
        "batches": 4,
    },
}


def measure(what, dtype="float32", remat=False, batches=1):
    """Prints a row: of one update, on `IMAGES` images in so many batches."""
    network = UViT.from_preset(
        PRESET, load_weights=False, dtype=dtype, remat=remat
    )
    model = MultistepConsistencyModel.from_teacher(
        DiffusionModel(network), student_steps=8, teacher_steps=64
    )
    optimizer = keras.optimizers.Adam(
        1e-4, gradient_accumulation_steps=batches if batches > 1 else None
    )
    model.compile(optimizer=optimizer)
    import jax

    data = arrays(model, IMAGES // batches)
    state = state_of(model)
    held = sum(v.nbytes for part in state for v in part)
    step = jax.jit(model.train_step, donate_argnums=0)
    step = step.lower(state, data).compile()
    seconds = []
    for _ in range(4 * batches):
        begun = time.process_time()
        logs, state = step(state, data)
        jax.block_until_ready((logs, state))
        seconds.append(time.process_time() - begun)
    emit(
        what=what,
        temporaries_mib=step.memory_analysis().temp_size_in_bytes / 2**20,
        state_mib=held / 2**20,
        cpu_seconds=sum(seconds[batches:]) / 3,
    )


def kept(remat):
    """Prints MiB that a pass keeps for the gradient besides the weights."""
    import torch

    network = UViT.from_preset(PRESET, load_weights=False, remat=remat)
    weights = {v.value.data_ptr() for v in network.variables}
    sizes = {}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    rng = np.random.default_rng(0)
    z = rng.standard_normal((IMAGES, *network.image_shape), "float32")
    inputs = {"z": torch.as_tensor(z), "logsnr": torch.zeros(IMAGES)}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = network(inputs, training=True)
    emit(kept_mib=sum(sizes.values()) / 2**20, of=tuple(outputs.shape))


def planned(dtype="float32", remat=False, batches=1):
    """The planner's plan of one of the settings."""
    words = [f"--preset={PRESET}", f"--topology={TOPOLOGY}", f"--dtype={dtype}"]
    words += ["--method=distillation", "--json"]
    words += [f"--batch-size={IMAGES_ON_TPUS // batches}"]
    words += ["--remat"] if remat else []
    if batches > 1:
        words += [f"--gradient-accumulation-steps={batches}"]
    done = subprocess.run(
        [sys.executable, "-m", "keras_mscm.plan", *words],
        env={**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


def table_of_plans(plans):
    """Markdown: memory per chip, and seconds of an update."""
    libtpu = plans["float32"]["versions"]["libtpu"]

    def numbers(what):
        plan, batches = plans[what], SETTINGS[what].get("batches", 1)
        memory = plan["memory_gib"]
        seconds = batches * plan["seconds"]["step"]
        return memory["temporaries"], memory["arguments"], seconds

    first, rows = numbers("float32"), []
    for what in plans:
        temporaries, state, seconds = numbers(what)
        rows.append(
            [
                what,
                f"{temporaries:.2f}",
                f"{state:.2f}",
                f"{(temporaries + state) / sum(first[:2]):.2f}",
                f"{1000 * seconds:.0f}",
                f"{seconds / first[2]:.2f}",
            ]
        )
    head = ["", "temporaries, GiB per chip", "state, GiB per chip"]
    head += ["together, of float32", "an update, ms", "of float32"]
    lines = [
        "",
        f"The same on TPUs that aren't there, {TOPOLOGY}, {IMAGES_ON_TPUS} "
        "images to an update: the compiler's estimate by `python -m "
        f"keras_mscm.plan`, with libtpu {libtpu}.",
        "",
        *markdown(head, rows),
    ]
    return "\n".join(lines)


def table(rows, without, rematerialised):
    """Markdown, with what the numbers depend on."""
    told = circumstances()
    versions = ", ".join(
        f"{name} {told['versions'][name]}" for name in ("keras", "jax", "torch")
    )
    lines = [
        "# Memory of a training step",
        "",
        "From `python -m benchmarks.memory`, at commit "
        f"{told['commit']}. {told['date']}; {told['hardware']}, no "
        f"accelerator; Python {told['python']}; {versions}.",
        "",
        f"One update of consistency distillation on {IMAGES} images, network "
        f"of the preset {PRESET}. Temporaries: what a step needs besides its "
        "state and its batch, by XLA's `memory_analysis()`. State: weights of "
        "network, moving average and teacher, Adam's moments, accumulated "
        "gradients. Time: of an update, on both cores together.",
        "",
    ]
    first, cells = rows[0], []
    for row in rows:
        memory, plain = (
            r["temporaries_mib"] + r["state_mib"] for r in (row, first)
        )
        slower = row["cpu_seconds"] / first["cpu_seconds"]
        cells.append(
            [
                row["what"],
                f"{row['temporaries_mib']:.0f}",
                f"{row['state_mib']:.0f}",
                f"{memory / plain:.2f}",
                f"{row['cpu_seconds']:.2f}",
                f"{slower:.2f}",
            ]
        )
    head = ["", "temporaries, MiB", "state, MiB", "together, of float32"]
    head += ["CPU time, s", "of float32"]
    lines += [
        *markdown(head, cells),
        "On a CPU XLA computes the blocks twice and saves nothing by it: it "
        "seems to drop the barriers that rematerialisation consists of. "
        "PyTorch follows them: a pass of this network keeps "
        f"{without['kept_mib']:.0f} MiB for the gradient, with remat "
        f"{rematerialised['kept_mib']:.0f} MiB.",
    ]
    return "\n".join([*lines, ""])


def run(backend, what):
    """The row of one process."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", what],
        env={**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    print(done.stdout, end="", flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    if len(sys.argv) == 1:
        rows = [run("jax", what) for what in SETTINGS]
        text = table(rows, *(run("torch", str(on)) for on in (False, True)))
        plans = {what: planned(**how) for what, how in SETTINGS.items()}
        text += table_of_plans(plans)
        Path(__file__).with_suffix(".md").write_text(text)
    elif sys.argv[1] in SETTINGS:
        measure(sys.argv[1], **SETTINGS[sys.argv[1]])
    else:
        kept(remat=sys.argv[1] == "True")


if __name__ == "__main__":
    main()
