"""Every public call of the package, with arguments that are good."""

import inspect
import tempfile
from pathlib import Path

import keras
import numpy as np

import keras_mscm
import keras_mscm.networks
from keras_mscm import (
    callbacks,
    datasets,
    distribution,
    losses,
    metrics,
    samplers,
    schedules,
    variance,
)
from tests.properties.bad_values import Call

IMAGES = np.random.default_rng(0).uniform(-1, 1, (6, 4, 4, 1)).astype("float32")
LABELS = np.arange(6) % 3
PLACE = Path(tempfile.mkdtemp())

# Not called with bad values: what is abstract, what takes tensors within a
# compiled step (whose values nobody can look at without waiting), and a tuple.
EXEMPT = {
    "samplers.NoiseSchedule",
    "samplers.Sampler",
    "samplers.StepSeed",
    "schedules.NoiseSchedule",
    "losses.snr_plus_one",
    "losses.sqrt_snr_plus_one",
    "losses.truncated_snr",
    "losses.uniform",
    "datasets.EmojiImages",
    # Keras' own arguments.
    "distribution.UnevenModelParallel",
}


def public():
    """What is public by its name, but for `functional`, which takes tensors."""
    modules = {"": keras_mscm, "networks": keras_mscm.networks}
    modules |= {
        name: getattr(keras_mscm, name)
        for name in keras_mscm.__all__
        if inspect.ismodule(getattr(keras_mscm, name)) and name != "functional"
    }
    for title, module in modules.items():
        names = getattr(module, "__all__", None) or [*vars(module)]
        for name in names:
            value = getattr(module, name)
            ours = getattr(value, "__module__", "").startswith("keras_mscm")
            if name.startswith("_") or not ours or not callable(value):
                continue
            # Where it stands, and not where it is used.
            if title in ("", value.__module__.split(".")[1]):
                yield f"{title}.{name}" if title else name, value


def network(num_classes=3):
    inputs = {
        "z": keras.Input((4, 4, 1), name="z"),
        "logsnr": keras.Input((), name="logsnr"),
        "labels": keras.Input((), dtype="int32", name="labels"),
    }
    level = keras.layers.Reshape((1, 1, 1))(inputs["logsnr"])
    label = keras.layers.Embedding(num_classes + 1, 1)(inputs["labels"])
    label = keras.layers.Reshape((1, 1, 1))(label)
    outputs = keras.layers.Dense(1)(inputs["z"]) + 0.1 * level + label
    return keras.Model(inputs, outputs)


def of_images(images):
    return np.asarray(images).mean(axis=(1, 2))


