"""Times training: `python -m keras_mscm.presets.training_cost grey28`.

What it prints is what stands under `"training_step"` in a preset's metadata;
`--write` puts it there.
"""

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_mscm import checks, preset_files
from keras_mscm.models.diffusion import DiffusionModel


class _Stopwatch(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.times: list[float] = []

    def on_train_batch_end(self, batch, logs=None):
        # The losses are computed by then, and so is the step.
        float(logs["loss"])
        self.times.append(time.perf_counter())


def training_step(
    preset: str | os.PathLike, batch_size: int, num_steps: int = 20
) -> dict[str, Any]:
    """Times training steps of a diffusion model on random images.

    Args:
        preset: Name or directory of the preset.
        batch_size: Images per step.
        num_steps: Steps to take the median of.

    Returns:
        The median in milliseconds, and what it was measured on.

    Raises:
        ValueError: If a number is not positive, or there is no such preset.
    """
    preset_files.find(preset)
    batch_size = checks.check_positive_integer("batch_size", batch_size)
    num_steps = checks.check_positive_integer("num_steps", num_steps)
    model = preset_files.load_model(DiffusionModel, preset, load_weights=False)
    model.compile(optimizer=keras.optimizers.Adam(1e-4))
    num = (num_steps + 3) * batch_size  # the first steps compile
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (num, *model.image_shape)).astype("float32")
    labels = np.arange(num) % model.num_classes if model.num_classes else None
    stopwatch = _Stopwatch()
    model.fit(
        images, labels, batch_size=batch_size, verbose=0, callbacks=[stopwatch]
    )
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    seconds = np.median(np.diff(stopwatch.times[2:]))
    backend = keras.backend.backend()
    package = metadata.packages_distributions()[backend][0]
    return {
        "milliseconds": round(1000 * float(seconds), 1),
        "batch_size": batch_size,
        "backend": backend,
        "hardware": _hardware(),
        # Beyond the number of cores, others had a share of them.
        "load_average": load and round(load, 1),
        "date": datetime.date.today().isoformat(),
        "versions": {
            "keras": keras.__version__,
            backend: metadata.version(package),
        },
    }


def _hardware() -> str:
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.split(":", 1)[1].strip()
            for line in cpuinfo.read_text("utf-8").splitlines()
            if line.startswith("model name")
        ]
        processor = next(iter(names), processor)
    return f"{os.cpu_count()} cores, {processor}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the cost of a preset's training step as JSON.

    Args:
        arguments: Those of the command line by default.
    """
    parser = argparse.ArgumentParser(
        prog="python -m keras_mscm.presets.training_cost",
        description="Times a training step of a diffusion model, as `fit` "
        "takes it.",
    )
    parser.add_argument("preset", help="name or directory")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--num-steps", type=int, default=20)
    parser.add_argument(
        "--write", action="store_true", help="into the preset's metadata"
    )
    args = vars(parser.parse_args(arguments))
    write = args.pop("write")
    try:
        step = training_step(**args)
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    print(json.dumps(step, indent=2))
    if write:
        facts = preset_files.read(args["preset"], preset_files.METADATA)
        facts["training_step"] = step
        preset_files.write_metadata(args["preset"], facts)


if __name__ == "__main__":
    main()
