"""Learning from a diffusion model: the teacher within a model."""

from typing import Any, Self

import keras

from keras_mscm import checks
from keras_mscm.functional.process import Tensor
from keras_mscm.models.base import DenoisingModel
from keras_mscm.models.denoiser import Conditioning
from keras_mscm.models.diffusion import DiffusionModel
from keras_mscm.models.moving_average import clone_network


class FrozenNetwork(keras.layers.Layer):
    """Holds another model's network: no gradients, and nothing in the file.

    Its variables are part of the model's state, so that a compiled step takes
    them as inputs, not as constants. They are not trained, and not saved
    unless `saved` is set: Keras finds what to save by `dir()`, and there the
    network is missing.
    """

    saved = False

    def __init__(self, **kwargs: Any):
        super().__init__(trainable=False, **kwargs)
        self.network: Any = None
        self.built = True

    def hold(self, network: keras.Layer) -> None:
        """Takes a network, instead of the one before."""
        if self.network is not None:
            self._tracker.untrack(self.network)
        network.trainable = False
        self.network = network

    def __dir__(self) -> list[str]:
        hidden = () if self.saved else ("network",)
        return [name for name in super().__dir__() if name not in hidden]


class TaughtModel(DenoisingModel):
    """A model that learns from a diffusion model's predictions.

    Args:
        network: Network, as in `DenoisingModel`. Usually made by
            `from_teacher`.
        schedule: Noise schedule, as in `DenoisingModel`.
        guidance_scale: Scale of the teacher's classifier-free guidance, at
            least 0: 1 is none (the paper's is less by 1). Both of its
            predictions come from one batched call.
        **kwargs: As in `DenoisingModel`.
    """

    def __init__(
        self,
        network: keras.Layer,
        schedule: Any = None,
        *,
        guidance_scale: float = 1.0,
        **kwargs: Any,
    ):
        guidance_scale = checks.check_number(
            "guidance_scale", guidance_scale, 0, "a number of at least 0"
        )
        super().__init__(network, schedule, **kwargs)
        self.guidance_scale = guidance_scale
        self.needs_teacher = True
        self.teacher = FrozenNetwork(name="teacher")

    @classmethod
    def from_teacher(cls, teacher: DiffusionModel, **kwargs: Any) -> Self:
        """A model that begins with a diffusion model's averaged weights.

        Args:
            teacher: Diffusion model. Its network is copied: neither is changed
                by what happens to the other.
            **kwargs: As for the constructor.

        Returns:
            The model, with the teacher attached if it learns from it.
        """
        _check_teacher(teacher)
        student = cls(
            clone_network(
                teacher.network, teacher.network.name, teacher.ema_network
            ),
            teacher.schedule,
            prediction_type=teacher.prediction_type,
            image_shape=teacher.image_shape,
            num_classes=teacher.num_classes,
            context_width=teacher.context_width,
            **kwargs,
        )
        if student.needs_teacher:
            student.attach_teacher(teacher)
        return student

    def attach_teacher(self, teacher: DiffusionModel) -> None:
        """Gives a model its teacher, as after loading: files hold none.

        Args:
            teacher: Diffusion model of the same images, conditioning and
                prediction type. Its averaged network is copied.

        Raises:
            ValueError: If the two don't fit.
        """
        _check_teacher(teacher)
        fits = "image_shape", "num_classes", "context_width", "prediction_type"
        for name in fits:
            theirs, ours = getattr(teacher, name, None), getattr(self, name)
            if theirs != ours:
                raise ValueError(
                    f"`teacher` must have the student's {name}, {ours}. "
                    f"Received: {theirs}"
                )
        if self.guidance_scale != 1:
            teacher.check_guidable("guidance_scale", self.guidance_scale)
        self.teacher.hold(clone_network(teacher.ema_network, "teacher_network"))
        self.train_function = self.test_function = None

    def teach(
        self, z: Tensor, logsnr: Tensor, conditioning: Conditioning
    ) -> tuple[Tensor, Tensor]:
        """The teacher's prediction of `x`, guided, and the conditional one."""
        network = self.teacher.network
        if self.guidance_scale == 1:
            x = self.denoise(network, z, logsnr, conditioning)
            return x, x
        return self.denoise_guided(
            network, z, logsnr, conditioning, self.guidance_scale
        )

    def _check_ready(self) -> None:
        super()._check_ready()
        if self.needs_teacher and self.teacher.network is None:
            raise ValueError(
                "`teacher` must be attached before a student with "
                "method='distillation' is trained or evaluated; a file holds "
                "none. Call `student.attach_teacher(teacher)`. Received: None"
            )

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "guidance_scale": self.guidance_scale}


def _check_teacher(teacher: Any) -> None:
    # A student predicts where a segment ends, and not the mean of the images
    # that a noisy one may have come from, which is what a teacher is asked for.
    if not isinstance(teacher, DiffusionModel):
        raise checks.invalid("teacher", "a DiffusionModel", teacher)
