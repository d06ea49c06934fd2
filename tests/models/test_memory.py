"""Drawing and training again and again takes no more memory."""

import gc
import json
import os
import subprocess
import sys

import numpy as np
import pytest

IMAGES = np.random.default_rng(0).uniform(-1, 1, (8, 4, 4, 1)).astype("float32")


def resident():
    """Resident size of this process in MiB."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(
    not os.path.exists("/proc/self/statm"), reason="it is Linux that tells"
)
def test_many_short_calls(make_student, count_calls):
    student = make_student()
    calls = count_calls(student, "denoise")

    def draw():
        student.generate(4, seed=1)

    def fit():
        student.fit(IMAGES, batch_size=4, verbose=0)

    for run, number in ((draw, 200), (fit, 50)):
        for _ in range(10):
            run()
        before, traced = resident(), len(calls)
        for _ in range(number):
            run()
        # An image here takes 64 bytes; a compilation kept, a megabyte.
        assert resident() - before < 25
        if os.environ.get("KERAS_BACKEND") in ("jax", "tensorflow"):
            assert len(calls) == traced


SCRIPT = """
import json, resource
import numpy as np
import keras
from keras_mscm import DiffusionModel

z = keras.Input((32, 32, 3), name="z")
logsnr = keras.Input((), name="logsnr")
outputs = keras.layers.Dense(3)(z)
model = DiffusionModel(
    keras.Model({"z": z, "logsnr": logsnr}, outputs), image_shape=(32, 32, 3)
)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
model.generate(256, num_steps=2, seed=1)
before = peak()
images = model.generate(20_000, num_steps=2, seed=1)
print(json.dumps([peak() - before, images.nbytes / 2**20]))
"""


def test_20000_images_take_what_they_are():
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    grown, output = json.loads(run.stdout.splitlines()[-1])
    assert output > 230
    assert grown < output + 60, (grown, output)
