"""One set of good arguments for everything public, and what it is for."""

import dataclasses
import functools
import inspect
from typing import Any

import keras
import numpy as np

from benchmarks.bad_arguments.domains import (
    KERAS_COMPILE,
    KERAS_EVALUATE,
    KERAS_FIT,
)
from benchmarks.bad_arguments.public_api import Entry, domains_of
from benchmarks.bad_arguments.starting import Started
from benchmarks.bad_arguments.world import Plain, World, means, read
from keras_mscm import (
    DiffusionModel,
    GuidanceDistillationModel,
    MultistepConsistencyModel,
    ProgressiveDistillationModel,
    UViT,
    callbacks,
    datasets,
    distribution,
    functional,
    losses,
    metrics,
    presets,
    samplers,
    schedules,
    weightings,
)
from keras_mscm.datasets import emoji_font

TIMES = np.linspace(0, 1, 9, dtype="float32")
LEVELS = np.linspace(-15, 15, 4, dtype="float32")
IMAGES = np.linspace(-1, 1, 64, dtype="float32").reshape(4, 4, 4, 1)


# How something is used, if it was made: errors that come late are errors too.


def _falls(schedule):
    logsnr = keras.ops.convert_to_numpy(schedule(TIMES))
    assert np.all(np.isfinite(logsnr)), "not finite"
    assert np.all(np.diff(logsnr) < 0), "does not fall"


def _compares(loss):
    value = keras.ops.convert_to_numpy(loss(0 * IMAGES, IMAGES))
    assert np.all(np.isfinite(value)), "not finite"


def _weighs(weighting):
    levels = keras.ops.convert_to_tensor(LEVELS)
    value = keras.ops.convert_to_numpy(weighting(levels))
    assert np.all(np.isfinite(value)), "not finite"


def _samples(sampler):
    sampler(
        lambda z, logsnr: 0.5 * z, IMAGES, schedules.CosineSchedule(), 2, seed=0
    )


def _measures(world, metric):
    metric.update_state(world.images)
    metric.result()


def _begins(model, callback):
    callback.set_model(model)
    callback.on_train_begin()


def _emoji(**arguments):
    try:
        return datasets.emoji(**arguments)
    except FileNotFoundError as error:
        if emoji_font.FONT in str(error):  # not every machine has it
            raise Started from error
        raise


def entries(world: World) -> dict[str, Entry]:
    """The entry of everything in `public_api.names`."""
    made: dict[str, Entry] = {}
    for kind in (_models, _networks, _parts, _data, _tensors):
        for entry in kind(world):
            made[entry.name] = entry
    return made


def _entry(name, call, good=dict, use=None, more=(), domains=None, **kw):
    domains = domains_of(name, call, *more, **kw) | (domains or {})
    return Entry(name, call, good, use, domains)


def _method(
    owner,
    name,
    cls,
    make,
    good=dict,
    more=(),
    domains=None,
    skip=(),
    every=1,
):
    """Of a class method, or of a method of what `make` gives."""
    static = inspect.getattr_static(cls, name)
    function = getattr(static, "__func__", static)
    first = next(iter(inspect.signature(function).parameters))

    @functools.wraps(function)
    def call(*args, **kwargs):
        return getattr(make(), name)(*args, **kwargs)

    without = (first, *skip)
    path = f"{owner}.{name}"
    found = domains_of(path, function, *more, without=without)
    return Entry(path, call, good, None, found | (domains or {}), every)


