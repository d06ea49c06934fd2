"""What the algorithms that learn from a teacher have in common.

The functions whose first argument is a class or a model are their methods.
"""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_mscm import checks, lora, samplers
from keras_mscm.conditioning import Conditioning
from keras_mscm.functional.process import Tensor
from keras_mscm.models import student_steps
from keras_mscm.models.arguments import declares
from keras_mscm.models.diffusion import DiffusionModel
from keras_mscm.models.moving_average import clone_network
from keras_mscm.models.student_steps import StudentSteps
from keras_mscm.teachers import Teacher
from keras_mscm.variance import ErrorShare

DEFAULT_ETA = 0.75


def check_guidance_scale(value: Any) -> float:
    """Raises unless `value` is a scale of classifier-free guidance."""
    return checks.check_number(
        "guidance_scale", value, 0, "a number of at least 0"
    )


def from_teacher(
    cls: Any, teacher: DiffusionModel, *, copy: bool = True, **kwargs: Any
) -> Any:
    """A model that begins with a diffusion model's averaged weights.

    Args:
        teacher: Diffusion model, of this library or from
            `keras_mscm.adapters`. Its network is copied: neither is changed by
            what happens to the other.
        copy: Whether the student's teacher is a second copy of that network.
            False saves its memory: the teacher's own network is held, and
            frozen. With `lora_rank` the student's network without its adapters
            is its teacher, so that there is one copy, or with False none: the
            teacher's own network then gets the adapters.
        **kwargs: As for the constructor.

    Returns:
        The model, with the teacher attached if it learns from it.

    Raises:
        ValueError: If `teacher` is no diffusion model, or the two don't fit.
    """
    if not isinstance(teacher, DiffusionModel):
        # A student predicts where a segment ends, and not the mean of the
        # images that a noisy one may have come from, which is what a teacher
        # is asked for. A closed form has no weights to begin with.
        raise checks.invalid(
            "teacher",
            "a DiffusionModel (a function is attached to a student that the "
            "constructor made, by `attach_teacher`)",
            teacher,
        )
    arguments = {
        "prediction_type": teacher.prediction_type,
        "space": teacher.space,
        "conditioning": _own_conditioning(teacher),
        **kwargs,
    }
    checks.check_boolean("copy", copy)
    shared = kwargs.get("lora_rank") is not None
    network = teacher.ema_network
    if copy or not shared:
        network = clone_network(
            teacher.network,
            teacher.network.name,
            teacher.symbolic_inputs(),
            network,
        )
    student = cls(
        network, arguments.pop("schedule", teacher.schedule), **arguments
    )
    if student.needs_teacher and not shared:
        student.attach_teacher(teacher, copy=copy)
    elif student.needs_teacher and student.guidance_scale != 1:
        teacher.check_guidable("guidance_scale", student.guidance_scale)
    return student


def own_base(model: Any) -> Teacher:
    """A model's teacher, before it has one: with LoRA the network without."""
    teacher = Teacher(name="teacher")
    if model.lora_rank is not None:
        base = lora.WithoutAdapters(model.network, name="without_adapters")
        teacher.hold(base, model.prediction_type, model.conditioning)
    return teacher


def _own_conditioning(teacher: DiffusionModel) -> Any:
    """What the network is conditioned on, if it doesn't say so itself."""
    return None if declares(teacher.network) else teacher.conditioning


def attach_teacher(model: Any, teacher: Any, *, copy: bool = True) -> None:
    """Gives a model its teacher, as after loading: files hold none.

    Args:
        teacher: Diffusion model of the same arrays and conditioning, whatever
            its network predicts; its averaged network is taken. Or a closed
            form: a function of `(z, logsnr, conditioning)`, in `keras.ops`,
            that returns the mean of `x`.
        copy: Whether the network is copied. False saves its memory: the
            teacher's own network is held, and frozen.

    Raises:
        ValueError: If the two don't fit.
    """
    checks.check_boolean("copy", copy)
    if isinstance(teacher, DiffusionModel):
        for name, theirs, ours in (
            ("image_shape", teacher.space.shape, model.space.shape),
            ("num_classes", teacher.num_classes, model.num_classes),
            ("context_width", teacher.context_width, model.context_width),
            (
                "conditioning",
                _meaning(teacher.conditioning),
                _meaning(model.conditioning),
            ),
        ):
            if theirs != ours:
                raise ValueError(
                    f"`teacher` must have the student's {name}, {ours}. "
                    f"Received: {theirs}"
                )
        if model.guidance_scale != 1:
            teacher.check_guidable("guidance_scale", model.guidance_scale)
        network = teacher.ema_network
        if copy:
            network = clone_network(
                teacher.network,
                "teacher_network",
                teacher.symbolic_inputs(),
                network,
            )
        model.teacher.hold(
            network,
            teacher.prediction_type,
            getattr(network, "conditioning", None) or teacher.conditioning,
        )
    elif callable(teacher) and not isinstance(teacher, (keras.Layer, type)):
        _check_closed_form(model, teacher)
        told = model.conditioning.values()
        if model.guidance_scale != 1 and not any(c.can_be_absent for c in told):
            raise ValueError(
                "`guidance_scale` must be 1 where nothing can be left out of "
                f"the conditioning. Received: {model.guidance_scale}"
            )
        model.teacher.hold(
            None, conditioning=model.conditioning, closed_form=teacher
        )
    else:
        raise checks.invalid(
            "teacher",
            "a DiffusionModel, or a function of (z, logsnr, conditioning) "
            "that gives x; a network becomes the one by `DiffusionModel("
            "network, ...)`",
            teacher,
        )
    model.train_function = model.test_function = None


