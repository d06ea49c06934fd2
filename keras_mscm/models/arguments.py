"""The arguments of a `DenoisingModel`: checked, completed, written down."""

import contextlib
import math
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np

from keras_mscm import checks, lora
from keras_mscm.conditioning import Condition, check_declared, standard
from keras_mscm.functional import process
from keras_mscm.models.sampling import check_schedule
from keras_mscm.preset_files import untrusted
from keras_mscm.schedules import CosineSchedule
from keras_mscm.spaces import Pixels, Space

EMA_DECAY = 0.9999
BELOW_1 = math.nextafter(1, 0)


def check(
    network: Any,
    schedule: Any,
    prediction_type: Any,
    weighting: Any,
    label_dropout: Any,
    guidable: Any,
    seed: Any,
) -> SimpleNamespace:
    """Raises unless each is what `DenoisingModel` takes, and completes them.

    Returns:
        `schedule`, `label_dropout` and `seed`, as the model is to have them.
    """
    if not isinstance(network, keras.Layer):
        raise checks.invalid("network", "a Keras layer or model", network)
    schedule = CosineSchedule() if schedule is None else schedule
    check_schedule(schedule)
    checks.check_choice(
        "prediction_type", prediction_type, process.PREDICTION_TYPES
    )
    _agreed("prediction_type", prediction_type, network)
    label_dropout = checks.check_number(
        "label_dropout", label_dropout, 0, "in [0, 1)", BELOW_1
    )
    checks.check_boolean("guidable", guidable)
    if weighting is not None:
        checks.check_function(
            "weighting",
            weighting,
            "a function of log-SNR, as those of `keras_mscm.weightings`",
        )
    return SimpleNamespace(
        schedule=schedule,
        label_dropout=label_dropout,
        seed=checks.check_seed("seed", seed),
    )


def check_average(ema: Any, ema_decay: Any, ema_half_life: Any) -> None:
    """Raises unless these say one thing about the moving average."""
    if ema is not None:
        checks.check_choice("ema", ema, ("auto", "bfloat16"))
    checks.check_number("ema_decay", ema_decay, 0, "in [0, 1)", BELOW_1)
    if ema_half_life is not None:
        checks.check_positive_number("ema_half_life", ema_half_life)
    if ema is None and (ema_decay != EMA_DECAY or ema_half_life is not None):
        raise ValueError(
            "`ema_decay` and `ema_half_life` must not be given with ema=None, "
            f"which keeps no average. Received: ema_decay={ema_decay}, "
            f"ema_half_life={ema_half_life}"
        )


def space_of(network: keras.Layer, space: Any, image_shape: Any) -> Space:
    """What `x` is, as the arguments and the network say.

    Raises:
        ValueError: If neither says it, or they disagree.
    """
    image_shape = _agreed("image_shape", image_shape, network)
    if space is None:
        axes = "height", "width", "channels"
        return Pixels(checks.check_shape("image_shape", image_shape, axes))
    if not isinstance(space, Space):
        raise checks.invalid(
            "space", "one of `keras_mscm.spaces`, such as `Box((1,))`", space
        )
    if image_shape is None:
        return space
    checks.check_sequence("image_shape", image_shape, "a shape, or None")
    if tuple(image_shape) != space.shape:
        raise ValueError(
            f"`space` must be of the shape {tuple(image_shape)}, as the "
            f"network or `image_shape` says. Received: {space.shape}"
        )
    return space


def conditioning_of(
    network: keras.Layer, conditioning: Any, num_classes: Any, width: Any
) -> dict[str, Condition]:
    """What the network takes besides, as the arguments and it itself say.

    Raises:
        ValueError: If they disagree, or an argument is out of its range.
    """
    own = getattr(network, "conditioning", None)
    if own is not None:
        own = check_declared("network.conditioning", own)
    if conditioning is not None:
        conditioning = check_declared("conditioning", conditioning)
        if own is not None and own != conditioning:
            raise ValueError(
                f"`conditioning` must be what the network says, {own}. "
                f"Received: {conditioning}"
            )
    declared = own if conditioning is None else conditioning
    theirs = sizes_of(declared or {})
    sizes = []
    for name, value, own_size in (
        ("num_classes", num_classes, theirs[0]),
        ("context_width", width, theirs[1]),
    ):
        value = _agreed(name, value, network)
        if value is not None:
            checks.check_positive_integer(name, value, 2**31 - 2)
            if declared is not None and value != own_size:
                raise ValueError(
                    f"`{name}` must be what the conditioning says, {own_size}. "
                    f"Received: {name}={checks.describe(value)}"
                )
        sizes.append(value)
    return standard(*sizes) if declared is None else declared