def _models(w: World):
    steps = functools.partial(w.of_plain, student_steps=2)
    stages = functools.partial(steps, teacher_steps=8)
    students = MultistepConsistencyModel, ProgressiveDistillationModel
    for name, cls, good in (
        ("DenoisingModel", Plain, w.of_plain),
        ("DiffusionModel", DiffusionModel, w.of_plain),
        ("GuidanceDistillationModel", GuidanceDistillationModel, w.of_plain),
        ("MultistepConsistencyModel", students[0], steps),
        ("ProgressiveDistillationModel", students[1], stages),
    ):
        yield _entry(name, cls, good)
    # What all models share, of one of them.
    of_all = functools.partial(
        _method, "DenoisingModel", cls=DiffusionModel, make=lambda: w.model
    )
    fit = functools.partial(w.data)
    yield of_all("fit", good=lambda: {**fit(), "verbose": 0}, domains=KERAS_FIT)
    yield of_all(
        "evaluate",
        good=lambda: {**fit(), "verbose": 0},
        domains=KERAS_EVALUATE,
    )
    yield of_all("compile", make=lambda: w.to_compile, domains=KERAS_COMPILE)
    yield of_all("check_generate", more=[DiffusionModel.generate])
    yield of_all("save_to_preset", good=lambda: {"preset": w.folder / "saved"})
    yield _method(
        *("DenoisingModel", "from_preset", DiffusionModel),
        lambda: DiffusionModel,
        lambda: {"preset": w.preset},
        more=[DiffusionModel],
        every=9,
    )
    generate = functools.partial(_method, name="generate")
    of_diffusion = "DiffusionModel", DiffusionModel, lambda: w.model
    for owner, cls, make in (
        of_diffusion,
        ("MultistepConsistencyModel", students[0], lambda: w.student),
        ("ProgressiveDistillationModel", students[1], lambda: w.progressive),
    ):
        yield generate(owner, cls=cls, make=make)
    yield _method(
        of_diffusion[0], "measure_x_var", *of_diffusion[1:], good=w.data
    )
    # What the teacher says, is not said again.
    of_teacher = "network", "schedule", "prediction_type", "image_shape"
    of_teacher += "num_classes", "context_width"
    for owner, cls, make, more in (
        (
            "GuidanceDistillationModel",
            GuidanceDistillationModel,
            lambda: w.guided,
            {},
        ),
        (
            "MultistepConsistencyModel",
            students[0],
            lambda: w.student,
            {"student_steps": 2},
        ),
        (
            "ProgressiveDistillationModel",
            students[1],
            lambda: w.progressive,
            {"student_steps": 2, "teacher_steps": 8},
        ),
    ):
        yield _method(
            *(owner, "attach_teacher", cls, make),
            lambda: {"teacher": w.model},
        )
        yield _method(
            *(owner, "from_teacher", cls, lambda cls=cls: cls),
            lambda more=more: {"teacher": w.model, **more},
            more=[cls],
            every=9,
            skip=of_teacher,
        )
    yield _method(
        *("MultistepConsistencyModel", "anneal_teacher_steps", students[0]),
        lambda: w.student,
        lambda: {"start": 4, "end": 8, "iterations": 2},
    )


def _networks(w: World):
    yield _entry("UViT", UViT, w.of_uvit)
    yield _method("UViT", "flops", UViT, lambda: w.uvit)
    yield _method(
        *("UViT", "save_to_preset", UViT, lambda: w.uvit),
        lambda: {"preset": w.folder / "saved_network"},
    )
    yield _method(
        *("UViT", "from_preset", UViT, lambda: UViT),
        lambda: {"preset": w.preset},
    )
    for name in ("fully_sharded", "tensor_parallel"):
        yield _entry(
            f"distribution.{name}",
            getattr(distribution, name),
            lambda: {"device_mesh": w.mesh},
        )


