"""Good arguments of schedules, losses, samplers, callbacks and metrics."""

import functools
from collections.abc import Iterator

import keras
import numpy as np

from benchmarks.bad_arguments.public_api import Entry, entry_of, method_of
from benchmarks.bad_arguments.world import IMAGES, LEVELS, TIMES, World, means
from keras_mscm import (
    Condition,
    DiffusionModel,
    Generator,
    callbacks,
    losses,
    metrics,
    samplers,
    schedules,
    spaces,
    variance,
    weightings,
)

TABLE = [0.9, 0.5, 0.25, 0.1]

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


def _finite(value):
    value = keras.ops.convert_to_numpy(value)
    assert np.all(np.isfinite(value)), "not finite"


def _clips(space):
    _finite(space.decode(4 * IMAGES))


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


def parts(w: World) -> Iterator[Entry]:
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
        "RectifiedFlowSchedule": {},
        "DiscreteSchedule": {"alphas_cumprod": TABLE},
    }.items():
        cls = getattr(schedules, name)
        good = functools.partial(dict, good)
        yield entry_of(f"schedules.{name}", cls, good, _falls)
    yield entry_of("schedules.NoiseSchedule", schedules.NoiseSchedule)
    yield method_of(
        *("schedules.DiscreteSchedule", "of_steps", schedules.DiscreteSchedule),
        lambda: schedules.DiscreteSchedule,
        lambda: {"alphas_cumprod": TABLE, "num_steps": 2},
    )
    for name in ("SquaredL2", "L2", "PseudoHuber"):
        yield entry_of(f"losses.{name}", getattr(losses, name), use=_compares)
    yield entry_of(
        "losses.Multiscale",
        losses.Multiscale,
        lambda: {"loss": losses.L2()},
        _compares,
    )
    yield entry_of(
        "weightings.SigmoidWeighting",
        weightings.SigmoidWeighting,
        lambda: {"bias": 0},
        _weighs,
    )
    for name in (
        *("DDIM", "ADDIM", "Heun", "NoisyDDIM", "DDPM"),
        *("DPMSolverMultistep", "FlowMap", "Renoise"),
    ):
        use = None if name in ("ADDIM", "FlowMap", "NoisyDDIM") else _samples
        yield entry_of(f"samplers.{name}", getattr(samplers, name), use=use)
    for name in ("Sampler", "SinglestepSampler"):
        yield entry_of(f"samplers.{name}", getattr(samplers, name))
    yield method_of(
        *("samplers.Sampler", "__call__", samplers.Sampler),
        samplers.DDIM,
        lambda: {
            "denoise": lambda z, logsnr: 0.5 * z,
            "noise": IMAGES,
            "schedule": schedules.CosineSchedule(),
            "num_steps": 2,
        },
    )

    yield from _of_examples(w)
    yield from _callbacks(w)
    yield from _metrics(w)


def _of_examples(w: World) -> Iterator[Entry]:
    """What a model is told of its examples, and what draws them."""
    yield entry_of("Condition", Condition, lambda: {"shape": (3,)})
    yield entry_of("spaces.Space", spaces.Space)
    yield entry_of(
        "spaces.Pixels", spaces.Pixels, lambda: {"shape": (4, 4, 1)}, _clips
    )
    yield entry_of("spaces.Box", spaces.Box, lambda: {"shape": (4,)}, _clips)
    yield entry_of(
        "spaces.Latents",
        spaces.Latents,
        lambda: {
            "shape": (2, 2, 1),
            "encoder": w.half,
            "image_shape": (4, 4, 1),
        },
        lambda space: _finite(space.encode(IMAGES)),
    )
    for name in ("AnalyticVariance", "MeasuredVariance"):
        table = {"table": [0.5] * 64} if name == "MeasuredVariance" else {}
        yield entry_of(
            f"variance.{name}",
            getattr(variance, name),
            functools.partial(dict, table),
            _weighs,
        )
    yield entry_of("variance.ErrorShare", variance.ErrorShare)
    yield entry_of("variance.level_logsnr", variance.level_logsnr)
    yield entry_of(
        "Generator",
        Generator,
        lambda: {"model": w.model, "sampler": samplers.DDIM()},
    )


def _callbacks(w: World) -> Iterator[Entry]:
    begins = functools.partial(_begins, w.model)
    drawing = {"every": 1, "num_images": 4}
    yield entry_of(
        "callbacks.EvaluateSamples",
        callbacks.EvaluateSamples,
        lambda: {"metrics": [keras.metrics.Mean(name="mean")], **drawing},
        begins,
        [DiffusionModel.generate],
        without=("noise",),
    )
    yield entry_of(
        "callbacks.SampleGrid",
        callbacks.SampleGrid,
        lambda: {"directory": w.folder / "grids", **drawing},
        begins,
        [DiffusionModel.generate],
        without=("noise",),
    )
    yield entry_of(
        "callbacks.ResumeTraining",
        callbacks.ResumeTraining,
        lambda: {"directory": w.folder / "resume"},
    )
    yield entry_of(
        "callbacks.TeacherStepAnneal",
        callbacks.TeacherStepAnneal,
        use=lambda callback: _begins(w.student, callback),
    )


def _metrics(w: World) -> Iterator[Entry]:
    measures = functools.partial(_measures, w)
    for name in (
        *("FrechetDistance", "ImprovedPrecision", "ImprovedRecall"),
        "KernelDistance",
    ):
        more = {"subset_size": 4} if name == "KernelDistance" else {}
        yield entry_of(
            f"metrics.{name}",
            getattr(metrics, name),
            lambda more=more: {"reference": w.reference, **more},
            measures,
        )
    yield entry_of(
        "metrics.FeatureExtractor",
        metrics.FeatureExtractor,
        lambda: {"function": means, "name": "means"},
        lambda extractor: extractor(w.images),
    )
    yield entry_of(
        "metrics.Reference",
        metrics.Reference,
        lambda: {"images": w.images, "extractor": means, "name": "images"},
    )
    yield method_of(
        *("metrics.Reference", "save", metrics.Reference),
        lambda: w.reference,
        lambda: {"path": w.folder / "reference"},
    )
    yield method_of(
        *("metrics.Reference", "load", metrics.Reference),
        lambda: metrics.Reference,
        lambda: {"path": w.reference_file, "extractor": means},
    )
    yield entry_of(
        "metrics.quality_over_steps",
        metrics.quality_over_steps,
        lambda: {
            "model": w.model,
            "metric": keras.metrics.Mean(name="mean"),
            "num_steps": [1, 2],
            "num_images": 2,
        },
        without=("generate_with",),
    )
    yield entry_of(
        "metrics.classifier_features",
        metrics.classifier_features,
        lambda: {"images": w.images, "labels": np.arange(8) % 2, "epochs": 1},
    )
    yield entry_of(
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
    yield entry_of(
        "metrics.inception_v3",
        metrics.inception_v3,
        lambda: {"weights": None, "size": (75, 75)},
    )
    yield entry_of(
        "metrics.keras_features",
        metrics.keras_features,
        lambda: {"model": w.flatten},
        lambda extractor: extractor(w.images),
    )
