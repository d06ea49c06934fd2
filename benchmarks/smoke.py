"""The guard of quality: a tiny student of a fixed teacher, against its figure.

Command:   make bench-smoke   (or: python -m benchmarks.smoke)
Time:      see benchmarks/smoke.json, "seconds"
Data:      scikit-learn's digits, as in examples/digits.py

The preset `digits_teacher` teaches a student of 8 steps. The exit status is 1
if the student's Fréchet distance is more than 15 % above the one committed
in smoke.json; `--update` writes a new one there.
"""

import argparse
import datetime
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import keras_mscm
from examples import digits
from keras_mscm import DiffusionModel, MultistepConsistencyModel, samplers
from keras_mscm.callbacks import TeacherStepAnneal

FIGURE = Path(__file__).with_suffix(".json")
SLACK = 1.15
STUDENT_STEPS = 8
ITERATIONS = 1500
SAMPLES = 3000


def measure(iterations=ITERATIONS, seed=0):
    """The student's distance, and its teacher's by DDIM in as many steps."""
    images, held_out, labels, _ = digits.load_data(seed)
    judge = digits.Judge(images, labels, held_out, seed)
    teacher = DiffusionModel.from_preset("digits_teacher")
    student = MultistepConsistencyModel.from_teacher(
        teacher, student_steps=STUDENT_STEPS, ema_decay=0.998, seed=seed
    )
    digits.train(
        student,
        digits.batches(images, labels, 64, seed),
        1e-3,
        iterations,
        [TeacherStepAnneal(16, 128, iterations // 2)],
        epochs=1,
    )
    wanted = np.arange(SAMPLES, dtype="int32") % 10
    drawn = dict(
        noise=np.random.default_rng(seed).standard_normal(
            (SAMPLES, 8, 8, 1), dtype="float32"
        ),
        labels=wanted,
        num_steps=STUDENT_STEPS,
        batch_size=500,
    )
    return {
        f"{name}_distance": judge.judge(images, wanted, name, STUDENT_STEPS)[
            "frechet_distance"
        ]
        for name, images in (
            ("student", student.generate(**drawn)),
            ("teacher", teacher.generate(sampler=samplers.DDIM(), **drawn)),
        )
    }


def within(measured, figure):
    """Whether the student is as good as it was, but for the slack."""
    return measured <= SLACK * figure


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--update", action="store_true")
    args = parser.parse_args()
    begun = time.perf_counter()
    result = measure()
    result |= {
        "seconds": round(time.perf_counter() - begun),
        "date": datetime.date.today().isoformat(),
        "hardware": f"{os.cpu_count()} CPU cores",
        "backend": keras.backend.backend(),
        "versions": {
            "keras": keras.__version__,
            "keras_mscm": keras_mscm.__version__,
        },
    }
    print(json.dumps(result, indent=2))
    if args.update:
        FIGURE.write_text(json.dumps(result, indent=2) + "\n")
        return
    figure = json.loads(FIGURE.read_text())["student_distance"]
    ratio = result["student_distance"] / figure
    print(f"{ratio:.3f} of the committed distance; at most {SLACK}")
    sys.exit(not within(result["student_distance"], figure))


if __name__ == "__main__":
    main()
