"""Consistency tuning (Geng et al., 2024; Song & Dhariwal, 2023)."""

from typing import Any

import keras
from keras import ops

from keras_mscm import backend, checks, losses, weightings
from keras_mscm import functional as F
from keras_mscm.conditioning import Conditioning
from keras_mscm.functional.process import Tensor
from keras_mscm.models import distillation
from keras_mscm.models.base import DenoisingModel, Example
from keras_mscm.models.saving import random_states

# ECT's k and b: how much wider a gap is at little noise, and up to where.
WIDENING, WIDENING_SLOPE = 8.0, 1.0
# Log-SNR by which t is kept off the end of time, where it has no segment.
MARGIN = 0.01


@keras.saving.register_keras_serializable(package="keras_mscm")
class ConsistencyTuningModel(DenoisingModel):
    """For a student without a teacher's evaluations: ECT and iCT.

    A diffusion model is tuned on images alone to say at t what it says at r,
    a gap below, of the same image and noise. At first the gap reaches to the
    segment's end, where that is the diffusion loss; each `iterations_per_stage`
    updates divide it by `gap_divisor`. An update takes two evaluations of the
    network, one of them with a gradient.

    Times are drawn by their noise-to-signal ratio, log-normal as in iCT, which
    takes few of them near either end; what would lie beyond the schedule is
    taken at its end. So let the schedule begin about where the papers do,
    `CosineSchedule(logsnr_min=-9)` (a ratio of 90), since sampling does.

    Args:
        network: Network, as in `DenoisingModel`. Usually made by
            `from_teacher`.
        schedule: Noise schedule, as in `DenoisingModel`. It says which times
            there are and where segments end, and not how times are drawn.
        student_steps: Evaluations that `generate` takes (K): the segments
            within which the model is consistent; 1 in the papers.
        noise_mean: Mean of the log of the noise-to-signal ratio (P_mean). The
            default and that of `noise_std` are iCT's, and ECT's on CIFAR-10;
            on ImageNet64 ECT takes -0.8 and 1.6.
        noise_std: Its standard deviation (P_std), positive.
        gap_divisor: What a stage divides the gap by (q), above 1; ECT takes 2
            and 4.
        iterations_per_stage: Updates in each stage (d), at least 1. An eighth
            of the run is ECT's.
        stages: How often the gap is divided, 0 to 20; the last stage lasts.
        **kwargs: As in `DenoisingModel`. `weighting` is a factor besides the
            papers' weight, 1 over the gap.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    >>> from keras_mscm import DiffusionModel, UViT
    >>> from keras_mscm.schedules import CosineSchedule
    >>> network = UViT(image_shape=(8, 8, 1), widths=[64], depths=[1],
    ...                attention=True)
    >>> teacher = DiffusionModel(network)  # trained, in earnest
    >>> student = ConsistencyTuningModel.from_teacher(
    ...     teacher, schedule=CosineSchedule(logsnr_min=-9),
    ...     iterations_per_stage=1,
    ... )
    >>> student.compile(optimizer=keras.optimizers.Adam(1e-4))
    >>> _ = student.fit(ops.zeros((64, 8, 8, 1)), verbose=0)
    >>> student.generate(4).shape
    (4, 8, 8, 1)

    Reference:
        Geng et al., Consistency Models Made Easy (2024), section 3; the times,
        weight and loss are those of Song & Dhariwal (2023), Improved
        Techniques for Training Consistency Models.
    """

    default_weighting = staticmethod(weightings.uniform)
    takes_times = False
    from_teacher = classmethod(distillation.from_teacher)

    def __init__(
        self,
        network: keras.Layer,
        schedule: Any = None,
        *,
        student_steps: int = 1,
        noise_mean: float = -1.1,
        noise_std: float = 2.0,
        gap_divisor: float = 2.0,
        iterations_per_stage: int = 50_000,
        stages: int = 8,
        **kwargs: Any,
    ):
        student_steps = checks.check_positive_integer(
            "student_steps", student_steps, 2**20
        )
        noise_mean = checks.check_number(
            "noise_mean", noise_mean, -40, "a number in [-40, 40]", 40
        )
        noise_std = checks.check_number(
            "noise_std", noise_std, 1e-3, "a number in [0.001, 40]", 40
        )
        gap_divisor = checks.check_number(
            "gap_divisor", gap_divisor, 1.01, "a number in [1.01, 16]", 16
        )
        iterations_per_stage = checks.check_positive_integer(
            "iterations_per_stage", iterations_per_stage
        )
        stages = checks.check_integer("stages", stages, 0, 20)
        if gap_divisor**stages > 2**20:
            raise ValueError(
                "`gap_divisor` to the power of `stages` must be at most 2**20, "
                "as times of a smaller gap are one in float32. Received: "
                f"gap_divisor={gap_divisor}, stages={stages}"
            )
        super().__init__(network, schedule, **kwargs)
        self.student_steps = student_steps
        self.noise_mean, self.noise_std = noise_mean, noise_std
        self.gap_divisor, self.stages = gap_divisor, stages
        self.iterations_per_stage = iterations_per_stage

    def stage(self) -> Tensor:
        """How often the gap has been divided (a), an integer scalar."""
        done = self.iteration.value // self.iterations_per_stage
        return ops.minimum(done, self.stages)

    def relative_gap(self, ratio: Tensor) -> Tensor:
        """ECT's `1 - r / t`, in (0, 1]: `n(t) / q**a`, no further than 0.

        Args:
            ratio: Noise-to-signal ratio t, `(batch,)`.
        """
        widening = 1 + WIDENING * ops.sigmoid(-WIDENING_SLOPE * ratio)
        divided = self.gap_divisor ** ops.cast(self.stage(), "float32")
        return ops.minimum(widening / divided, 1.0)

    def draw_times(self, batch: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-SNR at t, r and the segment's end; and the gap, all `(batch,)`.

        Args:
            batch: The shape `(batch,)`.
        """
        k = self.student_steps
        bounds = self.schedule(ops.arange(k + 1, dtype="float32") / k)
        normal = self.draw_normal(batch)
        logsnr_t = -2 * (self.noise_mean + self.noise_std * normal)
        logsnr_t = ops.clip(logsnr_t, bounds[k], bounds[0] - MARGIN)

        # A segment's own beginning belongs to it, and its end to the next.
        beyond = ops.cast(bounds[None, :k] > logsnr_t[:, None], "int32")
        logsnr_step = ops.take(bounds, ops.sum(beyond, axis=1) - 1)

        ratio = ops.exp(-logsnr_t / 2)
        gap = self.relative_gap(ratio)
        # Where r is 0 its log-SNR is infinite, beyond any segment's end.
        logsnr_r = ops.minimum(logsnr_t - 2 * ops.log1p(-gap), logsnr_step)
        return logsnr_t, logsnr_r, logsnr_step, gap * ratio

    def sampled_with(self, num_steps, sampler, schedule, guidance_scale):
        asked = num_steps, sampler, schedule, guidance_scale
        return distillation.own_steps(self.student_steps, *asked, self.schedule)

    def default_loss(self) -> keras.losses.Loss:
        # iCT's c = 0.00054 sqrt(d), of the mean over the d dimensions.
        return losses.PseudoHuber(0.00054)

    def training_example(
        self, images: Tensor, conditioning: Conditioning, training: bool
    ) -> Example:
        x, batch = images, ops.shape(images)[:1]
        epsilon = self.draw_normal(ops.shape(x))

        # t, log-normal in its noise, and r, the gap below it in the segment.
        logsnr_t, logsnr_r, logsnr_step, gap = self.draw_times(batch)
        z_t = F.add_noise(x, epsilon, logsnr_t)
        z_r = F.add_noise(x, epsilon, logsnr_r)

        # What the model itself says at r, under the dropout of its pass at t.
        network = self.network if training else self.ema_network
        with backend.rewound(random_states(network)):
            x_r = self.denoise(network, z_r, logsnr_r, conditioning, training)

        # Where the segment ends at no noise at all, this is x_r; and x, where
        # r is the segment's end.
        target = F.consistency_target(x, x_r, logsnr_t, logsnr_r, logsnr_step)
        inputs = {"z": z_t, "logsnr": logsnr_t, **conditioning}
        return inputs, target, self.weighting(logsnr_t) / gap

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "student_steps": self.student_steps,
            "noise_mean": self.noise_mean,
            "noise_std": self.noise_std,
            "gap_divisor": self.gap_divisor,
            "iterations_per_stage": self.iterations_per_stage,
            "stages": self.stages,
        }