def _parts(w: World):
    """Schedules, losses, samplers, callbacks and metrics."""
    sides = {"image_resolution": 64, "noise_resolution": 32}
    interpolated = {
        "image_resolution": 64,
        "noise_resolution_low": 32,
        "noise_resolution_high": 64,
    }
    for name, good in {
        "CosineSchedule": {},
        "ShiftedCosineSchedule": sides,
        "InterpolatedCosineSchedule": interpolated,
        "KarrasSchedule": {},
    }.items():
        cls = getattr(schedules, name)
        good = functools.partial(dict, good)
        yield _entry(f"schedules.{name}", cls, good, _falls)
    yield _entry("schedules.NoiseSchedule", schedules.NoiseSchedule)
    for name in ("SquaredL2", "L2", "PseudoHuber"):
        yield _entry(f"losses.{name}", getattr(losses, name), use=_compares)
    yield _entry(
        "losses.Multiscale",
        losses.Multiscale,
        lambda: {"loss": losses.L2()},
        _compares,
    )
    yield _entry(
        "weightings.SigmoidWeighting",
        weightings.SigmoidWeighting,
        lambda: {"bias": 0},
        _weighs,
    )
    for name in ("DDIM", "ADDIM", "Heun", "NoisyDDIM", "DDPM"):
        use = _samples if name in ("DDIM", "Heun", "DDPM") else None
        yield _entry(f"samplers.{name}", getattr(samplers, name), use=use)
    yield _entry("samplers.Sampler", samplers.Sampler)

    begins = functools.partial(_begins, w.model)
    drawing = {"every": 1, "num_images": 4}
    yield _entry(
        "callbacks.EvaluateSamples",
        callbacks.EvaluateSamples,
        lambda: {"metrics": [keras.metrics.Mean(name="mean")], **drawing},
        begins,
        [DiffusionModel.generate],
        without=("noise",),
    )
    yield _entry(
        "callbacks.SampleGrid",
        callbacks.SampleGrid,
        lambda: {"directory": w.folder / "grids", **drawing},
        begins,
        [DiffusionModel.generate],
        without=("noise",),
    )
    yield _entry(
        "callbacks.ResumeTraining",
        callbacks.ResumeTraining,
        lambda: {"directory": w.folder / "resume"},
    )
    yield _entry(
        "callbacks.TeacherStepAnneal",
        callbacks.TeacherStepAnneal,
        use=lambda callback: _begins(w.student, callback),
    )

    measures = functools.partial(_measures, w)
    for name in (
        *("FrechetDistance", "ImprovedPrecision", "ImprovedRecall"),
        "KernelDistance",
    ):
        more = {"subset_size": 4} if name == "KernelDistance" else {}
        yield _entry(
            f"metrics.{name}",
            getattr(metrics, name),
            lambda more=more: {"reference": w.reference, **more},
            measures,
        )
    yield _entry(
        "metrics.FeatureExtractor",
        metrics.FeatureExtractor,
        lambda: {"function": means, "name": "means"},
        lambda extractor: extractor(w.images),
    )
    yield _entry(
        "metrics.Reference",
        metrics.Reference,
        lambda: {"images": w.images, "extractor": means, "name": "images"},
    )
    yield _method(
        *("metrics.Reference", "save", metrics.Reference),
        lambda: w.reference,
        lambda: {"path": w.folder / "reference"},
    )
    yield _method(
        *("metrics.Reference", "load", metrics.Reference),
        lambda: metrics.Reference,
        lambda: {"path": w.reference_file, "extractor": means},
    )
    yield _entry(
        "metrics.classifier_features",
        metrics.classifier_features,
        lambda: {"images": w.images, "labels": np.arange(8) % 2, "epochs": 1},
    )
    yield _entry(
        "metrics.frechet_distance",
        metrics.frechet_distance,
        lambda: {
            "mean_1": np.zeros(2),
            "covariance_1": np.eye(2),
            "mean_2": np.zeros(2),
            "covariance_2": np.eye(2),
        },
    )
    # Without weights, which would be downloaded.
    yield _entry(
        "metrics.inception_v3",
        metrics.inception_v3,
        lambda: {"weights": None, "size": (75, 75)},
    )
    yield _entry(
        "metrics.keras_features",
        metrics.keras_features,
        lambda: {"model": w.flatten},
        lambda extractor: extractor(w.images),
    )


def _data(w: World):
    latents = w.latent_folder  # made now, because nothing starts later
    yield _entry(
        "datasets.ImageBatches",
        datasets.ImageBatches,
        lambda: {"read": read, "num_images": 8, "batch_size": 4},
        lambda batches: batches[0],
    )
    yield _entry(
        "datasets.from_arrays",
        datasets.from_arrays,
        lambda: {"images": w.images, "batch_size": 4},
        lambda batches: batches[0],
        [datasets.ImageBatches],
        without=("read", "num_images"),
    )
    yield _entry(
        "datasets.from_folder",
        datasets.from_folder,
        lambda: {"directory": w.pictures, "image_size": 8, "batch_size": 1},
        lambda batches: batches[0],
        [datasets.ImageBatches],
        without=("read", "num_images"),
    )
    yield _entry(
        "datasets.LatentBatches",
        datasets.LatentBatches,
        lambda: {"path": latents, "batch_size": 4},
        lambda batches: batches[0],
    )
    yield _entry(
        "datasets.cache_latents",
        datasets.cache_latents,
        lambda: {"images": w.images, "space": w.latents, "path": latents},
        lambda batches: batches[0],
        [datasets.LatentBatches],
    )
    # Of sets that aren't there: nothing is to be downloaded for what is bad.
    yield _entry(
        "datasets.from_keras",
        datasets.from_keras,
        lambda: {"name": "mnist", "batch_size": 1},
        None,
        [datasets.ImageBatches],
        without=("read", "num_images", "labels"),
    )
    yield _entry(
        "datasets.from_tfds",
        datasets.from_tfds,
        lambda: {"name": "mnist", "batch_size": 1},
    )
    yield dataclasses.replace(
        _entry("datasets.emoji", datasets.emoji, lambda: {"image_size": 8}),
        call=_emoji,
    )
    yield _entry("presets.summary", presets.summary)


def _tensors(w: World):
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
        yield _entry(f"functional.{name}", getattr(functional, name), arguments)
    for name in ("snr_plus_one", "sqrt_snr_plus_one", "truncated_snr"):
        yield _entry(f"weightings.{name}", getattr(weightings, name))
    yield _entry("weightings.uniform", weightings.uniform)
