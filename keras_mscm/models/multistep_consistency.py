"""Multistep consistency models (the paper's algorithms 1 and 2)."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import keras
import numpy as np
from keras import ops

from keras_mscm import backend, checks, losses, samplers, weightings
from keras_mscm import functional as F
from keras_mscm.conditioning import Conditioning
from keras_mscm.functional.process import Tensor
from keras_mscm.models import distillation
from keras_mscm.models import student_steps as student_steps_of
from keras_mscm.models.base import DenoisingModel, Example
from keras_mscm.models.distillation import DEFAULT_ETA
from keras_mscm.models.saving import random_states
from keras_mscm.models.student_steps import StudentSteps

METHODS = ("distillation", "training")
REFERENCES = ("online", "ema")
# What says how the teacher's steps are taken, and its defaults.
OF_TEACHER = {
    "integrator": samplers.ADDIM(),
    "eta": DEFAULT_ETA,
    "x_var": None,
    "guidance_scale": 1,
    "teacher": None,
}


@keras.saving.register_keras_serializable(package="keras_mscm")
class MultistepConsistencyModel(DenoisingModel):
    """A model that samples in `student_steps` evaluations (section 3).

    Time is cut into `student_steps` segments. Within each the model learns, at
    every time `t` of it, to predict the one `x` with which DDIM jumps from
    `z_t` to the segment's end on the teacher's path: the number of steps
    interpolates between a consistency model (1) and diffusion (many).

    One student can serve several numbers of steps: its network is then told the
    end of the segment besides, and the number of steps is a dial that is turned
    at sampling time.

    The teacher's path takes `teacher_steps` steps over the whole of time; with
    the callback `TeacherStepAnneal` that number grows during training.

    Args:
        network: Network, as in `DenoisingModel`. Usually made by
            `from_teacher`.
        schedule: Noise schedule, as in `DenoisingModel`.
        student_steps: Evaluations that `generate` takes (K), at least 1. Or
            several such numbers, `(1, 2, 4, 8, 16)`: each example is trained on
            for one of them. Or `"any"`: segments end anywhere on the teacher's
            grid, and `generate` takes any number of steps, and any `times`.
        step_weights: With several `student_steps`, how often each is drawn,
            relative to the others; equally by default.
        method: `"distillation"` (CD) takes the teacher's steps with a
            diffusion model's predictions, `"training"` (CT) with the images
            themselves, so without a teacher.
        teacher_steps: Teacher steps when no callback anneals them: a number,
            at least the largest of `student_steps` (appendix A.1: 256 on text
            to image), or a function of the iteration, such as a Keras learning
            rate schedule, that is traced into the step (so `keras.ops` only).
        reference: Which network's prediction at s the target is made of: the
            `"online"` one that is trained (the paper), under the dropout of
            its pass at t, or its moving average, `"ema"`, without dropout.
        guidance_scale: Scale of the teacher's classifier-free guidance, at
            least 0: 1 is none (the paper's is less by 1). Both of its
            predictions come from one batched call. This and what follows say
            how a teacher's steps are taken, so with "distillation" alone.
        integrator: The teacher's step: a deterministic sampler (`ADDIM()`,
            the default, `DDIM()`, `Heun()`), or a function of `(x, z_t,
            logsnr_t, logsnr_s, x_var, denoise)` that returns the `x` with
            which DDIM takes the step (as `samplers.DDIM.step_x`; where a step
            gives `z_s`, `inverse_ddim` converts it).
        eta: Share of the teacher's squared error that aDDIM takes for the
            posterior variance, in [0, 1]; 0 makes it DDIM (appendix A.1:
            xvar_frac 0.75). The error is the conditional prediction's, also
            under guidance.
        x_var: Function of log-SNR that gives the posterior variance instead,
            such as `variance.AnalyticVariance()` or a model's `x_var`.
            `ADDIM(x_var=...)` as the integrator says the same.
        teacher: What it learns from, as for `attach_teacher`.
        **kwargs: As in `DenoisingModel`.

    Raises:
        ValueError: If an argument is out of its range, or has no effect beside
            the others.

    Example:

    >>> from keras_mscm import DiffusionModel, UViT
    >>> from keras_mscm.callbacks import TeacherStepAnneal
    >>> network = UViT(image_shape=(8, 8, 1), widths=[64], depths=[1],
    ...                attention=True)
    >>> teacher = DiffusionModel(network)  # trained, in earnest
    >>> student = MultistepConsistencyModel.from_teacher(
    ...     teacher, student_steps=8
    ... )
    >>> student.compile(optimizer=keras.optimizers.Adam(1e-4))
    >>> images = np.zeros((32, 8, 8, 1), "float32")
    >>> _ = student.fit(images, verbose=0, callbacks=[TeacherStepAnneal()])
    >>> student.generate(4, num_steps=8).shape
    (4, 8, 8, 1)

    One student of several numbers of steps:

    >>> student = MultistepConsistencyModel.from_teacher(
    ...     teacher, student_steps=(1, 2, 4, 8)
    ... )
    >>> student.generate(4, num_steps=2).shape
    (4, 8, 8, 1)

    Reference:
        Multistep Consistency Models, algorithms 1 and 2.
    """

    default_weighting = staticmethod(weightings.sqrt_snr_plus_one)
    from_teacher = classmethod(distillation.from_teacher)
    attach_teacher = distillation.attach_teacher
    teacher_step = distillation.teacher_step

    def __init__(
        self,
        network: keras.Layer,
        schedule: Any = None,
        *,
        student_steps: StudentSteps,
        step_weights: Sequence[float] | None = None,
        method: str = "distillation",
        teacher_steps: float | Callable[[Tensor], Tensor] = 256,
        reference: str = "online",
        guidance_scale: float = 1.0,
        integrator: Any = None,
        eta: float = DEFAULT_ETA,
        x_var: samplers.Variance | None = None,
        teacher: Any = None,
        **kwargs: Any,
    ):
        steps = student_steps_of.check(student_steps)
        step_weights = student_steps_of.check_weights(step_weights, steps)
        checks.check_choice("method", method, METHODS)
        checks.check_choice("reference", reference, REFERENCES)
        if method == "training":
            _check_no_teacher(
                integrator=integrator,
                eta=eta,
                x_var=x_var,
                guidance_scale=guidance_scale,
                teacher=teacher,
            )
        if reference == "ema" and kwargs.get("ema", "auto") is None:
            raise ValueError(
                "`reference` must be 'online' with ema=None, which keeps no "
                f"average. Received: reference={reference!r}"
            )
        of_step = distillation.check_teacher_step(integrator, eta, x_var)
        scale = distillation.check_guidance_scale(guidance_scale)
        if not isinstance(steps, int):
            student_steps_of.take_end(network)
        super().__init__(network, schedule, **kwargs)
        self.student_steps, self.step_weights = steps, step_weights
        self.takes_times = steps == student_steps_of.ANY
        self.method = method
        self.reference, self.guidance_scale = reference, scale
        self.integrator, self.eta, self.x_var = of_step
        self.needs_teacher = method == "distillation"
        self.teacher = distillation.own_base(self)
        self.teacher_steps = teacher_steps
        # (start, end, iterations) of N_teacher(i). Weights, and not numbers in
        # the compiled step, so that a callback can set them.
        self.annealing = self.add_weight(
            shape=(3,),
            dtype="float32",
            initializer="ones",
            trainable=False,
            name="annealing",
        )
        if callable(teacher_steps):
            self._check_teacher_steps("teacher_steps", _first(teacher_steps))
        else:
            self._check_teacher_steps("teacher_steps", teacher_steps)
            self.anneal_teacher_steps(teacher_steps, teacher_steps, 1)
        if teacher is not None:
            self.attach_teacher(teacher)

    def anneal_teacher_steps(
        self, start: float, end: float, iterations: int
    ) -> None:
        """Sets N_teacher(i), log-linear from `start` to `end` (A.1).

        Args:
            start: Teacher steps at iteration 0, at least the largest of
                `student_steps`.
            end: Teacher steps from `iterations` on, at least that too.
            iterations: Iterations in between, at least 1.

        Raises:
            ValueError: If an argument is out of its range, or the model's
                `teacher_steps` is a function.
        """
        if callable(self.teacher_steps):
            raise ValueError(
                "`teacher_steps` must be a number for a callback to anneal it. "
                f"Received: the function {self.teacher_steps}"
            )
        self._check_teacher_steps("start", start)
        self._check_teacher_steps("end", end)
        checks.check_positive_integer("iterations", iterations, 2**31 - 1)
        self.annealing.assign(np.asarray([start, end, iterations], "float32"))

    def _check_teacher_steps(self, name: str, value: Any) -> None:
        checks.check_number(
            name,
            value,
            self.largest_steps,
            f"at least student_steps={self.largest_steps}, one teacher step "
            "per student step, and at most 2**24",
            high=2**24,
        )

    @property
    def largest_steps(self) -> int:
        """The largest of its `student_steps`; with `"any"`, 1."""
        return student_steps_of.largest(self.student_steps)

    def steps_per_segment(self, student_steps: Any = None) -> Tensor:
        """`round(N_teacher(i) / student_steps)` at the present iteration.

        Args:
            student_steps: K, a number or a tensor, such as `(batch,)`; by
                default the model's largest.
        """
        i = self.iteration.value
        if callable(self.teacher_steps):
            steps = ops.cast(self.teacher_steps(i), "float32")
        else:
            start, end, iterations = ops.unstack(self.annealing.value)
            steps = F.teacher_steps(i, start, end, iterations)
        k = self.largest_steps if student_steps is None else student_steps
        return ops.maximum(ops.round(steps / k), 1.0)

    def draw_times(self, batch: Sequence) -> tuple[Tensor, Tensor, Tensor]:
        """A teacher step t -> s in a segment, and where that ends, t_step.

        Args:
            batch: The shape `(batch,)`.
        """
        k = self.student_steps
        if k == student_steps_of.ANY:
            return self._draw_any_times(batch)
        if isinstance(k, tuple):
            uniform = self.draw_uniform(batch)
            k = student_steps_of.draw(k, self.step_weights, uniform)
        per_segment = self.steps_per_segment(k)
        step = ops.floor(self.draw_uniform(batch) * k)
        n_rel = 1 + ops.floor(self.draw_uniform(batch) * per_segment)
        return F.segment_times(step, n_rel, k, per_segment)

    def _draw_any_times(self, batch: Sequence) -> tuple[Tensor, Tensor, Tensor]:
        """The same, with segments that end anywhere on the teacher's grid.

        Their lengths are drawn log-uniform, so that each doubling of the number
        of steps has an equal share, and up to four times the whole of time,
        because what would begin before 0 ends there, as one step does.
        """
        total = self.steps_per_segment(1)
        n = 1 + ops.floor(self.draw_uniform(batch) * total)
        length = ops.exp(self.draw_uniform(batch) * ops.log(4 * total))
        n_rel = 1 + ops.floor(self.draw_uniform(batch) * length)
        n_rel = ops.minimum(n_rel, n)
        return F.segment_times(n - n_rel, n_rel, total, ops.ones(()))

    def sampled_with(self, num_steps, sampler, schedule, guidance_scale):
        asked = num_steps, sampler, schedule, guidance_scale
        return distillation.own_steps(self.student_steps, *asked, self.schedule)

    def default_loss(self) -> keras.losses.Loss:
        return losses.PseudoHuber()

    def training_example(
        self, images: Tensor, conditioning: Conditioning, training: bool
    ) -> Example:
        x, batch = images, ops.shape(images)[:1]
        epsilon = self.draw_normal(ops.shape(x))

        # A teacher step t -> s in one of the segments, which ends at t_step.
        times = self.draw_times(batch)
        logsnr_t, logsnr_s, logsnr_step = map(self.schedule, times)
        end = {}
        if not isinstance(self.student_steps, int):
            end["logsnr_end"] = logsnr_step

        # The teacher's step, as the x with which DDIM takes it.
        z_t = F.add_noise(x, epsilon, logsnr_t)
        x_teacher = x
        if self.method == "distillation":
            x_teacher = self.teacher_step(
                x, z_t, logsnr_t, logsnr_s, conditioning
            )
        z_s = F.ddim(x_teacher, z_t, logsnr_t, logsnr_s)

        # What the model itself says at s, under the dropout of its pass at t.
        online = training and self.reference == "online"
        network = self.network if online else self.ema_network
        with backend.rewound(random_states(network)):
            x_ref = self.denoise(
                network, z_s, logsnr_s, conditioning, online, **end
            )

        target = F.consistency_target(
            x_teacher, x_ref, logsnr_t, logsnr_s, logsnr_step
        )
        inputs = {"z": z_t, "logsnr": logsnr_t, **end, **conditioning}
        return inputs, target, self.weighting(logsnr_t)

    def get_config(self) -> dict[str, Any]:
        teacher_steps = self.teacher_steps
        if callable(teacher_steps):
            teacher_steps = keras.saving.serialize_keras_object(teacher_steps)
        weights = self.step_weights
        return {
            **super().get_config(),
            **({} if weights is None else {"step_weights": weights}),
            "student_steps": self.student_steps,
            "method": self.method,
            "teacher_steps": teacher_steps,
            "reference": self.reference,
            "guidance_scale": self.guidance_scale,
            **distillation.config_of(self),
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Any = None
    ) -> Self:
        """The inverse of `get_config`, also of version 0.1's."""
        if config.get("method") == "training":
            # In that, what says how a teacher's steps are taken had no effect.
            config = {k: v for k, v in config.items() if k not in OF_TEACHER}
        config = distillation.of_version_0_1(config)
        return super().from_config(config, custom_objects)


def _first(teacher_steps: Callable[[Tensor], Tensor]) -> float:
    """The teacher steps that a function gives for the first iteration."""
    try:
        checks.check_function("teacher_steps", teacher_steps)
        return float(teacher_steps(ops.zeros((), "int32")))
    except Exception as error:  # because it is somebody else's function
        raise checks.invalid(
            "teacher_steps",
            "a number, or a function of the iteration that gives one",
            teacher_steps,
        ) from error


def _check_no_teacher(**arguments: Any) -> None:
    """Raises if an argument says how a teacher's steps are taken."""
    for name, value in arguments.items():
        if value is not None and value != OF_TEACHER[name]:
            raise ValueError(
                f"`{name}` must not be given with method='training', which "
                "takes its steps with the images themselves. Received: "
                f"{name}={checks.describe(value)}"
            )
