"""Guidance distillation (Meng et al., 2022), the paper's baseline."""

from typing import Any

import keras

from keras_mscm.models import distillation
from keras_mscm.models.diffusion import DiffusionModel


@keras.saving.register_keras_serializable(package="keras_mscm")
class GuidanceDistillationModel(DiffusionModel):
    """A diffusion model of a guided teacher: one evaluation instead of two.

    Learns the teacher's guided prediction at every time, for one scale. It
    samples as any diffusion model, and can be a student's teacher itself. The
    paper's "guidance distilled" rows in table 6.

    Args:
        network: Network, as in `DenoisingModel`. Usually made by
            `from_teacher`.
        schedule: Noise schedule, as in `DenoisingModel`.
        guidance_scale: Scale of the teacher's guidance, at least 0; 1 is none.
        **kwargs: As in `DenoisingModel`.

    Example:

    >>> from keras_mscm import UViT
    >>> network = UViT(image_shape=(8, 8, 1), widths=[64], depths=[1],
    ...                attention=True, num_classes=10)
    >>> teacher = DiffusionModel(network, label_dropout=0.1)  # and trained
    >>> model = GuidanceDistillationModel.from_teacher(
    ...     teacher, guidance_scale=1.5
    ... )
    >>> model.compile(optimizer=keras.optimizers.Adam(1e-4))
    >>> model.generate(4, num_steps=2).shape
    (4, 8, 8, 1)

    Reference:
        Meng et al., 2022, stage one.
    """

    needs_teacher = True
    from_teacher = classmethod(distillation.from_teacher)
    attach_teacher = distillation.attach_teacher

    def __init__(
        self,
        network: keras.Layer,
        schedule: Any = None,
        *,
        guidance_scale: float = 1.0,
        **kwargs: Any,
    ):
        scale = distillation.check_guidance_scale(guidance_scale)
        super().__init__(network, schedule, **kwargs)
        self.guidance_scale = scale
        self.teacher = distillation.own_base(self)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "guidance_scale": self.guidance_scale}
