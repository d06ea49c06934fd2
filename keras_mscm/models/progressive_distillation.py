"""Progressive distillation (Salimans & Ho, 2022), the paper's baseline."""

import math
from typing import Any

import keras
from keras import ops

from keras_mscm import checks, losses
from keras_mscm import functional as F
from keras_mscm.functional.process import Tensor
from keras_mscm.models.base import Example
from keras_mscm.models.denoiser import Conditioning
from keras_mscm.models.moving_average import clone_network
from keras_mscm.models.student import StudentModel


@keras.saving.register_keras_serializable(package="keras_mscm")
class ProgressiveDistillationModel(StudentModel):
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
        **kwargs: As in `StudentModel`: `integrator`, `eta`, `x_var`, which are
            those of the first stage's teacher, and what `DenoisingModel`
            takes. There is no `guidance_scale`: distil a
            guided teacher by `GuidanceDistillationModel` first.

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

    default_weighting = staticmethod(losses.snr_plus_one)

    def __init__(
        self,
        network: keras.Layer,
        schedule: Any = None,
        *,
        student_steps: int,
        teacher_steps: int = 512,
        iterations_per_stage: int = 50_000,
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
        guidance_scale = kwargs.pop("guidance_scale", 1.0)
        checks.check_number(
            "guidance_scale",
            guidance_scale,
            1,
            "1, because after the first stage the teacher is a student, which "
            "would be guided again; distil the guided teacher by a "
            "`GuidanceDistillationModel` first",
            high=1,
        )
        super().__init__(
            network, schedule, student_steps=student_steps, **kwargs
        )
        self.teacher_steps, self.stages = teacher_steps, int(stages)
        self.iterations_per_stage = iterations_per_stage
        self.teacher.hold(clone_network(network, "teacher_network"))
        self.teacher.saved = True

    def stage(self) -> Tensor:
        """The present stage, an integer scalar from 0."""
        done = self.iteration.value // self.iterations_per_stage
        return ops.minimum(done, self.stages - 1)

    def stage_steps(self) -> Tensor:
        """The student's number of steps in the present stage, a scalar."""
        halvings = ops.cast(self.stage() + 1, "float32")
        return self.teacher_steps / 2.0**halvings

    def teacher_step(self, x, z_t, logsnr_t, logsnr_s, conditioning):
        x_teacher, x_conditional = self.teach(z_t, logsnr_t, conditioning)
        x_step = self.integrate(
            x_teacher, x_conditional, x, z_t, logsnr_t, logsnr_s, conditioning
        )
        # aDDIM corrects a diffusion model's steps. From the second stage on
        # the teacher is a student, whose DDIM steps have learnt that already.
        return ops.where(self.stage() == 0, x_step, x_teacher)

    def trained_steps(self) -> int:
        return round(float(ops.convert_to_numpy(self.stage_steps())))

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
        i = self.iteration.value
        ends = ops.logical_and(
            i % self.iterations_per_stage == 0,
            i < self.stages * self.iterations_per_stage,
        )
        # Of the batches of a gradient accumulation only the last updates.
        ends = ops.logical_and(ends, self.optimizer.iterations > before)
        for average, *others in zip(
            self.ema_network.weights,
            self.network.weights,
            self.teacher.network.weights,
            strict=True,
        ):
            for other in others:
                other.assign(ops.where(ends, average.value, other.value))

    def get_config(self) -> dict[str, Any]:
        config = {
            **super().get_config(),
            "teacher_steps": self.teacher_steps,
            "iterations_per_stage": self.iterations_per_stage,
        }
        del config["guidance_scale"]
        return config
