"""Piecewise rectified flow, PeRFlow (Yan et al., 2024)."""

import itertools
from typing import Any

import keras
from keras import ops

from keras_mscm import checks, losses, weightings
from keras_mscm import functional as F
from keras_mscm.conditioning import Conditioning
from keras_mscm.functional.process import Tensor
from keras_mscm.models import distillation
from keras_mscm.models.base import DenoisingModel, Example


@keras.saving.register_keras_serializable(package="keras_mscm")
class PeRFlowModel(DenoisingModel):
    """For a student whose path is straight: reflow, a segment at a time.

    Time is cut into `student_steps` segments. The teacher solves a whole
    segment from a noised image, and the student learns, all along the straight
    line between the two ends, where it leads. Nothing is learnt from the
    student itself, which makes it steady, and an update dear: `solver_steps`
    evaluations of the teacher besides the student's one.

    Args:
        network: Network, as in `DenoisingModel`. Usually made by
            `from_teacher`.
        schedule: Noise schedule, as in `DenoisingModel`.
        student_steps: Segments, and evaluations that `generate` takes (K), at
            least 1; 1 is reflow.
        solver_steps: DDIM steps in which the teacher solves a segment, of equal
            length in the schedule's time; 1 to 64.
        guidance_scale: Scale of the teacher's classifier-free guidance, at
            least 0; 1 is none.
        **kwargs: As in `DenoisingModel`.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    >>> from keras_mscm import DiffusionModel, UViT
    >>> network = UViT(image_shape=(8, 8, 1), widths=[64], depths=[1],
    ...                attention=True)
    >>> teacher = DiffusionModel(network)  # trained, in earnest
    >>> student = PeRFlowModel.from_teacher(teacher, student_steps=4)
    >>> student.compile(optimizer=keras.optimizers.Adam(1e-4))
    >>> _ = student.fit(ops.zeros((64, 8, 8, 1)), verbose=0)
    >>> student.generate(4, num_steps=4).shape
    (4, 8, 8, 1)

    Reference:
        Yan et al., PeRFlow: Piecewise Rectified Flow as Universal
        Plug-and-Play Accelerator (2024), algorithm 1.
    """

    default_weighting = staticmethod(weightings.snr_plus_one)
    needs_teacher = True
    takes_times = False
    from_teacher = classmethod(distillation.from_teacher)
    attach_teacher = distillation.attach_teacher

    def __init__(
        self,
        network: keras.Layer,
        schedule: Any = None,
        *,
        student_steps: int = 4,
        solver_steps: int = 8,
        guidance_scale: float = 1.0,
        **kwargs: Any,
    ):
        student_steps = checks.check_positive_integer(
            "student_steps", student_steps, 2**20
        )
        solver_steps = checks.check_positive_integer(
            "solver_steps", solver_steps, 64
        )
        scale = distillation.check_guidance_scale(guidance_scale)
        super().__init__(network, schedule, **kwargs)
        self.student_steps, self.solver_steps = student_steps, solver_steps
        self.guidance_scale = scale
        self.teacher = distillation.own_base(self)

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

        # A segment, which the teacher solves from its beginning.
        k, n, scale = self.student_steps, self.solver_steps, self.guidance_scale
        segment = ops.floor(self.draw_uniform(batch) * k)
        levels = [
            self.schedule((segment + i / n) / k) for i in range(n, -1, -1)
        ]
        begin, end = levels[0], levels[-1]
        z = z_begin = F.add_noise(x, epsilon, begin)
        for logsnr_a, logsnr_b in itertools.pairwise(levels):
            said, _ = self.teacher.teach(z, logsnr_a, conditioning, scale)
            z = F.ddim(said, z, logsnr_a, logsnr_b)

        # The straight line between both ends is what DDIM takes with one x,
        # in which the student is asked anywhere.
        target = F.inverse_ddim(z, z_begin, begin, end)
        t = (segment + 1 - self.draw_uniform(batch)) / k
        logsnr_t = self.schedule(t)
        z_t = F.ddim(target, z_begin, begin, logsnr_t)
        inputs = {"z": z_t, "logsnr": logsnr_t, **conditioning}
        return inputs, target, self.weighting(logsnr_t)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "student_steps": self.student_steps,
            "solver_steps": self.solver_steps,
            "guidance_scale": self.guidance_scale,
        }