def _meaning(conditioning: Any) -> dict[str, tuple]:
    return {k: (c.shape, c.dtype) for k, c in conditioning.items()}


def _check_closed_form(model: Any, teacher: Any) -> None:
    """Raises unless a function gives `x` of the model's shape."""
    z = ops.zeros((2, *model.space.shape))
    given = {
        name: ops.cast(ops.ones([n or 1 for n in (2, *c.shape)]), c.dtype)
        for name, c in model.conditioning.items()
    }
    try:
        x = ops.convert_to_numpy(teacher(z, ops.zeros((2,)), given))
        shape = tuple(x.shape)
    except Exception as error:  # because it is somebody else's function
        raise checks.invalid(
            "teacher", "a function of (z, logsnr, conditioning)", teacher
        ) from error
    if shape != tuple(z.shape):
        raise ValueError(
            f"`teacher` must return x of the shape of z, {tuple(z.shape)}. "
            f"Received: {shape}"
        )
    if not np.all(np.isfinite(x)):
        raise ValueError(
            "`teacher` must return finite numbers. Received: NaN or infinite "
            "ones for z and log-SNR of 0"
        )


def check_teacher_step(
    integrator: Any, eta: Any, x_var: Any
) -> tuple[Any, float, Any]:
    """How a teacher's steps are taken, by a student's arguments.

    Raises:
        ValueError: If one is out of its range, or has no effect beside the
            others.
    """
    eta = checks.check_number("eta", eta, 0, "in [0, 1]", high=1)
    integrator = samplers.ADDIM() if integrator is None else integrator
    checks.check_function(
        "integrator",
        integrator,
        "a function or a deterministic sampler, such as `samplers.ADDIM()`",
    )
    if isinstance(integrator, samplers.Sampler):
        _check_integrates(integrator)
    if x_var is not None:
        checks.check_function("x_var", x_var, "a function of log-SNR")
        _check_variance(x_var)
    _check_variances(integrator, eta, x_var)
    return integrator, eta, x_var


