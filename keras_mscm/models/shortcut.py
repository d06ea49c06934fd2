"""Shortcut models (Frans et al., 2024)."""

from typing import Any

import keras
from keras import ops

from keras_mscm import checks, losses, weightings
from keras_mscm import functional as F
from keras_mscm.conditioning import Conditioning
from keras_mscm.functional.process import Tensor
from keras_mscm.models import distillation, student_steps
from keras_mscm.models.base import DenoisingModel, Example


@keras.saving.register_keras_serializable(package="keras_mscm")
class ShortcutModel(DenoisingModel):
    """For few and many steps from one training, from scratch or a teacher's.

    The network is told how far its step leads. Most of a batch is trained as a
    diffusion model is, for the smallest step; the rest learns to do in one step
    what the model's moving average does in two of half the length, so that what
    is known of small steps grows into large ones. No teacher is evaluated.

    An update takes a pass with a gradient, and of one example in
    `bootstrap_every` two more without. The longest step is learnt by way of
    all shorter ones, and each of these by way of the average; so it wants long
    runs, or fewer `most_steps` and a lower `ema_decay`.

    Args:
        network: Network that can be told where its step ends (`UViT`).
        schedule: Noise schedule, as in `DenoisingModel`. Steps are of equal
            length in its time; the paper's is `RectifiedFlowSchedule()`.
        most_steps: The most steps that `generate` takes, a power of 2 from 2 to
            4096: one over the smallest step.
        bootstrap_every: One example in so many learns from two half steps, at
            least 2; rounded up.
        **kwargs: As in `DenoisingModel`.

    Raises:
        ValueError: If an argument is out of its range, or the network can't be
            told where its step ends.

    Example:

    >>> from keras_mscm import UViT
    >>> network = UViT(image_shape=(8, 8, 1), widths=[64], depths=[1],
    ...                attention=True)
    >>> model = ShortcutModel(network)
    >>> model.compile(optimizer=keras.optimizers.Adam(1e-4))
    >>> _ = model.fit(ops.zeros((64, 8, 8, 1)), verbose=0)
    >>> model.generate(4, num_steps=2).shape
    (4, 8, 8, 1)

    Reference:
        Frans et al., One Step Diffusion via Shortcut Models (2024), algorithm
        1, without its guidance.
    """

    default_weighting = staticmethod(weightings.snr_plus_one)
    takes_times = False
    from_teacher = classmethod(distillation.from_teacher)

    def __init__(
        self,
        network: keras.Layer,
        schedule: Any = None,
        *,
        most_steps: int = 128,
        bootstrap_every: int = 4,
        **kwargs: Any,
    ):
        most_steps = checks.check_integer("most_steps", most_steps, 2, 4096)
        if most_steps & (most_steps - 1):
            raise checks.invalid(
                "most_steps", "a power of 2 from 2 to 4096", most_steps
            )
        bootstrap_every = checks.check_integer(
            "bootstrap_every", bootstrap_every, 2
        )
        student_steps.take_end(network)
        super().__init__(network, schedule, **kwargs)
        self.most_steps, self.bootstrap_every = most_steps, bootstrap_every

    @property
    def student_steps(self) -> tuple[int, ...]:
        """The numbers of steps that it is for: powers of 2."""
        return tuple(2**i for i in range(self.most_steps.bit_length()))

    def draw_times(
        self, batch: Any, bootstrapped: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A step's beginning, middle and end, each `(batch,)`.

        Args:
            batch: The shape `(batch,)`.
            bootstrapped: Which examples learn from two half steps, `(batch,)`:
                any step but the smallest; the others' is that.
        """
        halvings = ops.floor(
            self.draw_uniform(batch) * (self.most_steps.bit_length() - 1)
        )
        steps = ops.where(bootstrapped, 2.0**halvings, float(self.most_steps))
        n = 1 + ops.floor(self.draw_uniform(batch) * steps)
        return n / steps, (n - 0.5) / steps, (n - 1) / steps

    def sampled_with(self, num_steps, sampler, schedule, guidance_scale):
        asked = num_steps, sampler, schedule, guidance_scale
        return distillation.own_steps(self.student_steps, *asked, self.schedule)

    def default_loss(self) -> keras.losses.Loss:
        return losses.SquaredL2()

    def training_example(
        self, images: Tensor, conditioning: Conditioning, training: bool
    ) -> Example:
        x, batch = images, ops.shape(images)[:1]
        epsilon = self.draw_normal(ops.shape(x))

        # The first of the batch take a step of any length, the rest the least.
        count = -(-batch[0] // self.bootstrap_every)
        times = self.draw_times(batch, ops.arange(batch[0]) < count)
        logsnr_t, logsnr_mid, logsnr_end = map(self.schedule, times)
        z_t = F.add_noise(x, epsilon, logsnr_t)

        # These learn two half steps of the average, as the x of one DDIM step,
        first, given = (
            z_t[:count],
            {k: v[:count] for k, v in conditioning.items()},
        )
        l_t, l_mid, l_end = (
            logsnr[:count] for logsnr in (logsnr_t, logsnr_mid, logsnr_end)
        )
        ema = self.ema_network
        x_1 = self.denoise(ema, first, l_t, given, logsnr_end=l_mid)
        z_mid = F.ddim(x_1, first, l_t, l_mid)
        x_2 = self.denoise(ema, z_mid, l_mid, given, logsnr_end=l_end)
        of_two = F.consistency_target(x_1, x_2, l_t, l_mid, l_end)

        # and the others their images: flow matching.
        target = ops.concatenate([of_two, x[count:]])
        inputs = {"z": z_t, "logsnr": logsnr_t, "logsnr_end": logsnr_end}
        return inputs | conditioning, target, self.weighting(logsnr_t)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "most_steps": self.most_steps,
            "bootstrap_every": self.bootstrap_every,
        }
