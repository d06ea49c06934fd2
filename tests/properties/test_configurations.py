"""Whatever is registered with Keras comes back from files as it was."""

import json

import keras
import numpy as np
import pytest
from keras import ops

from benchmarks.bad_arguments.good_arguments import entries
from benchmarks.bad_arguments.world import World
from keras_mscm import (
    DiffusionModel,
    MultistepConsistencyModel,
    UViT,
    functional,
    losses,
    samplers,
    schedules,
    spaces,
)
from keras_mscm.adapters import keras_io
from keras_mscm.networks import attention, context, dropout, layers
from keras_mscm.networks import normalization as norm
from keras_mscm.variance import MeasuredVariance

PREFIX = "keras_mscm>"
OF_LAYERS = keras.Layer, keras.losses.Loss, spaces.Latents
TABLE = [0.5] * 63 + [0.25]

#: One of each that is no entry of `good_arguments`, with no default where
#: there is a choice.
INTERNAL = {
    "ContextEmbedding": lambda: context.ContextEmbedding(8),
    "CrossAttention": lambda: attention.CrossAttention(8),
    "Dropout": lambda: dropout.Dropout(0.25, seed=3),
    "GroupNormalization": lambda: norm.GroupNormalization(4),
    "MeasuredVariance": lambda: MeasuredVariance(np.array(TABLE).tolist()),
    "NormalizedPixels": lambda: keras_io.NormalizedPixels(
        (4, 4, 1), [0.5], [0.25]
    ),
    "NoiseLevelEmbedding": lambda: layers.NoiseLevelEmbedding(8),
    "PositionEmbedding": lambda: layers.PositionEmbedding(),
    "ResNetBlock": lambda: layers.ResNetBlock(0.1, seed=1, remat=True),
    "TransformerBlock": lambda: layers.TransformerBlock(8, 2, 0.1, seed=1),
}
#: Arguments other than the defaults, of NumPy's kinds where there are numbers.
OTHERS = {
    "ADDIM": {"x_var": MeasuredVariance(TABLE)},
    "CosineSchedule": {
        "logsnr_min": np.float32(-10),
        "logsnr_max": np.int64(9),
    },
    "InterpolatedCosineSchedule": {"image_resolution": np.int64(128)},
    "KarrasSchedule": {"sigma_min": np.float64(0.01), "rho": np.int32(5)},
    "L2": {"reduction": "sum", "name": "mine"},
    "Multiscale": {"num_poolings": np.int64(2)},
    "NoisyDDIM": {"x_var": MeasuredVariance(TABLE)},
    "PseudoHuber": {"huber_epsilon": np.float32(0.5)},
    "ShiftedCosineSchedule": {"noise_resolution": np.float32(16)},
    "SigmoidWeighting": {"bias": np.float32(-1.5)},
    "SquaredL2": {"reduction": "none"},
    "UViT": {
        "patch_size": np.int64(2),
        "num_classes": np.int32(3),
        "dropout": np.float32(0.5),
        "remat": np.True_,
        "seed": np.int64(7),
    },
    "DiffusionModel": {
        "weighting": losses.SigmoidWeighting(1),
        "ema_decay": np.float32(0.5),
        "seed": np.int64(3),
    },
    "GuidanceDistillationModel": {"guidance_scale": np.float32(1.5)},
    "MultistepConsistencyModel": {
        "student_steps": np.int64(3),
        "teacher_steps": np.float64(32),
        "eta": np.float32(0.5),
        "reference": "ema",
    },
    "ProgressiveDistillationModel": {
        "student_steps": np.int64(3),
        "teacher_steps": np.int64(12),
        "iterations_per_stage": np.int32(7),
    },
    "ConsistencyTuningModel": {
        "student_steps": np.int64(3),
        "noise_mean": np.float32(-0.5),
        "stages": np.int32(5),
    },
    "ContinuousConsistencyModel": {
        "method": "training",
        "noise_mean": np.float32(-0.5),
        "noise_std": np.float64(2),
        "warmup_iterations": np.int64(7),
        "adaptive_weighting": np.False_,
    },
    "MeanFlowModel": {
        "noise_mean": np.int64(0),
        "instantaneous": np.float32(0.5),
        "weight_power": np.int32(1),
        "noise_std": np.float32(1),
        "difference_step": np.float32(0.125),
    },
    "PeRFlowModel": {
        "solver_steps": np.int64(3),
        "guidance_scale": np.float32(1),
    },
    "ShortcutModel": {"most_steps": np.int64(8)},
    "TractModel": {"steps": [np.int64(8), np.int32(2)]},
}


