"""The steps that a plan is of, from abstract shapes: no weight has a value."""

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_mscm import preset_files, samplers
from keras_mscm.distribution import UnevenModelParallel, fully_sharded
from keras_mscm.generator import Generator
from keras_mscm.models.diffusion import DiffusionModel
from keras_mscm.models.multistep_consistency import MultistepConsistencyModel
from keras_mscm.plan import compiler, foreign
from keras_mscm.plan.chips import Slice

METHODS = ("training", "distillation", "generate")
CONTEXT_LENGTH = 128


@dataclasses.dataclass(frozen=True)
class Step:
    """A function to be compiled, and what it is called with.

    Args:
        model: The model that it belongs to.
        function: Function of values of `variables`, a batch and constants.
        variables: Structure of Keras variables.
        batch: Structure of `keras.KerasTensor`s.
        constants: `keras.KerasTensor`s that don't belong to the batch.
        updates: Whether it returns new values of its variables.
        passes: Forward passes of the network that its arithmetic comes to; a
            pass with its gradient is three.
    """

    model: MultistepConsistencyModel
    function: Callable[..., Any]
    variables: Any
    batch: Any
    constants: tuple
    updates: bool
    passes: int

    def sharded_axes(self, chips: Slice) -> Callable[[keras.Variable], tuple]:
        """Which axis of each variable the chips share out.

        Args:
            chips: The slice.

        Returns:
            Function of a variable: the axes of its layout in `fully_sharded`,
            but for what doesn't divide evenly, which stays whole. The
            optimizer's variables are laid out as their weights are.
        """
        names = [f"tpu:{i}" for i in range(chips.num_chips)]
        mesh = keras.distribution.DeviceMesh((len(names),), ["batch"], names)
        distribution = UnevenModelParallel(layout_map=fully_sharded(mesh))
        # Keras names a slot `adam/path_of_its_weight_momentum`.
        weights = {
            weight.path.replace("/", "_"): weight
            for weight in self.model.trainable_variables
        }

        def axes_of(variable):
            slot = variable.path.split("/")[-1].rsplit("_", 1)[0]
            weight = weights.get(slot, variable) if variable.shape else variable
            return distribution.get_variable_layout(weight).axes

        return axes_of


def step_of(
    preset: str | os.PathLike,
    method: str,
    batch_size: int,
    *,
    student_steps: int,
    dtype: str,
    remat: bool,
    gradient_accumulation_steps: int | None,
    lora_rank: int | None = None,
    guidance_scale: float | None = None,
) -> Step:
    """The training step, or `generate`, of a multistep consistency model.

    Args:
        preset: Name or directory of the network's preset, or the name of a
            foreign network.
        method: `"training"` (CT), `"distillation"` (CD, with the teacher's
            network) or `"generate"`.
        batch_size: Images per step.
        student_steps: Evaluations of the network in `generate`.
        dtype: Policy, such as `"mixed_bfloat16"`.
        remat: Whether the network's blocks are computed twice, and not kept.
        gradient_accumulation_steps: Batches to an update, or None.
        lora_rank: Rank of adapters that are trained in the weights' place, or
            None.
        guidance_scale: Of the teacher in distillation; None for none.

    Returns:
        The step as `fit` or `generate` compiles it, with Adam and the moving
        average of the weights.
    """
    # Outside, as these few variables begin with numbers; those of the weights'
    # size come with `compile`.
    optimizer = keras.optimizers.Adam(
        gradient_accumulation_steps=gradient_accumulation_steps
    )

    student: dict[str, Any] = {"student_steps": student_steps}
    if lora_rank is not None:
        student["lora_rank"] = lora_rank
    if guidance_scale is not None:
        student["guidance_scale"] = guidance_scale

    def make():
        if foreign.is_foreign(preset):
            model = _of_foreign(preset, method, dtype, remat, student)
        else:
            model = _of_preset(preset, method, dtype, remat, student)
        model.compile(optimizer=optimizer)
        return model

    model = compiler.without_values(make)
    images = _tensor((batch_size, *model.image_shape))
    conditioning = _conditioning(model, batch_size)
    if method == "generate":
        return _generate(model, images, conditioning)
    # As `fit` takes them: labels alone, or a dictionary.
    y: Any = conditioning
    if list(conditioning) == ["labels"]:
        y = conditioning["labels"]
    return Step(
        model=model,
        function=model.train_step,
        variables=(
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        ),
        batch=(images, y) if conditioning else (images,),
        constants=(),
        updates=True,
        # The trained pass, the reference, and in distillation the teacher,
        # which guidance asks twice.
        passes=4
        + (method == "distillation")
        + (guidance_scale not in (None, 1)),
    )


