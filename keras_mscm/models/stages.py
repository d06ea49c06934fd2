"""Stages of a training, in each of which the last one's student teaches.

The functions are of a model that holds its teacher, by `hold_first`, and says
its `stages` and its `iterations_per_stage`.
"""

from typing import Any

import keras
from keras import ops

from keras_mscm import checks
from keras_mscm.functional.process import Tensor
from keras_mscm.models.moving_average import AveragedWeights, clone_network
from keras_mscm.teachers import FrozenNetwork


def check(kwargs: dict[str, Any]) -> dict[str, Any]:
    """A model's keywords; raises if they don't go with stages.

    Raises:
        ValueError: If the teacher is to be guided, or weights are to be shared.
    """
    kwargs = {**kwargs}
    checks.check_number(
        "guidance_scale",
        kwargs.pop("guidance_scale", 1.0),
        1,
        "1, because after the first stage the teacher is a student, which "
        "would be guided again; distil the guided teacher by a "
        "`GuidanceDistillationModel` first",
        high=1,
    )
    checks.check_choice("ema", kwargs.get("ema", "auto"), ("auto",))
    if kwargs.get("lora_rank") is not None:
        raise checks.invalid(
            "lora_rank",
            "None, because each stage's teacher is the whole network",
            kwargs["lora_rank"],
        )
    return kwargs


def hold_first(model: Any) -> FrozenNetwork:
    """A teacher that is a part of the model: at first its own network."""
    if isinstance(model.ema_network, AveragedWeights):
        raise ValueError(
            "`network` must not have LoRA enabled, because each stage's "
            "teacher is the whole network. Received: one that has"
        )
    return held(model, "teacher")


def held(model: Any, name: str) -> FrozenNetwork:
    """A copy of the model's network that is a part of it, frozen."""
    teacher = FrozenNetwork(name=name)
    inputs = model.symbolic_inputs()
    copy = clone_network(model.network, f"{name}_network", inputs)
    teacher.hold(copy, model.prediction_type)
    return teacher


def present(model: Any) -> Tensor:
    """The present stage, an integer scalar from 0."""
    done = model.iteration.value // model.iterations_per_stage
    return ops.minimum(done, model.stages - 1)


def after_update(model: Any, before: Tensor, others: list[keras.Layer]) -> None:
    """Where a stage ends, its average takes the place of other networks.

    Args:
        model: The model.
        before: The optimizer's iterations before this step.
        others: The networks, with the average's weights.
    """
    i = model.iteration.value
    ends = ops.logical_and(
        i % model.iterations_per_stage == 0,
        i < model.stages * model.iterations_per_stage,
    )
    # Of the batches of a gradient accumulation only the last updates.
    ends = ops.logical_and(ends, model.optimizer.iterations > before)
    for average, *weights in zip(
        model.ema_network.weights,
        *(other.weights for other in others),
        strict=True,
    ):
        for weight in weights:
            weight.assign(ops.where(ends, average.value, weight.value))
