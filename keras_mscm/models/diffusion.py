"""Standard diffusion training: the teacher."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_mscm import backend, checks, losses, samplers, variance
from keras_mscm import functional as F
from keras_mscm.functional.process import Tensor
from keras_mscm.models import data_checks
from keras_mscm.models.base import DenoisingModel, Example
from keras_mscm.models.denoiser import Conditioning, Sampler
from keras_mscm.models.sampling import CONDITIONING_DTYPES, Request
from keras_mscm.schedules import NoiseSchedule
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

    default_weighting = staticmethod(losses.snr_plus_one)

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
        inputs = {"z": z_t, "logsnr": logsnr, **conditioning}
        return inputs, x, self.weighting(logsnr)

    def generate(
        self,
        num_images: int | None = None,
        *,
        num_steps: int = 256,
        sampler: Sampler | None = None,
        schedule: NoiseSchedule | None = None,
        guidance_scale: float | None = None,
        labels: Any = None,
        context: Any = None,
        context_mask: Any = None,
        noise: Any = None,
        seed: int | None = None,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Draws images.

        Args:
            num_images: How many; one of each class by default.
            num_steps: Steps of the sampler, each one evaluation of the network
                (two with `Heun`).
            sampler: One of `keras_mscm.samplers`, `ADDIM()` by default, or any
                function of `(denoise, noise, schedule, num_steps, seed)`.
            schedule: Time to log-SNR for the sampler's steps, such as
                `KarrasSchedule()`; by default what the model was trained with.
            guidance_scale: Scale of classifier-free guidance, at least 0: 1 is
                none, 0 is without conditioning (the paper's is less by 1). For
                a model trained with `label_dropout`. One batched call of twice
                the size evaluates both predictions.
            labels: Classes, `(num_images,)`; 0, 1, ... in turn by default.
            context: Sequence conditioning, `(num_images, length,
                context_width)`; none by default.
            context_mask: Which of it counts, `(num_images, length)`; all by
                default.
            noise: Standard normal noise to begin from, `(num_images, height,
                width, channels)`.
            seed: Seed of that noise, where it isn't given, and of what a
                stochastic sampler adds: an integer in 0..2**31 - 3. The same
                seed gives an image of the same number the same noise, on every
                backend, whatever the batch size. None draws one.
            batch_size: Images per call of the compiled sampler, 128 at most by
                default. Each batch size is compiled once.

        Returns:
            NumPy array, `(num_images, height, width, channels)`, clipped to
            [-1, 1].

        Raises:
            ValueError: If an argument is out of its range, or they disagree.
        """
        return self._draw(
            self._request(
                num_images=num_images,
                num_steps=num_steps,
                sampler=sampler,
                schedule=schedule,
                guidance_scale=guidance_scale,
                labels=labels,
                context=context,
                context_mask=context_mask,
                noise=noise,
                seed=seed,
                batch_size=batch_size,
            )
        )

    def _request(self, **arguments: Any) -> Request:
        if arguments["sampler"] is None:
            arguments["sampler"] = samplers.ADDIM()
        return super()._request(**arguments)

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
        x, watches = self._watched("x", x, y, nonnegative=nonnegative)
        levels = variance.level_logsnr()

        def squared_error(images, epsilon, conditioning, logsnr):
            images, epsilon, conditioning = backend.divided(
                (images, epsilon, conditioning)
            )
            logsnr = ops.broadcast_to(logsnr, ops.shape(images)[:1])
            z = F.add_noise(images, epsilon, logsnr)
            x = self.denoise(self.ema_network, z, logsnr, conditioning)
            return ops.sum(ops.mean(ops.square(x - images), axis=(1, 2, 3)))

        compiled = backend.compile_inference(
            squared_error, self.ema_network.variables
        )
        total, count = np.zeros(variance.LEVELS), 0
        with contextlib.ExitStack() as stack:
            for watch in watches:
                stack.enter_context(watch.reporting())
            for images, conditioning in _as_batches(x, y, batch_size):
                for i, level in enumerate(levels):
                    epsilon = keras.random.normal(
                        images.shape, dtype="float32", seed=seeds
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


def _as_batches(
    x: Any, y: Any, batch_size: int
) -> Iterator[tuple[np.ndarray, dict]]:
    """Images and conditioning, from arrays or from a stream of batches."""
    batches: Iterable = x
    if hasattr(x, "shape"):
        batches = (
            (
                x[i : i + batch_size],
                {
                    name: value[i : i + batch_size]
                    for name, value in data_checks.as_conditioning(y).items()
                },
            )
            for i in range(0, len(x), batch_size)
        )
    elif isinstance(x, keras.utils.PyDataset):
        batches = (x[i] for i in range(x.num_batches))
    for batch in batches:
        batch = tuple(batch) if isinstance(batch, (list, tuple)) else (batch,)
        images, given = (*batch, None)[:2]
        yield (
            ops.convert_to_numpy(images).astype("float32"),
            {
                name: ops.convert_to_numpy(value).astype(
                    CONDITIONING_DTYPES[name]
                )
                for name, value in data_checks.as_conditioning(given).items()
            },
        )
