"""What arguments may be, where their annotations don't say it all."""

import math

from benchmarks.bad_arguments.values import Domain

_below_1 = math.nextafter(1, 0)
SEED_MAX = 2**31 - 3


def _number(low=-math.inf, high=math.inf, *more):
    return Domain(frozenset(["int", "float", *more]), low=low, high=high)


def _integer(low, high=math.inf, *more):
    return Domain(frozenset(["int", *more]), low=low, high=high)


def _kinds(*kinds, **more):
    return Domain(frozenset(kinds), **more)


TEXT = _kinds("str")
FUNCTION = _kinds("function", "none")
INSTANCE = _kinds("instance", "none")
# Data: what is in them is for other tests, with good and bad arrays.
ARRAYS = _kinds("array", "list", "none", low=-math.inf)
DATA = _kinds("array", "list", "dict", "none", low=-math.inf)

#: By name, whatever it is an argument of.
DOMAINS: dict[str, Domain] = {
    # Numbers of which 0 or less is allowed, or not all above it.
    "seed": _integer(0, SEED_MAX, "none"),
    "eta": _number(0, 1),
    "ema_decay": _number(0, _below_1),
    "label_dropout": _number(0, _below_1),
    "instantaneous": _number(0, _below_1),
    "guidance_scale": _number(0),
    "logsnr_min": _number(-80, 80),
    "logsnr_max": _number(-80, 80),
    "bias": _number(-80, 80),
    "shard": _kinds("list", "none", parts=_integer(0), length=2),
    "context_length": _integer(0),
    "final": _number(0, 1),
    "offset": _integer(0),
    "low": _number(-math.inf, math.inf, "none"),
    "high": _number(-math.inf, math.inf, "none"),
    "guidance": _number(-math.inf),
    "time_axes": _integer(0, 8),
    "shift": _number(1e-6, 1e6),
    "noise_mean": _number(-40, 40, "none"),
    "noise_std": _number(1e-3, 40, "none"),
    "difference_step": _number(1e-3, 0.25),
    "time_rate": _number(2, 1000),
    "gap_divisor": _number(1.01, 2**2.5),  # with stages=8
    "stages": _integer(0, 20),
    "self_decay": _number(0, _below_1),
    "bootstrap_every": _integer(2),
    "min_signal_rate": _number(1e-6, 1 - 1e-6),
    "max_signal_rate": _number(1e-6, 1 - 1e-6),
    # No conditioning is a conditioning.
    **dict.fromkeys(
        ("conditioning", "constants", "params"),
        _kinds("dict", "none", empty=True),
    ),
    "null_conditioning": _kinds("dict", "none", empty=True),
    "arguments": _kinds("dict", "none", empty=True),
    "names": _kinds("dict", "list", "none", empty=True),
    "float32_layers": _kinds("list", parts=TEXT, empty=True),
    # No metadata are metadata.
    "metadata": _kinds("dict", "none", empty=True),
    # Without annotation, or `Any` for want of a type.
    "schedule": INSTANCE,
    "model": _kinds("instance"),
    "network": _kinds("instance"),
    "module": INSTANCE,
    "teacher": _kinds("instance", "function", "none"),
    "normalizer": INSTANCE,
    "scheduler": _kinds("instance"),
    "vae": INSTANCE,
    "encoder": INSTANCE,
    "decoder": INSTANCE,
    "alphas_cumprod": _kinds(
        "list", "array", "none", low=0, parts=_number(0, 1)
    ),
    "prompts": _kinds("list", "dict", parts=TEXT),
    "integrator": FUNCTION,
    "sampler": FUNCTION,
    "images": _kinds("array", "list"),
    "labels": ARRAYS,
    "context": ARRAYS,
    "context_mask": ARRAYS,
    "noise": ARRAYS,
    "times": ARRAYS,
    "x": _kinds("array"),
    "y": DATA,
    "split": TEXT,
    "metric": _kinds("instance"),
    "metrics": _kinds("list", parts=_kinds("instance")),
    "optimizer": _kinds("str", "instance"),
    "loss": _kinds("str", "instance", "function", "none"),
    "callbacks": _kinds("list", "none", parts=INSTANCE, empty=True),
    "validation_data": DATA,
    **dict.fromkeys(("mean_1", "mean_2"), _kinds("array", "list")),
    **dict.fromkeys(("covariance_1", "covariance_2"), _kinds("array", "list")),
}

