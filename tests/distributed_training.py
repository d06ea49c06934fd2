"""Trains on several devices, in a process of its own: devices count once.

Called with a JSON file of {"backend", "devices", "cases", ...}. Each case
trains the same student from the same seed, and writes what came of it beside
the file.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

PLAN = Path(sys.argv[1])
plan = json.loads(PLAN.read_text())
os.environ["KERAS_BACKEND"] = plan["backend"]
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count={plan['devices']} "
    "--xla_backend_optimization_level=0"
)
if plan["backend"] == "tensorflow":
    import tensorflow as tf

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * plan["devices"],
    )

import keras  # noqa: E402
import numpy as np  # noqa: E402

from keras_mscm import (  # noqa: E402
    DiffusionModel,
    MultistepConsistencyModel,
    UViT,
    datasets,
)
from keras_mscm.distribution import (  # noqa: E402
    UnevenModelParallel,
    fully_sharded,
    tensor_parallel,
)

BATCH, STEPS, SAVED_AFTER = 8, 5, 3
rng = np.random.default_rng(0)
IMAGES = rng.uniform(-1, 1, (BATCH * STEPS, 8, 8, 1)).astype("float32")
LABELS = np.arange(len(IMAGES)) % 3
NOISE = rng.standard_normal(IMAGES[:BATCH].shape).astype("float32")


def strategy(case):
    """What the case's model is to be made and trained under."""
    layout, number = case["layout"], case.get("devices", 1)
    if layout is None:
        return contextlib.nullcontext()
    if plan["backend"] == "tensorflow":
        devices = [f"CPU:{i}" for i in range(number)]
        return tf.distribute.MirroredStrategy(devices).scope()
    devices = keras.distribution.list_devices()[:number]
    ours = dict(auto_shard_dataset="process" not in plan)
    if layout == "data_parallel":
        return keras.distribution.DataParallel(devices=devices, **ours).scope()
    if layout == "fully_sharded":
        mesh = keras.distribution.DeviceMesh((number,), ["batch"], devices)
        layout_map = fully_sharded(mesh)
    else:
        shape = (max(number // 4, 1), min(number, 4))
        axes = ["batch", "model"]
        mesh = keras.distribution.DeviceMesh(shape, axes, devices)
        layout_map = tensor_parallel(mesh)
    if case.get("uneven"):
        kind = UnevenModelParallel
    else:
        kind = keras.distribution.ModelParallel
    return kind(layout_map=layout_map, **ours).scope()


def make_student(case):
    """A student with dropout and, if it is to have one, a teacher."""
    transformer_only = plan["backend"] == "tensorflow"
    network = UViT(
        image_shape=IMAGES.shape[1:],
        **(
            dict(widths=(32,), depths=(1,), attention=True)
            if transformer_only
            else dict(
                widths=(12 if case.get("uneven") else 16, 32),
                depths=(1, 1),
                attention=(False, True),
            )
        ),
        num_classes=3,
        head_width=8,
        embedding_width=32,
        dropout=0.2,
        seed=1,
    )
    # From a new network, which says nothing, nothing is learnt but the end.
    numbers = np.random.default_rng(1)
    for weight in network.trainable_variables:
        fan_in = np.prod(weight.shape[:-1])
        scale = fan_in**-0.5 if weight.name == "kernel" else 0.1
        weight.assign(scale * numbers.standard_normal(weight.shape))
    teacher = DiffusionModel(network, label_dropout=0.1, seed=1)
    student = MultistepConsistencyModel.from_teacher(
        teacher,
        student_steps=2,
        teacher_steps=8,
        method=case["method"],
        label_dropout=0.1,
        ema_half_life=40.0,
        seed=2,
    )
    student.compile(
        # An epsilon above what rounding makes of gradients that are zero.
        keras.optimizers.Adam(1e-3, epsilon=1e-4),
        jit_compile=plan["backend"] == "jax",
    )
    return student, teacher


def numpy(variables):
    return [keras.ops.convert_to_numpy(v) for v in variables]


def share_of(variables):
    """Of these, how much lies on the device that holds most."""
    held = {}
    for variable in variables:
        for shard in variable.value.addressable_shards:
            device = shard.device.id
            held[device] = held.get(device, 0) + shard.data.size
    return max(held.values()) / sum(np.prod(v.shape) for v in variables)


class Losses(keras.callbacks.Callback):
    """The loss of every batch."""

    def __init__(self):
        super().__init__()
        self.sums = [0.0]

    def on_train_batch_end(self, batch, logs=None):
        self.sums.append(logs["loss"] * (batch + 1))  # Keras gives the mean


def of_this_process(batches):
    """Of each batch, `(steps, batch, ...)`, this process' part."""
    if "process" not in plan:
        return batches
    return np.split(batches, plan["processes"], axis=1)[plan["process"]]


def fit(student, steps):
    """Losses of training on these of the batches."""
    images, labels = (
        array.reshape(STEPS, BATCH, *array.shape[1:])[steps]
        for array in (IMAGES, LABELS)
    )
    images, labels = of_this_process(images), of_this_process(labels)
    losses = Losses()
    student.fit(
        images.reshape(-1, *images.shape[2:]),
        labels.reshape(-1),
        batch_size=images.shape[1],
        shuffle=False,
        verbose=0,
        callbacks=[losses],
    )
    return np.diff(losses.sums)


def run(case):
    """Trains, or goes on with what another case has saved."""
    results, saved = {}, PLAN.with_name(f"{case['method']}.keras")
    with strategy(case):
        student, teacher = make_student(case)
        losses = []
        if case.get("resume"):
            student = keras.saving.load_model(saved)
            if student.needs_teacher:
                student.attach_teacher(teacher)
        else:
            losses.append(fit(student, slice(0, SAVED_AFTER)))
            if case.get("save"):
                student.save(saved)
        losses.append(fit(student, slice(SAVED_AFTER, None)))
        results["losses"] = np.concatenate(losses)
        parts = {
            "network": student.network.trainable_variables,
            "average": student.ema_network.weights,
            "optimizer": student.optimizer.variables,
            "teacher": student.teacher.network.weights
            if student.needs_teacher
            else [],
        }
        if case.get("evaluate"):
            images = of_this_process(IMAGES[None, :BATCH])
            labels = of_this_process(LABELS[None, :BATCH])
            results["evaluated"] = student.evaluate(
                images[0], labels[0], batch_size=len(images[0]), verbose=0
            )
            results["images"] = student.generate(
                noise=NOISE, labels=LABELS[:BATCH]
            )
        if plan["backend"] == "jax":
            for name, variables in parts.items():
                if variables:
                    results[f"share_{name}"] = share_of(variables)
        for name, variables in parts.items():
            if not case.get("unreadable"):
                for i, value in enumerate(numpy(variables)):
                    results[f"weight_{name}_{i}"] = value
    np.savez(PLAN.with_name(f"{case['name']}.npz"), **results)


def refusals():
    """What is said of a model made before its distribution, and of a batch."""
    for made_within in (False, True):
        everywhere = keras.distribution.DataParallel()
        with everywhere.scope() if made_within else contextlib.nullcontext():
            network = UViT(
                image_shape=(8, 8, 1),
                widths=(16,),
                depths=(1,),
                attention=True,
                head_width=8,
            )
            model = DiffusionModel(network)
            model.compile("sgd")
        stream = datasets.from_arrays(IMAGES[:36], batch_size=32)
        for data in [IMAGES[:36], stream] if made_within else [IMAGES[:36]]:
            with everywhere.scope():
                try:
                    model.fit(data, verbose=0)
                except ValueError as error:
                    yield str(error)


if "process" in plan:
    keras.distribution.initialize(
        plan["address"], plan["processes"], plan["process"]
    )
for case in plan["cases"]:
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    run(case)
if plan.get("refusals"):
    keras.utils.clear_session()
    said = [*refusals()]
    PLAN.with_name("refusals.json").write_text(json.dumps(said))