def teacher_step(
    model: Any,
    x: Tensor,
    z_t: Tensor,
    logsnr_t: Tensor,
    logsnr_s: Tensor,
    conditioning: Conditioning,
    predictions: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The `x` with which DDIM takes the teacher's step from t to s.

    Args:
        x: The images that `z_t` was made of, `(batch, ...)`.
        z_t: Noisy images at t, of the same shape.
        logsnr_t: Log-SNR at t, `(batch,)`.
        logsnr_s: Log-SNR at s, `(batch,)`.
        conditioning: What the network takes besides.
        predictions: What the teacher says at t, with guidance and without, if
            that is known already.

    Returns:
        Images, `(batch, ...)`.
    """

    def teach(z, logsnr):
        scale = model.guidance_scale
        return model.teacher.teach(z, logsnr, conditioning, scale)

    x_teacher, x_conditional = predictions or teach(z_t, logsnr_t)
    variance = model.x_var or _own_variance(model.integrator)
    variance = variance or ErrorShare(model.eta)
    if isinstance(variance, ErrorShare):
        x_var = variance(x_conditional, x)
    else:
        x_var = variance(logsnr_t)

    def denoise(z, logsnr):
        return teach(z, logsnr)[0]

    integrate = getattr(model.integrator, "step_x", model.integrator)
    return integrate(x_teacher, z_t, logsnr_t, logsnr_s, x_var, denoise)


def config_of(model: Any) -> dict[str, Any]:
    """A student's arguments that say how its teacher's steps are taken."""
    serialize = keras.saving.serialize_keras_object
    return {
        "integrator": serialize(model.integrator),
        "eta": model.eta,
        "x_var": serialize(model.x_var),
    }


def of_version_0_1(config: dict[str, Any]) -> dict[str, Any]:
    """A student's configuration without what had no effect in version 0.1."""
    kind = (config.get("integrator") or {}).get("class_name")
    if kind in ("DDIM", "Heun"):
        return {**config, "eta": DEFAULT_ETA, "x_var": None}
    if config.get("x_var") is not None:
        return {**config, "eta": DEFAULT_ETA}
    return config


def own_steps(
    trained: StudentSteps,
    num_steps: Any,
    sampler: Any,
    schedule: Any,
    guidance_scale: Any,
    own_schedule: Any,
) -> tuple[int, Any, Any]:
    """How a student is sampled: in the steps that it was trained for.

    Args:
        trained: The number of these, or several, or `"any"`.
        num_steps, sampler, schedule, guidance_scale: As they were asked for.
        own_schedule: The student's.

    Raises:
        ValueError: If something else is asked for.
    """
    for name, value in (
        ("sampler", sampler),
        ("schedule", schedule),
        ("guidance_scale", guidance_scale),
    ):
        if value is not None:
            raise ValueError(
                f"`{name}` must not be given: a student takes the steps that "
                "it was trained for, of the guidance that its teacher had. "
                f"Received: {name}={checks.describe(value)}"
            )
    if isinstance(trained, str):
        num_steps = num_steps or student_steps.DEFAULT_OF_ANY
        return num_steps, samplers.FlowMap(), own_schedule
    several = isinstance(trained, tuple)
    numbers = trained if isinstance(trained, tuple) else (trained,)
    if num_steps not in (None, *numbers):
        raise ValueError(
            f"`num_steps` must be {'a' if several else 'the'} number that the "
            f"student was trained for, student_steps={trained}. Received: "
            f"num_steps={num_steps}"
        )
    sampler = samplers.FlowMap() if several else samplers.DDIM()
    return num_steps or max(numbers), sampler, own_schedule


def _check_variance(x_var: Any) -> None:
    """Raises unless a function gives a variance for each log-SNR."""
    if isinstance(x_var, ErrorShare):
        return
    try:
        shape = tuple(x_var(ops.zeros((2,))).shape)
    except Exception as error:  # because it is somebody else's function
        raise checks.invalid("x_var", "a function of log-SNR", x_var) from error
    if shape not in ((), (2,)):
        raise ValueError(
            "`x_var` must return a number for each log-SNR. Received: shape "
            f"{shape} for (2,)"
        )


def _check_integrates(integrator: samplers.Sampler) -> None:
    if integrator.stochastic:
        raise ValueError(
            "`integrator` must be deterministic: a student learns where "
            "one z_t leads, and noise in the teacher's step leads it to "
            "many places, of which it would learn the blurred mean. "
            f"Received: integrator={integrator}"
        )
    if not hasattr(integrator, "step_x"):
        raise ValueError(
            "`integrator` must take each step by itself, as `samplers.ADDIM`, "
            "`DDIM` and `Heun` do: a student is trained on single steps, "
            "before which there were none. Received: integrator="
            f"{integrator}"
        )


def _check_variances(integrator: Any, eta: Any, x_var: Any) -> None:
    """Raises if something that says the posterior variance is not heard."""
    given = {
        "eta": None if eta == DEFAULT_ETA else eta,
        "x_var": x_var,
        "integrator": _own_variance(integrator),
    }
    given = {k: value for k, value in given.items() if value is not None}
    came = ", ".join(f"{k}={checks.describe(given[k])}" for k in given)
    if given and type(integrator) in (samplers.DDIM, samplers.Heun):
        raise ValueError(
            f"`{'` and `'.join(given)}` must not be given: {integrator} "
            "takes no posterior variance, as `samplers.ADDIM()` does. "
            f"Received: {came}"
        )
    if len(given) > 1:
        raise ValueError(
            f"`{'` and `'.join(given)}` must not be given together, as "
            "each says what the posterior variance is. Received: "
            f"{came}"
        )


def _own_variance(integrator: Any) -> samplers.Variance | None:
    """The posterior variance that an aDDIM was made with; None by default."""
    if not isinstance(integrator, samplers.ADDIM):
        return None
    default = samplers.ADDIM().x_var
    return None if integrator.x_var is default else integrator.x_var