#: By what it is an argument of, and its name.
SPECIAL: dict[tuple[str, str], Domain] = {
    ("UViT", "dropout"): _kinds(
        *("int", "float", "list"),
        low=0,
        high=_below_1,
        parts=_number(0, _below_1),
    ),
    ("Condition", "shape"): _kinds(
        "list", parts=_integer(1, math.inf, "none"), empty=True
    ),
    ("Condition", "null"): _kinds(
        *("int", "float", "bool", "list", "array", "none"),
        low=-math.inf,
        parts=_number(-math.inf),
    ),
    **{
        ("spaces.Latents", name): _kinds(
            *("int", "float", "list", "array"), low=low, parts=_number(low)
        )
        for name, low in (
            ("scale", math.nextafter(0, 1)),
            ("shift", -math.inf),
        )
    },
    ("adapters.from_keras_cv", "encoder"): _kinds("bool"),
    ("adapters.edm_grid", "num_steps"): _integer(2),
    ("adapters.AdaptedNetwork", "alphas_cumprod"): _kinds("none"),
    ("samplers.Sampler.__call__", "denoise"): _kinds("function"),
    ("samplers.Sampler.__call__", "start"): _number(2.0**-126, 1),
    ("samplers.Sampler.__call__", "noise"): _kinds("array", low=-math.inf),
    ("samplers.Sampler.__call__", "schedule"): _kinds("function"),
    ("samplers.Sampler.__call__", "num_steps"): _integer(1, 2**24, "array"),
    ("Generator", "sampler"): _kinds("function"),
    **{
        ("TractModel" + method, "steps"): _kinds("list", parts=_integer(1))
        for method in ("", ".from_teacher")
    },
    **{
        ("ShortcutModel" + method, "most_steps"): _integer(2, 4096)
        for method in ("", ".from_teacher")
    },
    ("variance.MeasuredVariance", "table"): _kinds("list", parts=_number(0)),
    ("datasets.emoji", "background"): _kinds(
        "str", "list", parts=_integer(0, 255), length=3
    ),
    ("datasets.from_folder", "labels"): _kinds("bool"),
    ("datasets.from_tfds", "labels"): _kinds("bool"),
    ("datasets.from_tfds", "name"): TEXT,
    ("metrics.keras_features", "mean"): _kinds(
        *("int", "float", "list", "array"), low=-math.inf, parts=_number()
    ),
    ("metrics.keras_features", "std"): _kinds(
        *("int", "float", "list", "array"), parts=_number()
    ),
    ("functional.normal", "shape"): _kinds(
        "list", parts=_integer(1), empty=True
    ),
    ("datasets.from_keras", "class_names"): _kinds(
        "list", "array", "none", parts=TEXT
    ),
    # Instead of the preset's own.
    ("DenoisingModel.from_preset", "network"): INSTANCE,
    # Without a seed what is measured would not be the same again.
    ("metrics.classifier_features", "seed"): _integer(0, SEED_MAX),
    ("metrics.KernelDistance", "seed"): _integer(0, SEED_MAX),
    ("callbacks.EvaluateSamples", "seed"): _integer(0, SEED_MAX),
    ("callbacks.SampleGrid", "seed"): _integer(0, SEED_MAX),
}

_count = _integer(1, math.inf, "none")
_several = _kinds("list", "dict", "instance", "none", empty=True)
#: What Keras leaves without annotation.
KERAS_FIT = {
    "batch_size": _count,
    "epochs": _integer(0),
    "validation_split": _number(0, _below_1),
    "initial_epoch": _integer(0),
    "steps_per_epoch": _count,
    "validation_steps": _count,
    "validation_batch_size": _count,
    "class_weight": _kinds("dict", "none", empty=True),
    "sample_weight": _kinds("array", "none"),
    "shuffle": _kinds("bool"),
}
KERAS_EVALUATE = {
    "batch_size": _count,
    "steps": _count,
    "sample_weight": _kinds("array", "none"),
}
# But for `metrics`, `weighted_metrics` and `loss_weights`, which are Keras'.
KERAS_COMPILE = {
    "steps_per_execution": _integer(1),
    "run_eagerly": _kinds("bool"),
    "jit_compile": _kinds("bool", "str"),
    "auto_scale_loss": _kinds("bool"),
}