def registered():
    names = keras.saving.get_custom_objects()
    ours = (name for name in names if name.startswith(PREFIX))
    # Those around other frameworks' modules have tests of their own.
    ours = (name.removeprefix(PREFIX) for name in ours)
    return sorted(name for name in ours if not name.endswith("Module"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    found = entries(World(tmp_path_factory.mktemp("world")))
    return {name.split(".")[-1]: entry for name, entry in found.items()}


def written(thing):
    """As in a file."""
    return json.dumps(
        keras.saving.serialize_keras_object(thing), sort_keys=True
    )


@pytest.mark.parametrize("name", registered())
def test_what_is_registered_comes_back(name, made):
    kind = keras.saving.get_registered_object(PREFIX + name)
    if name in INTERNAL:
        things = [INTERNAL[name]()]
    elif isinstance(kind, type):
        good = made[name].good()
        things = [kind(**good), kind(**{**good, **OTHERS.get(name, {})})]
    else:
        things = [kind]
    for thing in things:
        text = written(thing)
        back = keras.saving.deserialize_keras_object(json.loads(text))
        assert written(back) == text
        if not isinstance(kind, type):
            assert back is thing
            continue
        assert type(back) is kind
        # Keras' layers are equal to nothing but themselves.
        if not isinstance(thing, OF_LAYERS):
            assert back == thing
            assert hash(back) == hash(thing)
            assert kind.from_config(thing.get_config()) == thing


# Arguments that are functions, in a model's file.

RATE = keras.optimizers.schedules.ExponentialDecay(64.0, 10, 0.9)
CALLABLES = {
    "weighting": [
        losses.uniform,
        losses.truncated_snr,
        losses.SigmoidWeighting(np.float32(-1)),
    ],
    "schedule": [
        schedules.KarrasSchedule(),
        schedules.ShiftedCosineSchedule(
            image_resolution=np.int64(64), noise_resolution=32
        ),
    ],
    "integrator": [
        samplers.DDIM(),
        samplers.Heun(),
        samplers.ADDIM(x_var=MeasuredVariance(TABLE)),
    ],
    "x_var": [functional.analytic_x_var, MeasuredVariance(TABLE)],
    "teacher_steps": [RATE],
    "loss": [
        losses.L2(),
        losses.Multiscale(losses.PseudoHuber(np.float32(0.5))),
    ],
}


@pytest.mark.parametrize(
    ("argument", "value"),
    [(name, value) for name, values in CALLABLES.items() for value in values],
)
def test_a_function_is_in_the_file_of_its_model(argument, value, tmp_path):
    world = World(tmp_path)
    arguments = world.of_plain(student_steps=2, seed=np.int64(5))
    loss = {argument: value} if argument == "loss" else {}
    student = MultistepConsistencyModel(
        **arguments, **({} if loss else {argument: value})
    )
    student.compile(keras.optimizers.Adam(1e-3), **loss)
    student.save(tmp_path / "model.keras")
    back = keras.saving.load_model(tmp_path / "model.keras")
    assert type(back) is MultistepConsistencyModel
    kept = (back.loss if loss else getattr(back, argument)), value
    configs = [keras.saving.serialize_keras_object(each) for each in kept]
    assert configs[0] == configs[1]
    for ours, theirs in zip(back.variables, student.variables, strict=True):
        np.testing.assert_array_equal(
            ops.convert_to_numpy(ours), ops.convert_to_numpy(theirs)
        )


def test_a_preset_takes_and_gives_numpy_numbers(tmp_path):
    world = World(tmp_path)
    network = UViT(**{**world.of_uvit(), "num_classes": np.int64(2)})
    model = DiffusionModel(network, label_dropout=np.float32(0.25))
    model.save_to_preset(tmp_path / "preset", metadata={"steps": 3})
    back = DiffusionModel.from_preset(
        tmp_path / "preset", ema_decay=np.float32(0.5), seed=np.int64(2)
    )
    assert (back.label_dropout, back.ema_decay, back.seed) == (0.25, 0.5, 2)
    assert back.num_classes == 2
    json.dumps(back.get_config())