def _of_preset(
    preset: str | os.PathLike,
    method: str,
    dtype: str,
    remat: bool,
    student: dict[str, Any],
) -> MultistepConsistencyModel:
    differs = {"remat": True} if remat else {}
    network = preset_files.load_network(
        keras.Layer, preset, load_weights=False, dtype=dtype, **differs
    )
    if method != "distillation":
        return preset_files.load_model(
            MultistepConsistencyModel,
            preset,
            load_weights=False,
            network=network,
            method="training",
            **student,
        )
    teacher = preset_files.load_model(
        DiffusionModel, preset, load_weights=False, network=network
    )
    return MultistepConsistencyModel.from_teacher(teacher, **student)


def _of_foreign(
    preset: Any, method: str, dtype: str, remat: bool, student: dict[str, Any]
) -> MultistepConsistencyModel:
    """A foreign network's student, which holds what is frozen once."""
    return MultistepConsistencyModel.from_teacher(
        foreign.FOREIGN[preset](dtype, remat),
        copy=False,
        method="distillation" if method == "distillation" else "training",
        **student,
    )


def _generate(model: Any, noise: Any, conditioning: dict) -> Step:
    run = Generator(model, samplers.DDIM())
    variables = run.variables

    def function(values, batch, num_steps, seed):
        with keras.StatelessScope(zip(variables, values)):
            return run(*batch, num_steps, seed)

    return Step(
        model=model,
        function=function,
        variables=variables,
        batch=(noise, conditioning),
        constants=(_tensor((), "int32"), _tensor((2,), "uint32")),
        updates=False,
        passes=model.largest_steps,
    )


def state_parts(step: Step) -> dict[str, float]:
    """Bytes of a step's variables, by what they are of; each counted once."""
    model = step.model
    parts: dict[int, str] = {}
    network, codec = model.network, (model.encoder, model.decoder)
    trained = "network" if model.lora_rank is None else "adapters"
    for name, variables in (
        (trained, network.trainable_variables),
        ("frozen network", network.variables),
        ("moving average", model.ema_network.variables),
        ("optimizer", model.optimizer.variables),
        ("teacher", model.teacher.variables if model.teacher else []),
        ("autoencoder", [v for c in codec if c for v in c.variables]),
    ):
        for variable in variables:
            parts.setdefault(id(variable), name)
    sizes: dict[str, float] = {}
    for variable in keras.tree.flatten(step.variables):
        name = parts.get(id(variable), "other")
        sizes[name] = sizes.get(name, 0) + bytes_of(variable)
    return sizes


def bytes_of(variable: keras.Variable) -> int:
    """What a variable's values take."""
    return math.prod(variable.shape) * np.dtype(variable.dtype).itemsize


def gradient_bytes(step: Step) -> int:
    """What the gradients of a step's trained weights take."""
    weights = step.model.trainable_variables if step.updates else []
    return sum(map(bytes_of, weights))


def pass_flops(model: Any) -> float:
    """FLOPs of the network's pass over one example."""
    network: Any = model.network
    if hasattr(network, "flops"):
        return network.flops()
    inputs = {"z": _tensor((1, *model.image_shape)), "logsnr": _tensor((1,))}
    return compiler.flops_of(network, inputs | _conditioning(model, 1))


def _conditioning(model: Any, batch_size: int) -> dict[str, Any]:
    return {
        name: condition.symbolic(batch_size, CONTEXT_LENGTH)
        for name, condition in model.conditioning.items()
    }


def _tensor(shape: tuple, dtype: str = "float32") -> keras.KerasTensor:
    return keras.KerasTensor(shape, dtype)