def calls():
    """The registry: a name in `public`, or one of a method, and its call."""
    net = network()
    teacher = keras_mscm.DiffusionModel(
        net, image_shape=(4, 4, 1), num_classes=3, label_dropout=0.1
    )
    teacher.compile("sgd")
    student = keras_mscm.MultistepConsistencyModel.from_teacher(
        teacher, student_steps=2, teacher_steps=8
    )
    student.compile("sgd")
    reference = metrics.Reference(IMAGES, of_images, name="noise")

    model = {
        "network": "object",
        "schedule": ("object", "None"),
        "prediction_type": "object",
        "weighting": ("function", "None"),
        "image_shape": "object",
        # Without, the network here lacks its labels, which is Keras' to say.
        "num_classes": ("integer from 1", "None"),
        "context_width": ("integer from 1", "None"),
        "label_dropout": "in [0, 1)",
        "ema_decay": "in [0, 1)",
        "ema_half_life": ("number above 0", "None", "10**30"),
        "seed": "seed",
    }
    of_model = {
        "network": net,
        "schedule": schedules.CosineSchedule(),
        "image_shape": (4, 4, 1),
        "num_classes": 3,
    }
    taught = {**model, "guidance_scale": ("number from 0", "10**30")}
    taught_student = {
        **taught,
        "student_steps": "integer from 1",
        "integrator": ("function", "None"),
        "eta": "in [0, 1]",
        "x_var": ("function", "None"),
    }
    drawing = {
        "num_images": "integer from 1",
        "labels": "object",
        "context": "object",
        "context_mask": "object",
        "noise": "object",
        "seed": "seed",
        "batch_size": "integer from 1",
    }
    sampling = {
        "every": "integer from 1",
        "num_images": "integer from 1",
        # What suits the model is told when training begins.
        "labels": ("object", "array"),
        "context": ("object", "array"),
        "context_mask": ("object", "array"),
        "batch_size": "integer from 1",
        "seed": "integer from 0",
    }
    loader = {
        "batch_size": "integer from 1",
        "shuffle": "boolean",
        "seed": "seed",
        "flip": "boolean",
        "repeat": "boolean",
        "drop_remainder": "boolean",
        "shard": ("object", "None"),
    }
    mesh = keras.distribution.DeviceMesh((1, 1), ["batch", "model"], ["cpu:0"])
    pixels = (IMAGES[:4] * 100 + 100).astype("uint8")
    bounds = {"logsnr_min": ("number",), "logsnr_max": ("number",)}
    sides = {"image_resolution": "number above 0"}

    return {
        "DenoisingModel": Call(keras_mscm.DenoisingModel, of_model, model)
        if hasattr(keras_mscm.DenoisingModel, "default_weighting")
        else Call(_abstract_model(), of_model, model),
        "DiffusionModel": Call(keras_mscm.DiffusionModel, of_model, model),
        "GuidanceDistillationModel": Call(
            keras_mscm.GuidanceDistillationModel,
            {**of_model, "label_dropout": 0.1},
            taught,
        ),
        "MultistepConsistencyModel": Call(
            keras_mscm.MultistepConsistencyModel,
            {**of_model, "student_steps": 2},
            {
                **taught_student,
                "method": "object",
                "teacher_steps": ("number from 1",),
                "reference": "object",
            },
        ),
        "ProgressiveDistillationModel": Call(
            keras_mscm.ProgressiveDistillationModel,
            {**of_model, "student_steps": 2},
            {
                **{
                    name: kind
                    for name, kind in taught_student.items()
                    if name != "guidance_scale"
                },
                "teacher_steps": "integer from 1",
                "iterations_per_stage": "integer from 1",
            },
        ),
        "UViT": Call(
            keras_mscm.UViT,
            {
                "image_shape": (4, 4, 1),
                "widths": (8,),
                "depths": (1,),
                "attention": True,
                "head_width": 4,
                "embedding_width": 8,
            },
            {
                "image_shape": "object",
                "widths": "object",
                "depths": "object",
                "attention": "boolean",
                "num_classes": "integer from 1",
                "context_width": "integer from 1",
                "patch_size": "integer from 1",
                "head_width": "integer from 1",
                "mlp_ratio": "integer from 1",
                "embedding_width": "integer from 1",
                "dropout": "in [0, 1)",
                "seed": "seed",
                "remat": "boolean",
            },
        ),
        "DiffusionModel.generate": Call(
            teacher.check_generate,
            {"num_images": 2},
            {
                **drawing,
                "num_steps": "integer from 1",
                "sampler": "function",
                "schedule": "object",
                "guidance_scale": ("number from 0", "10**30"),
            },
            like=teacher.generate,
        ),
        "MultistepConsistencyModel.generate": Call(
            student.check_generate,
            {"num_images": 2},
            {**drawing, "num_steps": "integer from 1"},
            like=student.generate,
        ),
        "fit": Call(
            teacher.fit,
            {"x": IMAGES, "y": LABELS, "verbose": 0},
            {"x": "object", "nonnegative": "boolean"},
        ),
        "measure_x_var": Call(
            teacher.measure_x_var,
            {"x": IMAGES, "y": LABELS},
            {
                "x": "object",
                "eta": "in [0, 1]",
                "batch_size": "integer from 1",
                "seed": "seed",
                "nonnegative": "boolean",
            },
        ),
        "compile": Call(
            teacher.compile,
            {"optimizer": "sgd"},
            {"loss": ("object", *_NO_LOSS)},
        ),
        "attach_teacher": Call(
            student.attach_teacher, {"teacher": teacher}, {"teacher": "object"}
        ),
        "from_teacher": Call(
            keras_mscm.MultistepConsistencyModel.from_teacher,
            {"teacher": teacher, "student_steps": 2},
            {"teacher": "object", "student_steps": "integer from 1"},
        ),
        "from_preset": Call(
            keras_mscm.DiffusionModel.from_preset,
            {"preset": "digits", "load_weights": False},
            {"preset": "object", "load_weights": "boolean"},
        ),
        "save_to_preset": Call(
            teacher.save_to_preset,
            {"preset": PLACE / "preset"},
            {
                "preset": ("object", "words"),
                "weights_dtype": "object",
                "metadata": ("object", "{}"),
            },
        ),
        "anneal_teacher_steps": Call(
            student.anneal_teacher_steps,
            {"start": 2, "end": 4, "iterations": 10},
            {
                "start": ("number from 1",),
                "end": ("number from 1",),
                "iterations": "integer from 1",
            },
        ),
        "callbacks.TeacherStepAnneal": Call(
            callbacks.TeacherStepAnneal,
            {"start": 8, "end": 16, "iterations": 10},
            {
                "start": ("number from 1", "None"),
                "end": ("number from 1", "None"),
                "iterations": ("integer from 1", "None"),
            },
        ),
        "callbacks.ResumeTraining": Call(
            callbacks.ResumeTraining,
            {"directory": PLACE},
            {"directory": "path", "save_freq": "integer from 1"},
        ),
        "callbacks.SampleGrid": Call(
            callbacks.SampleGrid,
            {"directory": PLACE, "every": 1, "num_images": 2},
            {
                **sampling,
                "directory": "path",
                "columns": "integer from 1",
                "tensorboard": "path",
            },
        ),
        "callbacks.EvaluateSamples": Call(
            callbacks.EvaluateSamples,
            {
                "metrics": [keras.metrics.Mean(name="mean")],
                "every": 1,
                "num_images": 2,
            },
            {
                **sampling,
                "metrics": "object",
                "best_weights": "object",
                "monitor": "object",
                "mode": "object",
                "results": "path",
            },
        ),
        "datasets.ImageBatches": Call(
            datasets.ImageBatches,
            {"read": pixels.__getitem__, "num_images": 4, "batch_size": 2},
            {
                **loader,
                "read": "function",
                "num_images": "integer from 1",
                "labels": "object",
                "class_names": "object",
            },
        ),
        "datasets.from_arrays": Call(
            datasets.from_arrays,
            {"images": IMAGES, "batch_size": 2},
            {
                **loader,
                "images": "object",
                "labels": "object",
                "image_size": "object",
                "nonnegative": "boolean",
            },
        ),
        "datasets.from_folder": Call(
            datasets.from_folder,
            {
                "directory": _folder(),
                "image_size": 4,
                "batch_size": 2,
            },
            {
                **loader,
                "directory": "object",
                "image_size": "integer from 1",
                "labels": "boolean",
                "channels": "object",
                "workers": "integer from 1",
                "class_names": "object",
            },
        ),
        "datasets.from_keras": Call(
            datasets.from_keras,
            {"name": "words", "batch_size": 2},
            {"name": "object"},
        ),
        "datasets.from_tfds": Call(
            datasets.from_tfds,
            {"name": "words", "batch_size": 2},
            {
                "batch_size": "integer from 1",
                "image_size": "integer from 1",
                "labels": "boolean",
                "shuffle": "boolean",
                "shuffle_buffer": "integer from 1",
                "seed": "seed",
                "flip": "boolean",
                "repeat": "boolean",
                "drop_remainder": "boolean",
                "shard": "object",
            },
        ),
        "datasets.emoji": Call(
            datasets.emoji,
            {"font": __file__},
            {
                "image_size": "integer from 1",
                "sequences": "boolean",
            },
        ),
        "distribution.fully_sharded": Call(
            distribution.fully_sharded,
            {"device_mesh": mesh},
            {"device_mesh": "object"},
        ),
        "distribution.tensor_parallel": Call(
            distribution.tensor_parallel,
            {"device_mesh": mesh},
            {"device_mesh": "object"},
        ),
        "losses.SquaredL2": Call(losses.SquaredL2, {}),
        "losses.L2": Call(losses.L2, {}),
        "losses.PseudoHuber": Call(
            losses.PseudoHuber, {}, {"huber_epsilon": "number above 0"}
        ),
        "losses.Multiscale": Call(
            losses.Multiscale,
            {"loss": losses.L2()},
            {"loss": "object", "num_poolings": "integer from 1"},
        ),
        "losses.SigmoidWeighting": Call(
            losses.SigmoidWeighting, {"bias": 0}, {"bias": "number"}
        ),
        "metrics.FeatureExtractor": Call(
            metrics.FeatureExtractor,
            {"function": of_images, "name": "means"},
            {
                "function": "function",
                "name": "text",
                "resize": "text",
                "batch_size": "integer from 1",
            },
        ),
        "metrics.FrechetDistance": Call(
            metrics.FrechetDistance,
            {"reference": reference},
            {"reference": "object", "name": "text"},
        ),
        "metrics.ImprovedPrecision": Call(
            metrics.ImprovedPrecision,
            {"reference": reference},
            {
                "reference": "object",
                "neighbours": "integer from 1",
                "name": "text",
            },
        ),
        "metrics.ImprovedRecall": Call(
            metrics.ImprovedRecall,
            {"reference": reference},
            {
                "reference": "object",
                "neighbours": "integer from 1",
                "name": "text",
            },
        ),
        "metrics.KernelDistance": Call(
            metrics.KernelDistance,
            {"reference": reference, "subset_size": 3},
            {
                "reference": "object",
                "num_subsets": "integer from 1",
                "subset_size": "integer from 1",
                "seed": "integer from 0",
                "name": "text",
            },
        ),
        "metrics.Reference": Call(
            metrics.Reference,
            {"images": IMAGES, "extractor": of_images, "name": "noise"},
            {
                "images": "object",
                "extractor": "object",
                "name": "text",
                "keep_features": "boolean",
                "nonnegative": "boolean",
            },
        ),
        "metrics.classifier_features": Call(
            metrics.classifier_features,
            {"images": IMAGES, "labels": LABELS, "epochs": 1},
            {
                "images": "object",
                "labels": "object",
                "body": "object",
                "epochs": "integer from 1",
                "batch_size": "integer from 1",
                "learning_rate": ("number above 0",),
                "seed": "integer from 0",
                "name": "text",
                "nonnegative": "boolean",
            },
        ),
        "metrics.frechet_distance": Call(
            metrics.frechet_distance,
            {
                "mean_1": [0.0, 1.0],
                "covariance_1": np.eye(2),
                "mean_2": [0.0, 1.0],
                "covariance_2": np.eye(2),
            },
            {
                "mean_1": "object",
                "covariance_1": "object",
                "mean_2": "object",
                "covariance_2": "object",
            },
        ),
        "metrics.inception_v3": Call(
            metrics.inception_v3,
            {"weights": "words"},
            {"size": "object", "weights": ("object", "None", "words")},
        ),
        "metrics.keras_features": Call(
            metrics.keras_features,
            {
                "model": keras.Sequential(
                    [keras.Input((4, 4, 1)), keras.layers.Conv2D(2, 3)]
                )
            },
            {
                "model": "object",
                "name": "text",
                "size": "object",
                "interpolation": "object",
                "antialias": "boolean",
                "mean": "number",
                "std": "number above 0",
                "pool": "function",
                "batch_size": "integer from 1",
            },
        ),
        "presets.summary": Call(keras_mscm.presets.summary, {}),
        "samplers.DDIM": Call(samplers.DDIM, {}),
        "samplers.Heun": Call(samplers.Heun, {}),
        "samplers.DDPM": Call(samplers.DDPM, {}),
        "samplers.ADDIM": Call(samplers.ADDIM, {}, {"x_var": "function"}),
        "samplers.NoisyDDIM": Call(
            samplers.NoisyDDIM, {}, {"x_var": "function"}
        ),
        "schedules.CosineSchedule": Call(schedules.CosineSchedule, {}, bounds),
        "schedules.ShiftedCosineSchedule": Call(
            schedules.ShiftedCosineSchedule,
            {"image_resolution": 64, "noise_resolution": 32},
            {**bounds, **sides, "noise_resolution": "number above 0"},
        ),
        "schedules.InterpolatedCosineSchedule": Call(
            schedules.InterpolatedCosineSchedule,
            {
                "image_resolution": 64,
                "noise_resolution_low": 32,
                "noise_resolution_high": 64,
            },
            {
                **bounds,
                **sides,
                "noise_resolution_low": "number above 0",
                "noise_resolution_high": "number above 0",
            },
        ),
        "schedules.KarrasSchedule": Call(
            schedules.KarrasSchedule,
            {},
            {
                "sigma_min": "number above 0",
                "sigma_max": "number above 0",
                "rho": "number above 0",
            },
        ),
        "MeasuredVariance": Call(
            variance.MeasuredVariance,
            {"table": [0.5] * 64},
            {"table": "object"},
        ),
    }


# The loss of the algorithm, and Keras' own functions of two arrays.
_NO_LOSS = ("None", "empty", "lambda")


def _abstract_model():
    class Model(keras_mscm.DenoisingModel):
        default_weighting = staticmethod(losses.uniform)

    return Model


def _folder():
    import PIL.Image

    for name in ("cat", "dog"):
        (PLACE / "pictures" / name).mkdir(parents=True, exist_ok=True)
        picture = PIL.Image.new("RGB", (4, 4))
        picture.save(PLACE / "pictures" / name / "1.png")
    return PLACE / "pictures"
