"""Consistency models in continuous time, sCD and sCT (Lu & Song, 2024)."""

import math
from typing import Any

import keras
from keras import ops

from keras_mscm import checks, losses, samplers, weightings
from keras_mscm import functional as F
from keras_mscm.conditioning import Conditioning
from keras_mscm.functional.process import Tensor, expand
from keras_mscm.models import continuous_time, distillation
from keras_mscm.models.base import DenoisingModel, Example
from keras_mscm.models.student_steps import ANY
from keras_mscm.networks.layers import NoiseLevelEmbedding


@keras.saving.register_keras_serializable(package="keras_mscm")
class ContinuousConsistencyModel(DenoisingModel):
    """For one or two steps, learnt from the path's own derivative.

    A consistency model says the same all along the teacher's path. In
    TrigFlow's angle t, where `z = cos(t) x + sin(t) epsilon`, the rate `df/dt`
    at which what it says still changes along the path is taken for what is to
    be corrected: there is no grid of teacher steps, and no error of a grid.
    The data's deviation is 1 here, with which TrigFlow's F is our v.

    The paper's network is smooth in time. By default the derivative is a
    difference, so that others will do, and times are drawn evenly. Measured on
    `digits_teacher`, by the Frechet distance over that of the teacher's best: a
    student of 400 updates of 64 images (Adam, 3e-4, from a log-SNR of -9) has
    4.9, 1.6 and 1.7 in 1, 2 and 4 steps, where the teacher has 35.9, 15.7 and
    6.3 by DDIM. In forward mode, with the paper's draw of times, 1000 updates
    at 5e-4 gave 220, 213 and 238; smooth networks have been measured less (400
    updates with a teacher of `time_rate=20`, even times: 14.7, 17.0, 15.8).
    `MultistepConsistencyModel`, one student for each number, is better in so
    few updates: 2.9 and 1.7 in 1 and 2 steps after 300.

    An update takes the network's rate, two evaluations by a difference, about
    two and their memory in forward mode, and one evaluation with a gradient;
    "distillation" the teacher's besides.

    `generate` begins with `num_steps=1`. With more, each prediction is noised
    afresh (`samplers.Renoise`): with two at the schedule's middle, which for a
    cosine schedule is where the paper does it.

    Args:
        network: Network, as in `DenoisingModel`. Usually made by
            `from_teacher`.
        schedule: Noise schedule, as in `DenoisingModel`. The tangent vanishes
            in pure noise, so begin where there is some signal (the paper: a
            log-SNR of about -10).
        method: `"distillation"` (sCD) takes the path's direction from a
            teacher's prediction, `"training"` (sCT) from the images.
        noise_mean: Mean of the log of the noise-to-signal ratio, in [-40, 40];
            the paper's is -1. None draws times evenly over the schedule.
        noise_std: Its standard deviation, in [0.001, 40], the paper's 1.4.
            Given together with `noise_mean`, or neither.
        warmup_iterations: Updates over which the network's own derivative
            comes into the tangent (H), at least 1. A tenth of a short run.
        tangent_constant: What the tangent's norm is increased by when the
            tangent is divided by it (c), positive.
        adaptive_weighting: Whether a small layer learns the weight of each
            noise level besides (Karras et al., 2024): the loss is then
            `exp(w) loss - w`.
        derivative: How the network's rate is found: by a
            `"finite_difference"`, another evaluation, of any network; or by
            a Jacobian-vector product, `"forward_mode"` (the paper), which is
            exact, and takes a network that is smooth in time (`time_rate` of
            `UViT`) and has such derivatives.
        difference_step: How far the difference looks back, as a share of time,
            in [0.001, 0.25]; at least 1/32 in half precision.
        guidance_scale: Scale of the teacher's classifier-free guidance, at
            least 0: 1 is none. With "distillation" alone.
        teacher: What it learns from, as for `attach_teacher`.
        **kwargs: As in `DenoisingModel`. `weighting` is that of the squared
            error of x; by default it is that of v, as in the paper.

    Raises:
        ValueError: If an argument is out of its range, or has no effect beside
            the others.

    Example:

    >>> from keras_mscm import DiffusionModel, UViT
    >>> network = UViT(image_shape=(8, 8, 1), widths=[64], depths=[1],
    ...                attention=True)
    >>> teacher = DiffusionModel(network)  # trained, in earnest
    >>> student = ContinuousConsistencyModel.from_teacher(
    ...     teacher, warmup_iterations=100
    ... )
    >>> student.compile(optimizer=keras.optimizers.Adam(1e-4))
    >>> _ = student.fit(ops.zeros((32, 8, 8, 1)), verbose=0)
    >>> student.generate(4, num_steps=2).shape
    (4, 8, 8, 1)

    Reference:
        Lu & Song, Simplifying, Stabilizing & Scaling Continuous-Time
        Consistency Models (2024), algorithm 1.
    """

    default_weighting = staticmethod(weightings.snr_plus_one)
    from_teacher = classmethod(distillation.from_teacher)
    attach_teacher = distillation.attach_teacher

    def __init__(
        self,
        network: keras.Layer,
        schedule: Any = None,
        *,
        method: str = "distillation",
        noise_mean: float | None = None,
        noise_std: float | None = None,
        warmup_iterations: int = 10_000,
        tangent_constant: float = 0.1,
        adaptive_weighting: bool = True,
        derivative: str = "finite_difference",
        difference_step: float = continuous_time.DIFFERENCE_STEP,
        guidance_scale: float = 1.0,
        teacher: Any = None,
        **kwargs: Any,
    ):
        shared = continuous_time.check(
            method,
            noise_mean,
            noise_std,
            guidance_scale,
            derivative,
            difference_step,
            teacher,
            network,
        )
        warmup = checks.check_positive_integer(
            "warmup_iterations", warmup_iterations
        )
        constant = checks.check_number(
            "tangent_constant",
            tangent_constant,
            1e-12,
            "a positive number in [1e-12, 1e12]",
            1e12,
        )
        checks.check_boolean("adaptive_weighting", adaptive_weighting)
        super().__init__(network, schedule, **kwargs)
        for name, value in shared.items():
            setattr(self, name, value)
        self.warmup_iterations, self.tangent_constant = warmup, constant
        self.adaptive_weighting = bool(adaptive_weighting)
        self.needs_teacher = method == "distillation"
        self.teacher = distillation.own_base(self)
        if adaptive_weighting:
            self.embed_weight = NoiseLevelEmbedding(
                32, dtype="float32", name="embed_weight"
            )
            self.exit_weight = keras.layers.Dense(
                1,
                kernel_initializer="zeros",
                dtype="float32",
                name="exit_weight",
            )
            self.embed_weight.build((None,))
            self.exit_weight.build((None, 32))
        if teacher is not None:
            self.attach_teacher(teacher)

    def warmup(self) -> Tensor:
        """The share of the network's own derivative (r), a scalar in [0, 1]."""
        done = ops.cast(self.iteration.value, "float32")
        return ops.minimum(done / self.warmup_iterations, 1.0)

    def sampled_with(self, num_steps, sampler, schedule, guidance_scale):
        asked = num_steps or 1, sampler, schedule, guidance_scale
        num_steps, _, schedule = distillation.own_steps(
            ANY, *asked, self.schedule
        )
        return num_steps, samplers.Renoise(), schedule

    def default_loss(self) -> keras.losses.Loss:
        return losses.SquaredL2()

    def training_example(
        self, images: Tensor, conditioning: Conditioning, training: bool
    ) -> Example:
        epsilon = self.draw_normal(ops.shape(images))
        logsnr = continuous_time.draw_logsnr(self, ops.shape(images)[:1])
        z = F.add_noise(images, epsilon, logsnr)

        # dz/dt = (cos(t) z - x) / sin(t), of the images or the teacher's x.
        x = continuous_time.path_end(self, images, z, logsnr, conditioning)

        # f = cos(t) z - sin(t) F, and its rate
        # df/dt = -cos(t) (F - dz/dt) - sin(t) (z + dF/dt).
        f, rate = continuous_time.prediction_and_rate(
            self, x, z, logsnr, conditioning, training
        )

        # The tangent is cos(t) df/dt, of which the second term is let in
        # slowly, because it is the one that is unstable. The first is
        # (f - x) / tan(t).
        cos, sin = expand(F.alpha(logsnr), x), expand(F.sigma(logsnr), x)
        first = cos / sin * (f - x)
        tangent = cos * (first + self.warmup() * (rate - first))
        norm = ops.sqrt(
            math.prod(self.image_shape) * F.mean_per_example(tangent**2)
        )
        tangent = tangent / (expand(norm, x) + self.tangent_constant)

        # F is to become F + tangent, so f is to become
        target = f - sin * tangent
        inputs = {"z": z, "logsnr": logsnr, **conditioning}
        return inputs, target, self.weighting(logsnr)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Tensor:
        """`exp(w) loss - w` with a w that is learnt, or the plain loss."""
        plain = x is None or not self.adaptive_weighting  # `compile` has no x
        if not plain:
            w = self.exit_weight(self.embed_weight(x["logsnr"]))[:, 0]
            sample_weight = ops.exp(w) * sample_weight
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        if plain:
            return loss
        # As Keras does with what `add_loss` is given, because TensorFlow's
        # replicas sum up their losses.
        return loss - self._aggregate_additional_loss(ops.mean(w))

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            **continuous_time.config_of(self),
            "warmup_iterations": self.warmup_iterations,
            "tangent_constant": self.tangent_constant,
            "adaptive_weighting": self.adaptive_weighting,
        }
