"""Standard diffusion training: the teacher."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_mscm import (
    backend,
    checks,
    losses,
    samplers,
    variance,
    weightings,
)
from keras_mscm import functional as F
from keras_mscm.conditioning import Conditioning, as_dictionary
from keras_mscm.functional.process import Tensor
from keras_mscm.models import fitting
from keras_mscm.models.base import DenoisingModel, Example
from keras_mscm.variance import MeasuredVariance


@keras.saving.register_keras_serializable(package="keras_mscm")
class DiffusionModel(DenoisingModel):
    """A diffusion model: predicts `x` from `z_t` at any time (section 2).

    Arguments as in `DenoisingModel`. The loss is by default the squared v-loss
    (`SquaredL2` weighted with `SNR + 1`).

    Example:

    >>> from keras_mscm import UViT
    >>> network = UViT(image_shape=(8, 8, 1), widths=[64], depths=[1],
    ...                attention=True, num_classes=10)
    >>> teacher = DiffusionModel(network, label_dropout=0.1)
    >>> teacher.compile(optimizer=keras.optimizers.Adam(1e-3))
    >>> images = np.zeros((32, 8, 8, 1), "float32")
    >>> labels = np.arange(32) % 10
    >>> _ = teacher.fit(images, labels, verbose=0)
    >>> teacher.generate(16, num_steps=4, guidance_scale=1.5).shape
    (16, 8, 8, 1)
    """

    default_weighting = staticmethod(weightings.snr_plus_one)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.x_var_table = self.add_weight(
            shape=(variance.LEVELS,),
            dtype="float32",
            initializer="zeros",
            trainable=False,
            name="x_var_table",
        )

    def default_loss(self) -> keras.losses.Loss:
        return losses.SquaredL2()

    def training_example(
        self, images: Tensor, conditioning: Conditioning, training: bool
    ) -> Example:
        x = images
        t = self.draw_uniform(ops.shape(x)[:1])
        epsilon = self.draw_normal(ops.shape(x))
        logsnr = self.schedule(t)
        z_t = F.add_noise(x, epsilon, logsnr)
        if self.teacher is not None:  # whose guided word is to be learnt
            scale = self.guidance_scale
            x, _ = self.teacher.teach(z_t, logsnr, conditioning, scale)
        inputs = {"z": z_t, "logsnr": logsnr, **conditioning}
        return inputs, x, self.weighting(logsnr)

    def sampled_with(self, num_steps, sampler, schedule, guidance_scale):
        if guidance_scale is not None:
            self.check_guidable("guidance_scale", guidance_scale)
        sampler = samplers.ADDIM() if sampler is None else sampler
        schedule = self.schedule if schedule is None else schedule
        return num_steps or 256, sampler, schedule

    # The empirical posterior variance of aDDIM (algorithm 3).

    def measure_x_var(
        self,
        x: Any,
        y: Any = None,
        *,
        eta: float = 0.75,
        batch_size: int = 128,
        seed: int | None = None,
        nonnegative: bool = False,
    ) -> None:
        """Measures the posterior variance over data: `eta ||x_hat - x||^2 / d`.

        At 64 noise levels each; whatever their number, the images are
        evaluated at all of them, so a few thousand images are plenty. The
        table is saved with the model, and `x_var` reads it:

            model.measure_x_var(images, labels)
            model.generate(sampler=samplers.ADDIM(x_var=model.x_var))

        Args:
            x: Images, or batches of `images` or `(images, y)`.
            y: Labels or dictionary, with an array of images, as for `fit`.
            eta: Share of the squared error that is taken for the variance, in
                [0, 1]; the paper's 0.75.
            batch_size: Images per evaluation, where `x` is an array.
            seed: Seed of the noise.
            nonnegative: Whether it is meant that no image goes below 0, as in
                `fit`.

        Raises:
            ValueError: If the data are not of this model, or an argument is
                out of its range.
        """
        eta = checks.check_number("eta", eta, 0, "in [0, 1]", high=1)
        checks.check_positive_integer("batch_size", batch_size)
        seeds = backend.seed_generator(checks.check_seed("seed", seed))
        x, watches = fitting.watched(self, "x", x, y, nonnegative=nonnegative)
        levels = variance.level_logsnr()

        def squared_error(images, epsilon, conditioning, logsnr):
            images, epsilon, conditioning = backend.divided(
                (images, epsilon, conditioning)
            )
            images = self.space.encode(images)
            logsnr = ops.broadcast_to(logsnr, ops.shape(images)[:1])
            z = F.add_noise(images, epsilon, logsnr)
            x = self.denoise(self.ema_network, z, logsnr, conditioning)
            return ops.sum(F.mean_per_example(ops.square(x - images)))

        read = [*self.ema_network.variables]
        if self.encoder is not None:
            read += self.encoder.variables
        compiled = backend.compile_inference(squared_error, read)
        total, count = np.zeros(variance.LEVELS), 0
        with contextlib.ExitStack() as stack:
            for watch in watches:
                stack.enter_context(watch.reporting())
            for images, conditioning in self._batches(x, y, batch_size):
                for i, level in enumerate(levels):
                    epsilon = keras.random.normal(
                        (len(images), *self.space.shape),
                        dtype="float32",
                        seed=seeds,
                    )
                    error = compiled(images, epsilon, conditioning, level)
                    total[i] += float(ops.convert_to_numpy(error))
                count += len(images)
        self.x_var_table.assign(eta * total / count * (1 + np.exp(levels)))

    @property
    def x_var(self) -> MeasuredVariance:
        """The measured posterior variance, a function of log-SNR.

        Raises:
            ValueError: If `measure_x_var` has not been called.
        """
        table = ops.convert_to_numpy(self.x_var_table)
        if not np.any(table):
            raise ValueError(
                "`x_var` must be measured first: call `model.measure_x_var("
                "images, labels)`. Received: a model in which it is not"
            )
        return MeasuredVariance(table.tolist())

    def _batches(
        self, x: Any, y: Any, batch_size: int
    ) -> Iterator[tuple[np.ndarray, dict]]:
        """Images and conditioning, from arrays or a stream of batches."""
        for images, given in _as_batches(x, y, batch_size):
            yield (
                ops.convert_to_numpy(images).astype("float32"),
                {
                    name: ops.convert_to_numpy(value).astype(
                        self.conditioning[name].dtype
                    )
                    for name, value in as_dictionary(given).items()
                },
            )


def _as_batches(
    x: Any, y: Any, batch_size: int
) -> Iterator[tuple[np.ndarray, Any]]:
    batches: Iterable = x
    if hasattr(x, "shape"):
        batches = (
            (
                x[i : i + batch_size],
                {
                    name: value[i : i + batch_size]
                    for name, value in as_dictionary(y).items()
                },
            )
            for i in range(0, len(x), batch_size)
        )
    elif isinstance(x, keras.utils.PyDataset):
        batches = (x[i] for i in range(x.num_batches))
    for batch in batches:
        batch = tuple(batch) if isinstance(batch, (list, tuple)) else (batch,)
        images, given = (*batch, None)[:2]
        yield images, given
