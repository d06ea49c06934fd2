"""MeanFlow (Geng et al., 2025)."""

import math
from typing import Any

import keras
from keras import ops

from keras_mscm import checks, losses, weightings
from keras_mscm import functional as F
from keras_mscm.conditioning import Conditioning
from keras_mscm.functional.parameterizations import flow_time
from keras_mscm.functional.process import Tensor
from keras_mscm.models import continuous_time, distillation, student_steps
from keras_mscm.models.arguments import BELOW_1
from keras_mscm.models.base import DenoisingModel, Example


@keras.saving.register_keras_serializable(package="keras_mscm")
class MeanFlowModel(DenoisingModel):
    """For one step or any number, learnt from the path's own derivative.

    In rectified flow's time, where `z_t = (1 - t) x + t epsilon` moves with the
    velocity `v = epsilon - x`, the model learns the average velocity u of the
    way from t to any earlier r. It is the derivative of an identity that makes
    the target,

        u = v - (t - r) du/dt,

    so that there is no grid of teacher steps, and none to anneal. Our networks
    predict `x = z_t - t u`, which is the `x` with which DDIM jumps from t to r;
    in it the target has no small denominator.

    The paper's network is smooth in time. By default the derivative is a
    difference, so that others will do, and times are drawn evenly, so that
    sampling's first is among them. Measured on `digits_teacher`, by the Frechet
    distance over that of the teacher's best: a student of 1000 updates of 64
    images (Adam, 1e-3) has 2.4, 1.5 and 1.2 in 1, 2 and 4 steps (after 400 9.4,
    2.9 and 1.4), where the teacher has 35.9, 15.7 and 6.3 by DDIM. In forward
    mode, with the paper's draw of times and weight, 1000 updates at 5e-4 left
    it at 36.0, 15.7 and 6.2. With a teacher of `time_rate=20`, forward mode and
    even times gave 5.7, 1.7 and 2.1 after 400. `MultistepConsistencyModel`, one
    student for each number of steps, has 1.4 and 1.1 in 1 and 2 after 1000.

    An update takes the network's rate, two evaluations by a difference, about
    two and their memory in forward mode, and one evaluation with a gradient.

    Args:
        network: Network, as in `DenoisingModel`, that can be told where its
            step ends. Usually made by `from_teacher`.
        schedule: Noise schedule, as in `DenoisingModel`.
        method: `"training"` takes v from the images (the paper), and
            `"distillation"` from a teacher's prediction.
        noise_mean: Mean of the logit of t, which is the log of the
            noise-to-signal ratio, in [-40, 40]; the paper's is -0.4. None
            draws times evenly over the schedule.
        noise_std: Its standard deviation, in [0.001, 40], the paper's 1.
            Given together with `noise_mean`, or neither.
        instantaneous: Share of the examples with r = t, which are diffusion's,
            in [0, 1). The paper trains with 0.75; a student who begins with
            its teacher's weights knows these.
        weight_power: The weight is 1 over the error's square norm to this
            power (p), in [0, 2]; 0 is the plain squared error. The paper
            trains with 1. In distillation, where the error has no noise, that
            gives nearly all of the weight to examples that are right already.
        weight_constant: What is added to that norm first (c), positive.
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
            error of x before `weight_power`; by default it is u's.

    Raises:
        ValueError: If an argument is out of its range, or has no effect beside
            the others.

    Example:

    >>> from keras_mscm import DiffusionModel, UViT
    >>> network = UViT(image_shape=(8, 8, 1), widths=[64], depths=[1],
    ...                attention=True)
    >>> teacher = DiffusionModel(network)  # trained, in earnest
    >>> student = MeanFlowModel.from_teacher(teacher)
    >>> student.compile(optimizer=keras.optimizers.Adam(1e-4))
    >>> _ = student.fit(ops.zeros((32, 8, 8, 1)), verbose=0)
    >>> student.generate(4, num_steps=2).shape
    (4, 8, 8, 1)

    Reference:
        Geng et al., Mean Flows for One-step Generative Modeling (2025),
        algorithm 1 and section 4.3.
    """

    default_weighting = staticmethod(weightings.flow_velocity)
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
        instantaneous: float = 0.25,
        weight_power: float = 0.0,
        weight_constant: float = 1e-3,
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
        instantaneous = checks.check_number(
            "instantaneous", instantaneous, 0, "in [0, 1)", BELOW_1
        )
        power = checks.check_number(
            "weight_power", weight_power, 0, "a number in [0, 2]", 2
        )
        constant = checks.check_number(
            "weight_constant",
            weight_constant,
            1e-12,
            "a positive number in [1e-12, 1e12]",
            1e12,
        )
        student_steps.take_end(network)
        super().__init__(network, schedule, **kwargs)
        for name, value in shared.items():
            setattr(self, name, value)
        self.instantaneous = instantaneous
        self.weight_power, self.weight_constant = power, constant
        self.needs_teacher = method == "distillation"
        self.teacher = distillation.own_base(self)
        if teacher is not None:
            self.attach_teacher(teacher)

    def draw_times(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Log-SNR at t and at r <= t, each `(batch,)`.

        Args:
            batch: The shape `(batch,)`.
        """
        one, other = (continuous_time.draw_logsnr(self, batch) for _ in "tr")
        logsnr_t = ops.minimum(one, other)
        same = self.draw_uniform(batch) < self.instantaneous
        return logsnr_t, ops.where(same, logsnr_t, ops.maximum(one, other))

    def sampled_with(self, num_steps, sampler, schedule, guidance_scale):
        asked = num_steps or 1, sampler, schedule, guidance_scale
        return distillation.own_steps(student_steps.ANY, *asked, self.schedule)

    def default_loss(self) -> keras.losses.Loss:
        return losses.SquaredL2()

    def training_example(
        self, images: Tensor, conditioning: Conditioning, training: bool
    ) -> Example:
        epsilon = self.draw_normal(ops.shape(images))
        logsnr_t, logsnr_r = self.draw_times(ops.shape(images)[:1])
        z_t = F.add_noise(images, epsilon, logsnr_t)
        at_t = logsnr_t, conditioning

        # The velocity is v = (z_flow - x) / t of the images or the teacher's.
        x = continuous_time.path_end(self, images, z_t, *at_t)

        # The prediction, and its rate with r held; dt = dtheta / (alpha +
        # sigma)^2.
        end = {"logsnr_end": logsnr_r}
        x_model, rate = continuous_time.prediction_and_rate(
            self, x, z_t, *at_t, training, **end
        )
        rate = rate * F.expand((F.alpha(logsnr_t) + F.sigma(logsnr_t)) ** 2, x)

        # u_target = v - (t - r) du/dt, with u = (z_flow - x_model) / t, is
        # z_flow - t u_target in x.
        t, r = flow_time(logsnr_t), flow_time(logsnr_r)
        ahead = F.expand(1 - r / t, x)
        target = x + ahead * (x_model - x) - F.expand(t - r, x) * rate

        inputs = {"z": z_t, "logsnr": logsnr_t, **end, **conditioning}
        return inputs, target, self._weight(x_model - target, logsnr_t)

    def _weight(self, error: Tensor, logsnr: Tensor) -> Tensor:
        """`1 / (|du|^2 + c)^p`, for the error of x and its mean over d."""
        of_x = math.prod(self.image_shape) * self.weighting(logsnr)
        square = of_x * F.mean_per_example(ops.square(error))
        return of_x / (square + self.weight_constant) ** self.weight_power

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            **continuous_time.config_of(self),
            "instantaneous": self.instantaneous,
            "weight_power": self.weight_power,
            "weight_constant": self.weight_constant,
        }
