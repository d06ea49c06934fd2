"""Standard diffusion training: the teacher."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_mscm import functional as F
from keras_mscm import losses, samplers
from keras_mscm.functional.process import Tensor
from keras_mscm.models.base import DenoisingModel, Example, Sampler


@keras.saving.register_keras_serializable(package="keras_mscm")
class DiffusionModel(DenoisingModel):
    """A diffusion model: predicts `x` from `z_t` at any time (section 2).

    Arguments as in `DenoisingModel`. The loss is by default the squared v-loss
    (`SquaredL2` weighted with `SNR + 1`).

    Example:

    >>> from keras_mscm import UViT
    >>> network = UViT(image_shape=(8, 8, 1), widths=[64], depths=[1],
    ...                attention=True)
    >>> teacher = DiffusionModel(network)
    >>> teacher.compile(optimizer=keras.optimizers.Adam(1e-3))
    >>> _ = teacher.fit(np.zeros((32, 8, 8, 1), "float32"), verbose=0)
    >>> teacher.generate(16, num_steps=4).shape
    (16, 8, 8, 1)
    """

    default_weighting = staticmethod(losses.snr_plus_one)

    def default_loss(self) -> keras.losses.Loss:
        return losses.SquaredL2()

    def training_example(
        self, images: Tensor, labels: Tensor | None, training: bool
    ) -> Example:
        x = images
        t = keras.random.uniform(ops.shape(x)[:1], seed=self.seed_generator)
        epsilon = keras.random.normal(ops.shape(x), seed=self.seed_generator)
        logsnr = self.schedule(t)
        inputs = {"z": F.add_noise(x, epsilon, logsnr), "logsnr": logsnr}
        if labels is not None:
            inputs["labels"] = labels
        return inputs, x, self.weighting(logsnr)

    def generate(
        self,
        num_images: int | None = None,
        *,
        num_steps: int = 256,
        sampler: Sampler = samplers.addim,
        labels: Any = None,
        noise: Any = None,
        seed: int | None = None,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Draws images.

        Args:
            num_images: How many; one of each class by default.
            num_steps: Evaluations of the network.
            sampler: `keras_mscm.samplers.addim`, `ddim`, or any function of
                `(denoise, noise, schedule, num_steps)`.
            labels: Classes, `(num_images,)`; 0, 1, ... in turn by default.
            noise: Standard normal noise to begin from, `(num_images, height,
                width, channels)`.
            seed: Seed of that noise, where it isn't given.
            batch_size: Images per call of the compiled sampler, 128 at most by
                default. Each batch size is compiled once.

        Returns:
            NumPy array, `(num_images, height, width, channels)`, clipped to
            [-1, 1].

        Raises:
            ValueError: If an argument is out of its range, or they disagree.
        """
        return self._generate(
            sampler, num_steps, num_images, labels, noise, seed, batch_size
        )
