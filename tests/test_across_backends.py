"""One file and one noise, the same images on every backend."""

import importlib.util
import os
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest

from keras_mscm import DiffusionModel, MultistepConsistencyModel, samplers

HERE = keras.backend.backend()
OTHERS = [
    name
    for name in ("jax", "tensorflow", "torch")
    if name != HERE and importlib.util.find_spec(name)
]

# What runs on the other backends: each samples with the files of this one,
# then trains on. It finds no backend but its own, as after a plain
# installation; Keras takes seconds to import TensorFlow where it can.
THERE = textwrap.dedent(
    """
    import sys
    from importlib.machinery import PathFinder

    folder, backend = sys.argv[1:]
    absent = {"jax", "tensorflow", "torch", "sklearn"} - {backend}
    find = PathFinder.find_spec
    PathFinder.find_spec = lambda name, *args: (
        None if name.split(".")[0] in absent else find(name, *args)
    )
    import keras
    import numpy as np
    from keras_mscm import samplers

    assert keras.backend.backend() == backend
    assert not absent & set(sys.modules)
    data = np.load(f"{folder}/data.npz")
    noise, labels = data["noise"], data["labels"]
    teacher = keras.saving.load_model(f"{folder}/teacher.keras")
    student = keras.saving.load_model(f"{folder}/student.keras")
    # As on a backend of its own: PyTorch's compiler takes minutes.
    assert student.jit_compile == (backend == "jax")
    common = {"noise": noise, "labels": labels}
    images = {
        "student": student.generate(**common),
        "teacher": teacher.generate(
            num_steps=6, sampler=samplers.ADDIM(), **common
        ),
    }

    for i, variable in enumerate(student.optimizer.variables):
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(variable), data[f"optimizer_{i}"]
        )
    student.attach_teacher(teacher)
    history = student.fit(noise.clip(-1, 1), labels, verbose=0).history
    assert np.isfinite(history["loss"][0])
    assert int(student.iteration) == int(student.optimizer.iterations) == 3
    after = student.generate(**common)
    assert 1e-5 < np.max(np.abs(after - images["student"])) < 0.5
    np.savez(f"{folder}/{backend}.npz", **images)
    """
)


def test_the_same_images(tiny_uvit, tmp_path):
    if not OTHERS:
        pytest.skip(f"no backend but {HERE} is installed")
    network = tiny_uvit(
        image_shape=(4, 4, 1),
        widths=(16, 16),
        depths=(1, 1),
        attention=(False, True),
        num_classes=3,
        dropout=0.1,
    )
    teacher = DiffusionModel(network)
    student = MultistepConsistencyModel.from_teacher(
        teacher, student_steps=2, teacher_steps=8
    )
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((4, 4, 4, 1)).astype("float32")
    labels = np.array([0, 1, 2, 0])
    student.compile(keras.optimizers.Adam(1e-3))
    student.fit(noise.clip(-1, 1), labels, epochs=2, verbose=0)
    teacher.save(tmp_path / "teacher.keras")
    student.save(tmp_path / "student.keras")
    optimizer = {
        f"optimizer_{i}": keras.ops.convert_to_numpy(variable)
        for i, variable in enumerate(student.optimizer.variables)
    }
    np.savez(tmp_path / "data.npz", noise=noise, labels=labels, **optimizer)

    # Both at once, beside what is sampled here.
    runs = {
        other: subprocess.Popen(
            [sys.executable, "-c", THERE, tmp_path, other],
            env={**os.environ, "KERAS_BACKEND": other},
            stderr=subprocess.PIPE,
            text=True,
        )
        for other in OTHERS
    }
    try:
        common = {"noise": noise, "labels": labels}
        here = {
            "student": student.generate(**common),
            "teacher": teacher.generate(
                num_steps=6, sampler=samplers.ADDIM(), **common
            ),
        }
        errors = {other: run.communicate()[1] for other, run in runs.items()}
    finally:
        for run in runs.values():
            run.kill()
    for other, run in runs.items():
        assert run.returncode == 0, f"{other}: {errors[other]}"
        there = np.load(tmp_path / f"{other}.npz")
        for name, images in here.items():
            assert np.mean(np.abs(images) < 1) > 0.5  # not all clipped
            np.testing.assert_allclose(
                there[name], images, atol=1e-4, err_msg=f"{other} {name}"
            )
