"""Counts what a compiled training step computes: nothing is done twice.

By XLA's own count of the step's floating-point operations, on JAX, against the
sum of its parts compiled alone: a forward pass for the reference (and for the
teacher; of twice the batch with guidance), and one with its gradient.
"""

import math
import re

import jax
import keras
from keras import ops

from benchmarks.speed.models import arrays, state_of, student
from benchmarks.speed.rows import emit, main

BATCH = 32


def flops(function, *args):
    """XLA's count for a function of arrays."""
    analysis = jax.jit(function).lower(*args).compile().cost_analysis()
    return analysis["flops"]


def parts(model, x, y, guided):
    """Counts of a forward pass, the teacher's, and one with its gradient."""
    network = model.network
    logsnr = ops.zeros((len(x),))
    weights = [v.value for v in network.trainable_variables]
    fixed = [v.value for v in network.non_trainable_variables]

    def forward(weights, fixed, x, logsnr, y, training):
        scope = keras.StatelessScope(
            state_mapping=[
                *zip(network.trainable_variables, weights),
                *zip(network.non_trainable_variables, fixed),
            ]
        )
        with scope:
            inputs = {"z": x, "logsnr": logsnr, "labels": y}
            if y is None:
                del inputs["labels"]
            return network(inputs, training=training)

    def loss(*args):
        return ops.sum(ops.square(forward(*args, True)))

    args = (weights, fixed, x, logsnr, y)
    twice = [ops.concatenate([a, a]) if a is not None else a for a in args[2:]]
    return {
        "reference": flops(lambda *a: forward(*a, True), *args),
        "teacher": flops(
            lambda *a: forward(*a, False),
            weights,
            fixed,
            *(twice if guided else args[2:]),
        ),
        "gradient": flops(jax.grad(loss), *args),
    }


def copied_weights(step, state, data):
    """Bytes of the state that the compiled step copies, the state given away.

    What goes through unchanged, as the teacher's weights do, need not move.
    """
    compiled = jax.jit(step, donate_argnums=0).lower(state, data).compile()
    entry = compiled.as_text().split("ENTRY")[1]
    parameters = set(re.findall(r"%?(\S+) = \S+ parameter\(", entry))
    copies = re.findall(r"= (\w+)\[([\d,]*)\]\S* copy\(%?([^)\s]+)\)", entry)
    return sum(
        4 * math.prod(map(int, filter(None, shape.split(","))))
        for _, shape, source in copies
        if source in parameters
    )


def count(preset, method, guidance_scale):
    model = student(preset, method, guidance_scale=guidance_scale)
    model.compile(optimizer=keras.optimizers.SGD(1e-4))
    x, y = arrays(model, BATCH)
    model.optimizer.build(model.trainable_variables)
    state = state_of(model)
    whole = flops(model.train_step, state, (x, y))
    part = parts(model, x, y, guidance_scale != 1)
    needed = part["reference"] + part["gradient"]
    if method == "distillation":
        needed += part["teacher"]
    teacher = model.teacher.network
    held = sum(v.value.nbytes for v in teacher.variables) if teacher else 0
    copied = copied_weights(model.train_step, state, (x, y))
    guided = f", guidance {guidance_scale}" if guidance_scale != 1 else ""
    emit(
        part="FLOPs of the step over its parts",
        what=f"{preset}, {method}{guided}",
        bound=1.02,
        ratio=whole / needed,
        gflops=whole / 1e9,
        copied_mib=copied / 2**20,
        teacher_mib=held / 2**20,
        closed_form_gflops=model.network.flops() * BATCH / 1e9,
    )


def measure(quick):
    for preset in ("grey28",) if quick else ("grey28", "colour64"):
        count(preset, "training", 1.0)
        count(preset, "distillation", 1.0)
    count("grey28", "distillation", 2.0)


if __name__ == "__main__":
    main(measure)
