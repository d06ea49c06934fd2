"""One set of good arguments for everything public, and what it is for."""

import functools
from collections.abc import Iterator
from typing import Any

from benchmarks.bad_arguments.good_adapters import all_adapters
from benchmarks.bad_arguments.good_data import data
from benchmarks.bad_arguments.good_models import models
from benchmarks.bad_arguments.good_parts import parts
from benchmarks.bad_arguments.public_api import Entry, entry_of, method_of
from benchmarks.bad_arguments.world import IMAGES, LEVELS, TIMES, World
from keras_mscm import UViT, distribution, functional, presets, weightings


def entries(world: World) -> dict[str, Entry]:
    """The entry of everything in `public_api.names`."""
    made: dict[str, Entry] = {}
    for kind in (models, _networks, parts, data, all_adapters, _tensors):
        for entry in kind(world):
            made[entry.name] = entry
    return made


def _networks(w: World) -> Iterator[Entry]:
    yield entry_of("UViT", UViT, w.of_uvit)
    yield method_of("UViT", "flops", UViT, lambda: w.uvit)
    yield method_of(
        *("UViT", "save_to_preset", UViT, lambda: w.uvit),
        lambda: {"preset": w.folder / "saved_network"},
    )
    yield method_of(
        *("UViT", "from_preset", UViT, lambda: UViT),
        lambda: {"preset": w.preset},
    )
    for name in ("fully_sharded", "tensor_parallel"):
        yield entry_of(
            f"distribution.{name}",
            getattr(distribution, name),
            lambda: {"device_mesh": w.mesh},
        )


def _tensors(w: World) -> Iterator[Entry]:
    """Functions of tensors, of which Python's numbers and words are checked."""
    batch = {"x": IMAGES, "z_t": IMAGES, "logsnr_t": LEVELS, "logsnr_s": LEVELS}
    good: dict[str, dict[str, Any]] = {
        "addim": {**batch, "x_var": LEVELS},
        "predict_x": {
            "output": IMAGES,
            "z": IMAGES,
            "logsnr": LEVELS,
            "prediction_type": "v",
        },
        "normal": {"seed": 0, "number": [0, 1], "draw": 0, "shape": (4, 4, 1)},
        "segment_times": {
            "step": TIMES,
            "n_rel": TIMES,
            "student_steps": 2,
            "steps_per_segment": 2,
        },
        "suggested_annealing": {"run": 1000, "student_steps": 8},
        "threefry_2x32": {"key": (0, 0), "counter": (0, 0)},
    }
    for name in functional.__all__:
        arguments = functools.partial(dict, good.get(name, {}))
        yield entry_of(
            f"functional.{name}",
            getattr(functional, name),
            arguments,
            # Tensors by name, and functions of tensors.
            without=("denoise", "conditioning", "without"),
        )
    for name in (
        *("snr_plus_one", "sqrt_snr_plus_one", "truncated_snr"),
        "flow_velocity",
    ):
        yield entry_of(f"weightings.{name}", getattr(weightings, name))
    yield entry_of("weightings.uniform", weightings.uniform)
    yield entry_of("presets.summary", presets.summary)
