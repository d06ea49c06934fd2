"""Transitive closure time-distillation, TRACT (Berthelot et al., 2023)."""

import itertools
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_mscm import checks, losses, weightings
from keras_mscm import functional as F
from keras_mscm.conditioning import Conditioning
from keras_mscm.functional.process import Tensor
from keras_mscm.models import arguments, distillation, moving_average
from keras_mscm.models import stages as stages_of
from keras_mscm.models.base import DenoisingModel, Example


@keras.saving.register_keras_serializable(package="keras_mscm")
class TractModel(DenoisingModel):
    """For a distillation in few stages, where progressive's halvings are many.

    In each stage the model learns to do in one step what its teacher does in a
    group of many: from anywhere in a group it takes one step of the teacher's,
    and for the rest of the group the word of its own fast moving average, the
    self-teacher. After `iterations_per_stage` updates its (slow) average
    becomes the teacher, of as few steps as it has learnt. An update takes three
    evaluations of the network, one of them with a gradient.

    Teacher and self-teacher are parts of this model and of its file, which with
    the network and its average are four times the weights.

    Args:
        network: A trained diffusion model's network; `from_teacher` takes it.
        schedule: Noise schedule, as in `DenoisingModel`.
        steps: Steps of the first teacher, and what each stage makes of them:
            falling, each a divisor of the one before. The last are the
            evaluations that `generate` takes in the end. The default is the
            paper's.
        iterations_per_stage: Updates in each stage, at least 1.
        self_decay: Decay of the self-teacher per update, in [0, 1).
        **kwargs: As in `DenoisingModel`, but for `ema`: stages begin with the
            moving average. There is no `guidance_scale`: distil a guided
            teacher by `GuidanceDistillationModel` first.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    >>> from keras_mscm import DiffusionModel, UViT
    >>> network = UViT(image_shape=(8, 8, 1), widths=[64], depths=[1],
    ...                attention=True)
    >>> teacher = DiffusionModel(network)  # trained, in earnest
    >>> student = TractModel.from_teacher(
    ...     teacher, steps=(64, 8, 1), iterations_per_stage=1
    ... )
    >>> student.compile(optimizer=keras.optimizers.Adam(1e-4))
    >>> _ = student.fit(ops.zeros((64, 8, 8, 1)), verbose=0)
    >>> student.generate(4, num_steps=1).shape
    (4, 8, 8, 1)

    Reference:
        Berthelot et al., TRACT: Denoising Diffusion Models with Transitive
        Closure Time-Distillation (2023), section 3.
    """

    default_weighting = staticmethod(weightings.snr_plus_one)
    guidance_scale = 1.0
    takes_times = False
    from_teacher = classmethod(distillation.from_teacher)

    def __init__(
        self,
        network: keras.Layer,
        schedule: Any = None,
        *,
        steps: Sequence[int] = (1024, 32, 1),
        iterations_per_stage: int = 50_000,
        self_decay: float = 0.5,
        **kwargs: Any,
    ):
        steps = _check_steps(steps)
        iterations_per_stage = checks.check_positive_integer(
            "iterations_per_stage", iterations_per_stage
        )
        self_decay = checks.check_number(
            "self_decay", self_decay, 0, "in [0, 1)", arguments.BELOW_1
        )
        super().__init__(network, schedule, **stages_of.check(kwargs))
        self.steps, self.stages = steps, len(steps) - 1
        self.iterations_per_stage = iterations_per_stage
        self.self_decay = self_decay
        self.teacher = stages_of.hold_first(self)
        self.self_teacher = stages_of.held(self, "self_teacher")

    def stage(self) -> Tensor:
        """The present stage, an integer scalar from 0."""
        return stages_of.present(self)

    def stage_steps(self) -> tuple[Tensor, Tensor]:
        """The teacher's and the student's steps at present, scalars."""
        steps = ops.convert_to_tensor(self.steps, "float32")
        stage = self.stage()
        return ops.take(steps, stage), ops.take(steps, stage + 1)

    def trained_steps(self) -> int:
        """Number of steps that the model is trained for at present."""
        return self.steps[int(ops.convert_to_numpy(self.stage())) + 1]

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

        # One of the teacher's steps, t -> s, in a group that ends at t_end.
        teachers, students = self.stage_steps()
        group = teachers / students
        step = ops.floor(self.draw_uniform(batch) * students)
        n_rel = 1 + ops.floor(self.draw_uniform(batch) * group)
        times = F.segment_times(step, n_rel, students, group)
        logsnr_t, logsnr_s, logsnr_end = map(self.schedule, times)

        z_t = F.add_noise(x, epsilon, logsnr_t)
        x_teacher = self.teacher.predict(z_t, logsnr_t, conditioning)
        z_s = F.ddim(x_teacher, z_t, logsnr_t, logsnr_s)

        # The rest of the group is the self-teacher's one step from s.
        x_self = self.self_teacher.predict(z_s, logsnr_s, conditioning)
        target = F.consistency_target(
            x_teacher, x_self, logsnr_t, logsnr_s, logsnr_end
        )
        inputs = {"z": z_t, "logsnr": logsnr_t, **conditioning}
        return inputs, target, self.weighting(logsnr_t)

    def _after_update(self, before: Tensor, batch: Tensor) -> None:
        super()._after_update(before, batch)
        own, i = self.self_teacher.network, self.iteration
        updates = ops.cast(self.optimizer.iterations - before, "float32")
        rate = (1 - self.self_decay) * updates
        moving_average.update(own, self.network, rate, i)
        others = [self.network, self.teacher.network, own]
        stages_of.after_update(self, before, others)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "steps": self.steps,
            "iterations_per_stage": self.iterations_per_stage,
            "self_decay": self.self_decay,
        }


def _check_steps(steps: Any) -> tuple[int, ...]:
    """Raises unless each number of steps divides the one before."""
    allowed = "two or more integers, each a smaller divisor of the one before"
    numbers = tuple(
        checks.check_positive_integer("steps", n, 2**20)
        for n in checks.check_sequence("steps", steps, allowed)
    )
    pairs = list(itertools.pairwise(numbers))
    if not pairs or any(n <= m or n % m for n, m in pairs):
        raise checks.invalid("steps", allowed, steps)
    return numbers