def takes_logsnr_end(network: Any) -> bool:
    """Whether a network may be told where its prediction is to lead.

    A functional model says so by its inputs, any other by an attribute.
    """
    if getattr(network, "takes_logsnr_end", False):
        return True
    inputs = None
    with contextlib.suppress(AttributeError, ValueError):
        inputs = network.input
    return isinstance(inputs, dict) and "logsnr_end" in inputs


def declares(network: keras.Layer) -> bool:
    """Whether a network says what it is conditioned on, copied or loaded too.

    What was only set on a model of Keras' own classes, its copies lack.
    """
    of_keras = type(network).__module__.split(".")[0] == "keras"
    return getattr(network, "conditioning", None) is not None and not of_keras


def sizes_of(declared: dict[str, Condition]) -> tuple[Any, Any]:
    """`num_classes` and `context_width`, or None where there is none."""
    labels, context = declared.get("labels"), declared.get("context")
    shape = () if context is None else context.shape
    return (
        labels.num_classes if labels is not None else None,
        shape[-1] if len(shape) == 2 else None,
    )


def check_droppable(
    declared: dict[str, Condition], label_dropout: float, guidable: bool
) -> None:
    """Raises if conditioning is to be left out that can't be."""
    for name, value in (
        ("label_dropout", label_dropout),
        ("guidable", guidable),
    ):
        if not value:
            continue
        nothing = "0" if name == "label_dropout" else "False"
        if not declared:
            raise ValueError(
                f"`{name}` must be {nothing} for a network without "
                f"conditioning. Received: {name}={value}"
            )
        if not any(condition.can_be_absent for condition in declared.values()):
            raise ValueError(
                f"`{name}` must be {nothing} if the network declares nothing "
                "that says nothing: give one of its conditions a `null`. "
                f"Received: {name}={value}, conditioning {declared}"
            )


def symbolic_inputs(model: Any) -> dict[str, keras.KerasTensor]:
    """The network's inputs without values, for a batch of any size."""
    times = ["logsnr", "logsnr_end"][: 1 + model.takes_logsnr_end]
    return {
        "z": keras.KerasTensor((None, *model.space.shape), "float32"),
        **{k: keras.KerasTensor((None,), "float32") for k in times},
        **{k: c.symbolic() for k, c in model.conditioning.items()},
    }


def check_network(
    network: keras.Layer, space: Space, inputs: dict[str, keras.KerasTensor]
) -> None:
    """Builds the network; raises unless it returns what it should.

    Args:
        network: The network.
        space: What it should return.
        inputs: What it is given, without values.
    """
    try:
        output = network(inputs)
        if type(network).compute_output_shape is not _NO_SHAPE:
            # What a layer says of its output, Keras believes without a call.
            output = _Called(network)(inputs)
    except Exception as error:  # because it is anybody's network
        shapes = {name: tuple(value.shape) for name, value in inputs.items()}
        raise ValueError(
            f"`network` must take {shapes}, which `image_shape` or `space` "
            "and `conditioning`, or `num_classes` and `context_width`, say. "
            f"Received: a network that raises {type(error).__name__}: "
            f"{untrusted.summary(error)}"
        ) from error
    shape = tuple(getattr(output, "shape", ()))[1:]
    if shape != space.shape:
        raise ValueError(
            f"`network` must return images of the shape of `z`, {space.shape}. "
            f"Received: a network that returns {shape}"
        )
    _check_codec(space)
    for layer in _within([network, space.encoder, space.decoder]):
        # Keras would build a layer that no Keras layer calls (of another
        # framework, for example) by calling the model on raw images.
        layer.built = True


def _check_codec(space: Space) -> None:
    """Builds encoder and decoder; raises unless they suit their space."""
    pictures = space.picture_shape or ()
    *size, channels = space.shape
    moments = (*size, 2 * channels)
    latents = f"latents of shape {space.shape}, or of twice its channels"
    for name, layer, shape, allowed, what in (
        ("encoder", space.encoder, pictures, (space.shape, moments), latents),
        (
            "decoder",
            space.decoder,
            space.shape,
            (pictures,),
            f"pictures of image_shape={pictures}",
        ),
    ):
        if layer is None:
            continue
        given = keras.KerasTensor((None, *shape), "float32")
        try:
            if not layer.built:
                layer(given)
            output = _Called(layer, training=False)(given)
        except Exception as error:  # because it is anybody's layer
            raise ValueError(
                f"`{name}` must take arrays {tuple(given.shape)}. Received: "
                f"a layer that raises {type(error).__name__}: "
                f"{untrusted.summary(error)}"
            ) from error
        shape = tuple(getattr(output, "shape", ()))[1:]
        if shape not in allowed:
            raise ValueError(
                f"`{name}` must return {what}. Received: a layer that returns "
                f"{shape}"
            )


