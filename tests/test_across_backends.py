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
OTHERS = [name for name in ("jax", "tensorflow", "torch") if name != HERE]

# What runs on the other backend: it samples with the files of this one, then
# trains on, and leaves a file of its own.
THERE = textwrap.dedent(
    """
    import sys
    import keras
    import numpy as np
    from keras_mscm import samplers

    folder = sys.argv[1]
    data = np.load(f"{folder}/data.npz")
    teacher = keras.saving.load_model(f"{folder}/teacher.keras")
    student = keras.saving.load_model(f"{folder}/student.keras")
    images = {}

    def sample(name):
        common = dict(noise=data["noise"], labels=data["labels"])
        images[f"{name} student"] = student.generate(**common)
        for sampler in (samplers.ddim, samplers.addim):
            images[f"{name} {sampler.__name__}"] = teacher.generate(
                num_steps=6, sampler=sampler, **common
            )

    sample("here")
    student.attach_teacher(teacher)
    student.fit(data["noise"].clip(-1, 1), data["labels"], verbose=0)
    assert int(student.iteration) == int(data["iteration"]) + 1
    sample("there")
    student.save(f"{folder}/back.keras")
    np.savez(f"{folder}/images.npz", **images)
    """
)


def sample(teacher, student, noise, labels):
    common = dict(noise=noise, labels=labels)
    images = {"student": student.generate(**common)}
    for sampler in (samplers.ddim, samplers.addim):
        images[sampler.__name__] = teacher.generate(
            num_steps=6, sampler=sampler, **common
        )
    return images


@pytest.mark.parametrize("other", OTHERS)
def test_the_same_images(other, tiny_uvit, tmp_path):
    if importlib.util.find_spec(other) is None:
        pytest.skip(f"{other} is not installed")
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
        teacher, 2, teacher_steps=8
    )
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((4, 4, 4, 1)).astype("float32")
    labels = np.array([0, 1, 2, 0])
    student.compile(keras.optimizers.Adam(1e-3))
    student.fit(noise.clip(-1, 1), labels, verbose=0)
    teacher.save(tmp_path / "teacher.keras")
    student.save(tmp_path / "student.keras")
    np.savez(
        tmp_path / "data.npz",
        noise=noise,
        labels=labels,
        iteration=int(student.iteration),
    )
    here = sample(teacher, student, noise, labels)

    run = subprocess.run(
        [sys.executable, "-c", THERE, str(tmp_path)],
        env={**os.environ, "KERAS_BACKEND": other},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    there = np.load(tmp_path / "images.npz")
    for name, images in here.items():
        assert np.mean(np.abs(images) < 1) > 0.5  # not all clipped
        np.testing.assert_allclose(there[f"here {name}"], images, atol=1e-4)

    # And the way back, after it was trained there.
    back = keras.saving.load_model(tmp_path / "back.keras")
    assert int(back.iteration) == int(student.iteration) + 1
    images = back.generate(noise=noise, labels=labels)
    np.testing.assert_allclose(there["there student"], images, atol=1e-4)
    assert np.max(np.abs(images - here["student"])) > 1e-4
    back.attach_teacher(teacher)
    back.fit(noise.clip(-1, 1), labels, verbose=0)
    assert np.all(np.isfinite(back.generate(noise=noise, labels=labels)))
