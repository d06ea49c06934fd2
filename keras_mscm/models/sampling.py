"""What a call of `generate` asks for: checked, then drawn in batches."""

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras import ops

from keras_mscm import backend, checks
from keras_mscm.conditioning import completed
from keras_mscm.generator import Generator
from keras_mscm.samplers import Sampler
from keras_mscm.schedules import NoiseSchedule

# Arguments of `generate` that are short forms of entries of `conditioning`.
SHORT_FORMS = ("labels", "context", "context_mask")


@dataclass(frozen=True)
class Request:
    """The arguments of `generate`, with what was left open filled in.

    Attributes:
        sampler: Function of `(denoise, noise, schedule, num_steps, seed)`.
        schedule: Time to log-SNR.
        num_steps: Steps of the sampler; or the times between which they lead.
        guidance_scale: Scale of the guidance, or None.
        num_images: How many images.
        conditioning: What the network takes besides, each of that length.
        noise: Noise to begin from, or None where it is to be drawn.
        seed: Seed of what is drawn.
        batch_size: Images at a time.
        decode: Whether samples come out as the space says.
    """

    sampler: Any
    schedule: NoiseSchedule
    num_steps: int | np.ndarray
    guidance_scale: float | None
    num_images: int
    conditioning: dict[str, np.ndarray]
    noise: Any
    seed: int
    batch_size: int
    decode: bool


def generate(
    model: Any,
    num_images: int | None = None,
    *,
    num_steps: int | None = None,
    times: Any = None,
    sampler: Any = None,
    schedule: NoiseSchedule | None = None,
    guidance_scale: float | None = None,
    conditioning: dict[str, Any] | None = None,
    labels: Any = None,
    context: Any = None,
    context_mask: Any = None,
    noise: Any = None,
    seed: int | None = None,
    batch_size: int | None = None,
    decode: bool = True,
) -> np.ndarray:
    """Draws images, or what else the model's space is.

    Args:
        num_images: How many; one of each class by default.
        num_steps: Steps of the sampler. Of a student, the evaluations that it
            was trained for, by default the most of these; of a student of any
            number 8 by default; of a diffusion model 256 (`Heun` evaluates the
            network twice in each).
        times: Of a diffusion model or a student of any number of steps: the
            times between which the steps lead, falling from 1 to 0, for steps
            of uneven lengths.
        sampler: Of a diffusion model: one of `keras_mscm.samplers`, `ADDIM()`
            by default, or any function of `(denoise, noise, schedule,
            num_steps, seed)`. A student takes its own steps.
        schedule: Of a diffusion model: time to log-SNR for the sampler's
            steps, such as `KarrasSchedule()`; by default what the model was
            trained with.
        guidance_scale: Of a diffusion model: scale of classifier-free
            guidance, at least 0: 1 is none, 0 is without conditioning (the
            paper's is less by 1). For a model trained with `label_dropout`.
            One batched call of twice the size evaluates both predictions.
        conditioning: What the network takes besides, by name, each of the
            length `num_images`. What isn't given says nothing; labels are 0,
            1, ... in turn.
        labels: Short for `conditioning={"labels": ...}`: classes.
        context: Short for that of a sequence, `(num_images, length,
            context_width)`.
        context_mask: Short for that of the sequence's mask, `(num_images,
            length)`; all of a context counts by default.
        noise: Standard normal noise to begin from, `(num_images, ...)`.
        seed: Seed of that noise, where it isn't given, and of what a
            stochastic sampler adds: an integer in 0..2**31 - 3. The same seed
            gives an image of the same number the same noise, on every backend,
            whatever the batch size. None draws one.
        batch_size: Images per call of the compiled sampler, 128 at most by
            default. Each batch size is compiled once.
        decode: Whether samples come out as the space says: images clipped to
            [-1, 1], latents decoded. False leaves them as the network has
            them.

    Returns:
        NumPy array, float32, `(num_images, ...)`.

    Raises:
        ValueError: If an argument is out of its range, or they disagree.
    """
    return draw(
        model,
        request(
            model,
            num_images=num_images,
            num_steps=num_steps,
            times=times,
            sampler=sampler,
            schedule=schedule,
            guidance_scale=guidance_scale,
            conditioning=conditioning,
            labels=labels,
            context=context,
            context_mask=context_mask,
            noise=noise,
            seed=seed,
            batch_size=batch_size,
            decode=decode,
        ),
    )


def check_generate(model: Any, *args: Any, **kwargs: Any) -> None:
    """Raises what `generate` would of its arguments; draws nothing.

    Args:
        *args: As for `generate`.
        **kwargs: As for `generate`.

    Raises:
        ValueError: If an argument is out of its range, or they disagree.
        TypeError: If there is no such argument.
    """
    bound = inspect.signature(model.generate).bind(*args, **kwargs)
    bound.apply_defaults()
    request(model, **bound.arguments)