_NO_SHAPE = keras.Layer.compute_output_shape


class _Called(keras.layers.Layer):
    """Traces a network, whatever it says of its output."""

    def __init__(self, network: keras.Layer, **kwargs: Any):
        super().__init__()
        self._call = lambda inputs: network(inputs, **kwargs)
        self.built = True

    def call(self, inputs: Any) -> Any:
        return self._call(inputs)


def _within(layers: list) -> list[keras.Layer]:
    found, waiting = {}, [layer for layer in layers if layer is not None]
    while waiting:
        layer = waiting.pop()
        if id(layer) not in found:
            found[id(layer)] = layer
            waiting.extend(getattr(layer, "_layers", []))
    return [*found.values()]


def enable_lora(
    network: keras.Layer, lora_rank: Any, lora_targets: Any
) -> tuple[int | None, tuple[str, ...] | None]:
    """Gives a network adapters, if there is a rank.

    Returns:
        The two arguments.

    Raises:
        ValueError: If one is out of its range.
    """
    if lora_rank is None:
        if lora_targets is not None:
            raise ValueError(
                "`lora_targets` must not be given without `lora_rank`, which "
                "adapters need. Received: lora_targets="
                f"{checks.describe(lora_targets)}"
            )
        return None, None
    lora.enable(network, lora_rank, lora_targets)
    return int(lora_rank), lora_targets and tuple(lora_targets)


def check_guidable(model: Any, name: str, value: Any) -> None:
    """Raises unless the model can do without its conditioning.

    Args:
        name: What asks for guidance, as a message is to call it.
        value: What came.
    """
    if not (model.label_dropout or model.guidable):
        raise ValueError(
            f"`{name}` must not be given: guidance needs a model that was "
            "trained with label_dropout > 0 to do without its conditioning, or "
            "elsewhere (`guidable=True`; an adapter's `null_conditioning`). "
            f"Received: {name}={value}"
        )


def config_of(model: Any) -> dict[str, Any]:
    """The arguments that a model was made with, for Keras' serialisation."""
    serialize = keras.saving.serialize_keras_object
    space: Any = model.space
    config = {
        "network": serialize(model.network),
        "schedule": serialize(model.schedule),
        "prediction_type": model.prediction_type,
        "weighting": serialize(model.weighting),
        "image_shape": None,
        "num_classes": model.num_classes,
        "context_width": model.context_width,
        "label_dropout": model.label_dropout,
        "ema_decay": float(model.ema_decay),
        "ema_half_life": model.ema_half_life and float(model.ema_half_life),
        "seed": model.seed,
    }
    # What version 0.1 doesn't know is written where it is used, so that it
    # reads the rest.
    if type(space) is Pixels:
        config["image_shape"] = space.shape
    else:
        config["space"] = serialize(space)
    declared = dict(model.conditioning)
    if not declares(model.network) and declared != standard(
        *sizes_of(declared)
    ):
        config["conditioning"] = {k: serialize(v) for k, v in declared.items()}
    if model.guidable:
        config["guidable"] = True
    if model.ema != "auto":
        config["ema"] = model.ema
    if model.lora_rank is not None:
        config["lora_rank"] = model.lora_rank
        config["lora_targets"] = model.lora_targets
    return config


def _agreed(name: str, value: Any, network: keras.Layer) -> Any:
    """What the network says, or the argument where it doesn't."""
    own = getattr(network, name, None)
    if own is None or value is None:
        return own if value is None else value
    agree = False
    with contextlib.suppress(Exception):  # because it may be anybody's object
        agree = value == own
        if name == "image_shape" and isinstance(value, (list, tuple)):
            agree = tuple(value) == tuple(own)
    if not (isinstance(agree, (bool, np.bool_)) and agree) or isinstance(
        value, bool
    ):
        raise ValueError(
            f"`{name}` must be what the network says, {own}. Received: "
            f"{name}={checks.describe(value)}"
        )
    return own
