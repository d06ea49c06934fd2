"""Progressive distillation (Salimans & Ho, 2022), the paper's baseline."""

import math
from typing import Any, Self

import keras
from keras import ops

from keras_mscm import checks, losses, samplers, weightings
from keras_mscm import functional as F
from keras_mscm.conditioning import Conditioning
from keras_mscm.functional.process import Tensor
from keras_mscm.models import distillation
from keras_mscm.models import stages as stages_of
from keras_mscm.models.base import DenoisingModel, Example
from keras_mscm.models.distillation import DEFAULT_ETA


@keras.saving.register_keras_serializable(package="keras_mscm")
class ProgressiveDistillationModel(DenoisingModel):
    """Halves the number of steps again and again, within one `fit`.

    In each stage the model learns to do in one step what its teacher does in
    two. After `iterations_per_stage` updates its moving average becomes the
    teacher, and it begins with that itself; the last stage ends with
    `student_steps`. The teacher is a part of this model and of its file.

    A learning rate that restarts with each stage is Keras'
    `CosineDecayRestarts(rate, iterations_per_stage, t_mul=1.0, m_mul=1.0)`.

    Args:
        network: A trained diffusion model's network; `from_teacher` takes it.
        schedule: Noise schedule, as in `DenoisingModel`.
        student_steps: Evaluations that `generate` takes in the end (K).
        teacher_steps: Steps of the first teacher: `student_steps` times a
            power of 2, at least 2.
        iterations_per_stage: Updates in each stage, at least 1.
        integrator, eta, x_var: How the first stage's teacher takes its steps,
            as in `MultistepConsistencyModel`. There is no `guidance_scale`:
            distil a guided teacher by `GuidanceDistillationModel` first.
        **kwargs: As in `DenoisingModel`, but for `ema`: stages begin with the
            moving average.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    >>> from keras_mscm import DiffusionModel, UViT
    >>> network = UViT(image_shape=(8, 8, 1), widths=[64], depths=[1],
    ...                attention=True)
    >>> teacher = DiffusionModel(network)  # trained, in earnest
    >>> student = ProgressiveDistillationModel.from_teacher(
    ...     teacher, student_steps=2, teacher_steps=8, iterations_per_stage=1
    ... )
    >>> student.compile(optimizer=keras.optimizers.Adam(1e-4))
    >>> images = ops.zeros((64, 8, 8, 1))
    >>> _ = student.fit(images, batch_size=32, verbose=0)
    >>> student.generate(4, num_steps=2).shape
    (4, 8, 8, 1)

    Reference:
        Salimans & Ho, 2022, algorithm 2; with aDDIM, the paper's table 3.
    """

    default_weighting = staticmethod(weightings.snr_plus_one)
    guidance_scale = 1.0
    takes_times = False
    from_teacher = classmethod(distillation.from_teacher)
    _first_step = distillation.teacher_step

    def __init__(
        self,
        network: keras.Layer,
        schedule: Any = None,
        *,
        student_steps: int,
        teacher_steps: int = 512,
        iterations_per_stage: int = 50_000,
        integrator: Any = None,
        eta: float = DEFAULT_ETA,
        x_var: samplers.Variance | None = None,
        **kwargs: Any,
    ):
        student_steps, teacher_steps, iterations_per_stage = (
            checks.check_positive_integer(name, value, 2**31 - 1)
            for name, value in (
                ("student_steps", student_steps),
                ("teacher_steps", teacher_steps),
                ("iterations_per_stage", iterations_per_stage),
            )
        )
        stages = math.log2(teacher_steps / student_steps)
        if stages < 1 or stages != int(stages):
            raise ValueError(
                f"`teacher_steps` must be student_steps={student_steps} times "
                "2, 4, 8 or another power of 2. Received: teacher_steps="
                f"{teacher_steps}"
            )
        of_step = distillation.check_teacher_step(integrator, eta, x_var)
        super().__init__(network, schedule, **stages_of.check(kwargs))
        self.student_steps = student_steps
        self.integrator, self.eta, self.x_var = of_step
        self.teacher_steps, self.stages = teacher_steps, int(stages)
        self.iterations_per_stage = iterations_per_stage
        self.teacher = stages_of.hold_first(self)

    def stage(self) -> Tensor:
        """The present stage, an integer scalar from 0."""
        return stages_of.present(self)

    def stage_steps(self) -> Tensor:
        """The student's number of steps in the present stage, a scalar."""
        halvings = ops.cast(self.stage() + 1, "float32")
        return self.teacher_steps / 2.0**halvings

    def teacher_step(
        self,
        x: Tensor,
        z_t: Tensor,
        logsnr_t: Tensor,
        logsnr_s: Tensor,
        conditioning: Conditioning,
    ) -> Tensor:
        """The `x` with which DDIM takes the teacher's step from t to s."""
        predicted = self.teacher.predict(z_t, logsnr_t, conditioning)
        of_first_stage = self._first_step(
            x,
            z_t,
            logsnr_t,
            logsnr_s,
            conditioning,
            predictions=(predicted, predicted),
        )
        # aDDIM corrects a diffusion model's steps. From the second stage on
        # the teacher is a student, whose DDIM steps have learnt that already.
        return ops.where(self.stage() == 0, of_first_stage, predicted)

    def trained_steps(self) -> int:
        """Number of steps that the model is trained for at present."""
        return round(float(ops.convert_to_numpy(self.stage_steps())))

    def sampled_with(self, num_steps, sampler, schedule, guidance_scale):
        asked = num_steps, sampler, schedule, guidance_scale
        return distillation.own_steps(
            self.trained_steps(), *asked, self.schedule
        )

    def default_loss(self) -> keras.losses.Loss:
        return losses.SquaredL2()

    def training_example(
        self, images: Tensor, conditioning: Conditioning, training: bool
    ) -> Example:
        x, batch = images, ops.shape(images)[:1]
        epsilon = self.draw_normal(ops.shape(x))

        # A student's step from t to t_step, the teacher's two by way of s.
        steps = self.stage_steps()
        i = 1 + ops.floor(self.draw_uniform(batch) * steps)
        times = i / steps, (i - 0.5) / steps, (i - 1) / steps
        logsnr_t, logsnr_s, logsnr_step = map(self.schedule, times)

        z_t = F.add_noise(x, epsilon, logsnr_t)
        first = self.teacher_step(x, z_t, logsnr_t, logsnr_s, conditioning)
        z_s = F.ddim(first, z_t, logsnr_t, logsnr_s)
        second = self.teacher_step(x, z_s, logsnr_s, logsnr_step, conditioning)

        # The x with which DDIM goes to where both lead, by inverse DDIM.
        target = F.consistency_target(
            first, second, logsnr_t, logsnr_s, logsnr_step
        )
        inputs = {"z": z_t, "logsnr": logsnr_t, **conditioning}
        return inputs, target, self.weighting(logsnr_t)

    def _after_update(self, before: Tensor, batch: Tensor) -> None:
        super()._after_update(before, batch)
        others = [self.network, self.teacher.network]
        stages_of.after_update(self, before, others)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "student_steps": self.student_steps,
            "teacher_steps": self.teacher_steps,
            "iterations_per_stage": self.iterations_per_stage,
            **distillation.config_of(self),
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Any = None
    ) -> Self:
        """The inverse of `get_config`, also of version 0.1's."""
        config = distillation.of_version_0_1(config)
        return super().from_config(config, custom_objects)