def request(model: Any, **arguments: Any) -> Request:
    """Checks what `generate` was given.

    Args:
        model: The model that is to draw.
        **arguments: The arguments of `DenoisingModel.generate`, all of them.

    Raises:
        ValueError: If an argument is out of its range, or they disagree.
    """
    names = "num_steps", "sampler", "schedule", "guidance_scale"
    asked = {name: arguments[name] for name in names}
    if asked["num_steps"] is not None:
        asked["num_steps"] = checks.check_positive_integer(
            "num_steps", asked["num_steps"], 2**24
        )
    if asked["sampler"] is not None:
        checks.check_function(
            "sampler",
            asked["sampler"],
            "one of `keras_mscm.samplers`, such as `samplers.DDIM()`, or a "
            "function of (denoise, noise, schedule, num_steps, seed)",
        )
    if asked["schedule"] is not None:
        check_schedule(asked["schedule"])
    scale = asked["guidance_scale"]
    if scale is not None:
        asked["guidance_scale"] = checks.check_number(
            "guidance_scale", scale, 0, "a number of at least 0"
        )
    times = _times(model, arguments["times"], asked)
    num_steps, sampler, schedule = model.sampled_with(**asked)
    given = _given(model, arguments)
    counts = {}
    if arguments["num_images"] is not None:
        counts["num_images"] = checks.check_positive_integer(
            "num_images", arguments["num_images"]
        )
    for name, value in given.items():
        if name != "labels" and value.ndim and not len(value):
            raise checks.invalid(name, "an array of one entry or more", value)
    counts |= {name: len(v) for name, v in given.items() if v.ndim}
    noise = arguments["noise"]
    if noise is not None:
        noise = _as_noise(noise, model.space.shape)
        counts["noise"] = noise.shape[0]
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"`{'`, `'.join(counts)}` must agree in number. Received: {counts}"
        )
    count = next(iter(counts.values()), model.num_classes or 1)
    batch_size = arguments["batch_size"]
    if batch_size is None:
        batch_size = min(count, 128)
    return Request(
        sampler=sampler,
        schedule=schedule,
        num_steps=num_steps if times is None else times,
        guidance_scale=asked["guidance_scale"],
        num_images=count,
        conditioning=completed(model.conditioning, given, count),
        noise=noise,
        seed=checks.as_seed("seed", arguments["seed"]),
        batch_size=checks.check_positive_integer("batch_size", batch_size),
        decode=checks.check_boolean("decode", arguments["decode"]),
    )


def _times(model: Any, times: Any, asked: dict[str, Any]) -> Any:
    """The times of uneven steps, whose number is put into `asked`."""
    if times is None:
        return None
    if not model.takes_times:
        raise ValueError(
            "`times` must not be given: this student takes the steps that it "
            "was trained for; student_steps='any' makes one for any times. "
            f"Received: times={checks.describe(times)}"
        )
    times = checks.check_times("times", times)
    if asked["num_steps"] not in (None, len(times) - 1):
        raise ValueError(
            "`num_steps` must be one less than there are `times`, or not be "
            f"given. Received: num_steps={asked['num_steps']}, {len(times)} "
            "times"
        )
    if asked["sampler"] is not None and not isinstance(
        asked["sampler"], Sampler
    ):
        raise ValueError(
            "`times` must not be given with a sampler that is a function of a "
            f"number of steps. Received: sampler={asked['sampler']}"
        )
    asked["num_steps"] = len(times) - 1
    return times


def _given(model: Any, arguments: dict[str, Any]) -> dict[str, np.ndarray]:
    """The conditioning that was given, by name, whichever way."""
    entries = arguments["conditioning"]
    entries = {} if entries is None else entries
    if not isinstance(entries, dict):
        raise checks.invalid(
            "conditioning", "a dictionary of arrays by name", entries
        )
    short = {name: arguments[name] for name in SHORT_FORMS}
    short = {name: v for name, v in short.items() if v is not None}
    twice = sorted({*short} & {*entries})
    if twice:
        raise ValueError(
            f"`{twice[0]}` must be given once, by its own argument or in "
            "`conditioning`. Received: both"
        )
    given = {
        name: _as_array(str(name), value)
        for name, value in {**entries, **short}.items()
    }
    for name in given:
        # What is said of labels is the same as in training.
        if name not in ("labels", *model.conditioning):
            raise ValueError(
                f"`{name}` must not be given: the network takes "
                f"{[*model.conditioning] or 'no conditioning'}. Received: "
                f"{name}={checks.describe(given[name])}"
            )
    return given


def draw(model: Any, request: Request) -> np.ndarray:
    """Draws what is asked for, in batches of one compiled shape.

    Args:
        model: The model that is asked.
        request: What is asked for.
    """
    num, batch_size = request.num_images, request.batch_size
    scale = request.guidance_scale
    guided = scale is not None
    key = (request.sampler, request.schedule, guided, request.decode)
    run = model._compiled_samplers.get(key)
    if run is None:
        generator = Generator(
            model,
            request.sampler,
            request.schedule,
            guided=guided,
            decode=request.decode,
        )
        run = model._compiled_samplers[key] = generator.compiled()

    steps: Any = request.num_steps
    steps = np.int32(steps) if isinstance(steps, int) else steps
    scales = [] if scale is None else [np.float32(scale)]
    samples: Any = None
    for begin in range(0, num, batch_size):
        numbers = np.arange(begin, begin + batch_size, dtype="int32")
        noise, given = request.noise, request.conditioning
        if batch_size != num:
            # Wrapped around, because the last batch must have the compiled
            # shape.
            places = numbers % num
            if noise is not None:
                noise = ops.take(noise, places, axis=0)
            given = {k: v[places] for k, v in given.items()}
        state = backend.random_state(request.seed, begin)
        start = numbers if noise is None else noise
        drawn = run(start, given, steps, state, *scales)
        if samples is None:
            samples = np.empty((num, *drawn.shape[1:]), "float32")
        end = min(begin + batch_size, num)
        samples[begin:end] = ops.convert_to_numpy(drawn)[: end - begin]
    return samples


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


def _as_noise(noise: Any, expected: tuple[int, ...]) -> Any:
    """Noise in float32, an array or a tensor; raises unless it is usable."""
    tensor = hasattr(noise, "dtype") and not isinstance(noise, np.ndarray)
    host = _as_array("noise", noise)
    shape = tuple(host.shape)
    if shape[1:] != expected or not shape:
        raise ValueError(
            f"`noise` must be of shape (num_images, {str(expected)[1:]}. "
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
