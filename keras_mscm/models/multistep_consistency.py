"""Multistep consistency models (the paper's algorithms 1 and 2)."""

from typing import Any, Self

import keras
import numpy as np
from keras import ops

from keras_mscm import backend, losses, samplers
from keras_mscm import functional as F
from keras_mscm.functional.process import Tensor
from keras_mscm.models import checks
from keras_mscm.models.base import DenoisingModel, Example, clone_network
from keras_mscm.models.diffusion import DiffusionModel
from keras_mscm.models.teacher import FrozenNetwork

METHODS = ("distillation", "training")


@keras.saving.register_keras_serializable(package="keras_mscm")
class MultistepConsistencyModel(DenoisingModel):
    """A model that samples in `student_steps` evaluations (section 3).

    Time is cut into `student_steps` segments. Within each the model learns, at
    every time `t` of it, to predict the one `x` with which DDIM jumps from
    `z_t` to the segment's end on the teacher's path: the number of steps
    interpolates between a consistency model (1) and diffusion (many).

    The teacher's path takes `teacher_steps` steps over the whole of time; with
    the callback `TeacherStepAnneal` that number grows during training.

    Args:
        network: Network, as in `DenoisingModel`. Usually made by
            `from_teacher`.
        schedule: Noise schedule, as in `DenoisingModel`.
        student_steps: Evaluations that `generate` takes (K), at least 1.
        method: `"distillation"` (CD) takes the teacher's steps with a
            diffusion model's predictions, `"training"` (CT) with the images
            themselves, so without a teacher.
        eta: Share of the teacher's squared error that aDDIM takes for the
            posterior variance, in [0, 1]; 0 makes it DDIM (appendix A.1:
            xvar_frac 0.75).
        teacher_steps: Teacher steps when nothing anneals them, at least
            `student_steps` (appendix A.1: 256 on text to image).
        **kwargs: As in `DenoisingModel`.

    Raises:
        ValueError: If an argument is out of its range.

    Example:

    >>> from keras_mscm import UViT
    >>> from keras_mscm.callbacks import TeacherStepAnneal
    >>> network = UViT(image_shape=(8, 8, 1), widths=[64], depths=[1],
    ...                attention=True)
    >>> teacher = DiffusionModel(network)  # trained, in earnest
    >>> student = MultistepConsistencyModel.from_teacher(
    ...     teacher, student_steps=8
    ... )
    >>> student.compile(optimizer=keras.optimizers.Adam(1e-4))
    >>> images = np.zeros((32, 8, 8, 1), "float32")
    >>> _ = student.fit(images, verbose=0, callbacks=[TeacherStepAnneal()])
    >>> student.generate(4, num_steps=8).shape
    (4, 8, 8, 1)

    Reference:
        Multistep Consistency Models, algorithms 1 and 2.
    """

    default_weighting = staticmethod(losses.sqrt_snr_plus_one)

    def __init__(
        self,
        network: keras.Layer,
        schedule: Any = None,
        *,
        student_steps: int,
        method: str = "distillation",
        eta: float = 0.75,
        teacher_steps: int = 256,
        **kwargs: Any,
    ):
        checks.check_positive_integer("student_steps", student_steps)
        checks.check_choice("method", method, METHODS)
        checks.check_number("eta", eta, 0, "in [0, 1]", high=1)
        self._check_teacher_steps(teacher_steps, student_steps)
        super().__init__(network, schedule, **kwargs)
        self.student_steps, self.method, self.eta = student_steps, method, eta
        self.constant_teacher_steps = teacher_steps
        self.teacher = FrozenNetwork(name="teacher")
        # (start, end, iterations) of N_teacher(i). Weights, and not numbers in
        # the compiled step, so that a callback can set them.
        self.annealing = self.add_weight(
            shape=(3,),
            dtype="float32",
            initializer="ones",
            trainable=False,
            name="annealing",
        )
        self.anneal_teacher_steps(teacher_steps, teacher_steps, 1)

    @classmethod
    def from_teacher(
        cls,
        teacher: DiffusionModel,
        student_steps: int,
        *,
        method: str = "distillation",
        **kwargs: Any,
    ) -> Self:
        """A student that begins with a diffusion model's averaged weights.

        Args:
            teacher: Diffusion model. Its network is copied: neither is changed
                by what happens to the other.
            student_steps: Evaluations that `generate` will take (K).
            method: `"distillation"` or `"training"`.
            **kwargs: As for the constructor.

        Returns:
            The student, with the teacher attached if it distils.
        """
        if not isinstance(teacher, DiffusionModel):
            raise ValueError(
                "`teacher` must be a DiffusionModel. Received: "
                f"{type(teacher).__name__}"
            )
        student = cls(
            clone_network(
                teacher.network, teacher.network.name, teacher.ema_network
            ),
            teacher.schedule,
            student_steps=student_steps,
            method=method,
            prediction_type=teacher.prediction_type,
            image_shape=teacher.image_shape,
            num_classes=teacher.num_classes,
            **kwargs,
        )
        if method == "distillation":
            student.attach_teacher(teacher)
        return student

    def attach_teacher(self, teacher: DiffusionModel) -> None:
        """Gives a student its teacher, as after loading: files hold none.

        Args:
            teacher: Diffusion model of the same images, classes and
                prediction type. Its averaged network is copied.

        Raises:
            ValueError: If the two don't fit.
        """
        for name in ("image_shape", "num_classes", "prediction_type"):
            theirs, ours = getattr(teacher, name, None), getattr(self, name)
            if theirs != ours:
                raise ValueError(
                    f"`teacher` must have the student's {name}, {ours}. "
                    f"Received: {theirs}"
                )
        self.teacher.hold(clone_network(teacher.ema_network, "teacher_network"))
        self.train_function = self.test_function = None

    def anneal_teacher_steps(
        self, start: float, end: float, iterations: int
    ) -> None:
        """Sets N_teacher(i), log-linear from `start` to `end` (A.1).

        Args:
            start: Teacher steps at iteration 0, at least `student_steps`.
            end: Teacher steps from `iterations` on, at least `student_steps`.
            iterations: Iterations in between, at least 1.

        Raises:
            ValueError: If an argument is out of its range.
        """
        self._check_teacher_steps(start, self.student_steps, "start")
        self._check_teacher_steps(end, self.student_steps, "end")
        checks.check_positive_integer("iterations", iterations)
        self.annealing.assign(np.asarray([start, end, iterations], "float32"))

    @staticmethod
    def _check_teacher_steps(value, student_steps, name="teacher_steps"):
        checks.check_number(
            name,
            value,
            student_steps,
            f"at least student_steps={student_steps}, one teacher step per "
            "student step",
        )

    def steps_per_segment(self) -> Tensor:
        """`round(N_teacher(i) / student_steps)` at the present iteration."""
        start, end, iterations = ops.unstack(self.annealing.value)
        steps = F.teacher_steps(self.iteration.value, start, end, iterations)
        return ops.maximum(ops.round(steps / self.student_steps), 1.0)

    def default_loss(self) -> keras.losses.Loss:
        return losses.PseudoHuber()

    def training_example(
        self, images: Tensor, labels: Tensor | None, training: bool
    ) -> Example:
        x, seed, batch = images, self.seed_generator, ops.shape(images)[:1]
        epsilon = keras.random.normal(ops.shape(x), seed=seed)

        # A teacher step t -> s in one of the segments, which ends at t_step.
        per_segment = self.steps_per_segment()
        step = ops.floor(
            keras.random.uniform(batch, 0, self.student_steps, seed=seed)
        )
        n_rel = 1 + ops.floor(
            keras.random.uniform(batch, seed=seed) * per_segment
        )
        times = F.segment_times(step, n_rel, self.student_steps, per_segment)
        logsnr_t, logsnr_s, logsnr_step = map(self.schedule, times)

        # The teacher's step, by aDDIM.
        z_t = F.add_noise(x, epsilon, logsnr_t)
        x_teacher = x
        if self.method == "distillation":
            x_teacher = self.denoise(
                self.teacher.network, z_t, logsnr_t, labels
            )
        x_var = self.eta * ops.mean(ops.square(x_teacher - x), axis=(1, 2, 3))
        x_step = F.addim_x(x_teacher, z_t, logsnr_t, logsnr_s, x_var)
        z_s = F.ddim(x_step, z_t, logsnr_t, logsnr_s)

        # What the model itself says at s, under the dropout of its pass at t.
        network = self.network if training else self.ema_network
        with backend.rewound(self._seed_states(network)):
            x_ref = self.denoise(network, z_s, logsnr_s, labels, training)

        target = F.consistency_target(
            x_step, x_ref, logsnr_t, logsnr_s, logsnr_step
        )
        inputs = {"z": z_t, "logsnr": logsnr_t}
        if labels is not None:
            inputs["labels"] = labels
        return inputs, target, self.weighting(logsnr_t)

    def generate(
        self,
        num_images: int | None = None,
        *,
        num_steps: int | None = None,
        labels: Any = None,
        noise: Any = None,
        seed: int | None = None,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Draws images in `student_steps` evaluations (algorithm 2).

        Args:
            num_images: How many; one of each class by default.
            num_steps: Evaluations of the network: `student_steps`, which is
                what it was trained for.
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
            ValueError: If `num_steps` is not `student_steps`, or an argument
                is out of its range, or they disagree.
        """
        if num_steps is None:
            num_steps = self.student_steps
        checks.check_positive_integer("num_steps", num_steps)
        if num_steps != self.student_steps:
            raise ValueError(
                "`num_steps` must be the number that the student was trained "
                f"for, student_steps={self.student_steps}. Received: "
                f"num_steps={num_steps}"
            )
        return self._generate(
            samplers.ddim,
            num_steps,
            num_images,
            labels,
            noise,
            seed,
            batch_size,
        )

    def _check_ready(self) -> None:
        super()._check_ready()
        if self.method == "distillation" and self.teacher.network is None:
            raise ValueError(
                "`teacher` must be attached before a student with "
                "method='distillation' is trained or evaluated; a file holds "
                "none. Call `student.attach_teacher(teacher)`. Received: None"
            )

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "student_steps": self.student_steps,
            "method": self.method,
            "eta": self.eta,
            "teacher_steps": self.constant_teacher_steps,
        }
