"""What a call of `generate` asks for, checked before anything is compiled."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

from keras_mscm import checks
from keras_mscm.models import data_checks
from keras_mscm.schedules import NoiseSchedule

CONDITIONING_DTYPES = {
    "labels": "int32",
    "context": "float32",
    "context_mask": "bool",
}


@dataclass(frozen=True)
class Request:
    """The arguments of `generate`, with what was left open filled in.

    Attributes:
        sampler: Function of `(denoise, noise, schedule, num_steps, seed)`.
        schedule: Time to log-SNR.
        num_steps: Steps of the sampler.
        guidance_scale: Scale of the guidance, or None.
        num_images: How many images.
        conditioning: What the network takes besides, each of that length.
        noise: Noise to begin from, or None where it is to be drawn.
        seed: Seed of what is drawn.
        batch_size: Images at a time.
    """

    sampler: Any
    schedule: NoiseSchedule
    num_steps: int
    guidance_scale: float | None
    num_images: int
    conditioning: dict[str, np.ndarray]
    noise: Any
    seed: int
    batch_size: int


def request(
    model: Any,
    *,
    sampler: Any,
    num_steps: Any,
    num_images: Any,
    conditioning: dict[str, Any],
    noise: Any,
    seed: Any,
    batch_size: Any,
    schedule: Any = None,
    guidance_scale: Any = None,
) -> Request:
    """Checks what `generate` was given.

    Args:
        model: The model that is to draw.
        conditioning: By name; None where it wasn't given.

    The others are the arguments of `DiffusionModel.generate`.

    Raises:
        ValueError: If an argument is out of its range, or they disagree.
    """
    num_steps = checks.check_positive_integer("num_steps", num_steps, 2**24)
    checks.check_function(
        "sampler",
        sampler,
        "one of `keras_mscm.samplers`, such as `samplers.DDIM()`, or a "
        "function of (denoise, noise, schedule, num_steps, seed)",
    )
    schedule = model.schedule if schedule is None else schedule
    check_schedule(schedule)
    if guidance_scale is not None:
        guidance_scale = checks.check_number(
            "guidance_scale", guidance_scale, 0, "a number of at least 0"
        )
        model.check_guidable("guidance_scale", guidance_scale)
    given = {
        name: _as_array(name, value)
        for name, value in conditioning.items()
        if value is not None
    }
    for name in given:
        # What is said of labels is the same as in training.
        if name not in ("labels", *model.conditioning_names):
            raise ValueError(
                f"`{name}` must not be given: the network takes "
                f"{model.conditioning_names or 'no conditioning'}. Received: "
                f"{name}={checks.describe(given[name])}"
            )
    counts = {}
    if num_images is not None:
        counts["num_images"] = checks.check_positive_integer(
            "num_images", num_images
        )
    for name, value in given.items():
        if name != "labels" and value.ndim and not len(value):
            raise checks.invalid(name, "an array of one entry or more", value)
    counts |= {name: len(v) for name, v in given.items() if v.ndim}
    if noise is not None:
        noise = _as_noise(noise, model.image_shape)
        counts["noise"] = noise.shape[0]
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"`{'`, `'.join(counts)}` must agree in number. Received: {counts}"
        )
    count = next(iter(counts.values()), model.num_classes or 1)
    if batch_size is None:
        batch_size = min(count, 128)
    return Request(
        sampler=sampler,
        schedule=schedule,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        num_images=count,
        conditioning=_completed(model, given, count),
        noise=noise,
        seed=checks.as_seed("seed", seed),
        batch_size=checks.check_positive_integer("batch_size", batch_size),
    )


def check_schedule(schedule: Any) -> None:
    """Raises unless `schedule` is a noise schedule."""
    if not isinstance(schedule, NoiseSchedule):
        raise checks.invalid(
            "schedule",
            "one of `keras_mscm.schedules`, such as `CosineSchedule()`",
            schedule,
        )


def _as_array(name: str, value: Any) -> np.ndarray:
    if not isinstance(value, np.ndarray):
        try:
            value = np.asarray(ops.convert_to_numpy(value))
        except Exception as error:  # whatever a backend raises
            raise checks.invalid(name, "an array", value) from error
    if value.dtype.kind not in "biuf":
        raise checks.invalid(name, "an array of numbers", value)
    return value


def _as_noise(noise: Any, image_shape: tuple[int, ...]) -> Any:
    """Noise in float32, an array or a tensor; raises unless it is usable."""
    tensor = hasattr(noise, "dtype") and not isinstance(noise, np.ndarray)
    host = _as_array("noise", noise)
    shape = tuple(host.shape)
    if shape[1:] != image_shape or not shape:
        raise ValueError(
            "`noise` must be of shape (num_images, height, width, "
            f"channels) = (num_images, {str(image_shape)[1:]}. "
            f"Received: shape {shape}"
        )
    if 0 in shape:
        raise ValueError(f"`noise` has no images. Received: shape {shape}")
    if not np.all(np.isfinite(host)):
        bad = host.size - int(np.isfinite(host).sum())
        raise ValueError(
            f"`noise` must be finite. Received: {bad} NaN or infinite of "
            f"{host.size}"
        )
    # What lies on a device stays there: a compiled sampler takes it as it is.
    if tensor:
        return ops.convert_to_tensor(noise, "float32")
    return host.astype("float32", copy=False)


def _completed(
    model: Any, given: dict[str, np.ndarray], count: int
) -> dict[str, np.ndarray]:
    """The conditioning with what says nothing where nothing was given."""
    if model.num_classes and "labels" not in given:
        given["labels"] = np.arange(count) % model.num_classes
    if model.context_width and "context" not in given:
        given["context"] = np.zeros((count, 1, model.context_width))
        given.setdefault("context_mask", np.zeros((count, 1), "bool"))
    if "context" in given and "context_mask" not in given:
        given["context_mask"] = np.ones(given["context"].shape[:2], "bool")
    data_checks.check_conditioning(
        "", given, count, model.num_classes, model.context_width
    )
    return {
        name: value.astype(CONDITIONING_DTYPES[name], copy=False)
        for name, value in given.items()
    }
