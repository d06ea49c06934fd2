"""What the few-step models share: the teacher's step, and how they sample."""

from typing import Any, Self

import keras
import numpy as np
from keras import ops

from keras_mscm import checks, samplers
from keras_mscm.functional.process import Tensor
from keras_mscm.models.denoiser import Conditioning
from keras_mscm.models.sampling import Request
from keras_mscm.models.teacher import TaughtModel

DEFAULT_ETA = 0.75


class StudentModel(TaughtModel):
    """A model that takes few steps where its teacher takes many.

    Args:
        network: Network, as in `DenoisingModel`. Usually made by
            `from_teacher`.
        schedule: Noise schedule, as in `DenoisingModel`.
        student_steps: Evaluations that `generate` takes (K), at least 1.
        integrator: The teacher's step: a deterministic sampler (`ADDIM()`,
            the default, `DDIM()`, `Heun()`), or a function of `(x, z_t,
            logsnr_t, logsnr_s, x_var, denoise)` that returns the `x` with
            which DDIM takes the step (as `samplers.DDIM.step_x`; where a step
            gives `z_s`, `inverse_ddim` converts it).
        eta: Share of the teacher's squared error that aDDIM takes for the
            posterior variance, in [0, 1]; 0 makes it DDIM (appendix A.1:
            xvar_frac 0.75). The error is the conditional prediction's, also
            under guidance.
        x_var: Function of log-SNR that gives the posterior variance instead,
            such as `functional.analytic_x_var` or a model's `x_var`. `ADDIM(
            x_var=...)` as the integrator says the same.
        **kwargs: As in `TaughtModel`.

    Raises:
        ValueError: If an argument is out of its range, or has no effect beside
            the others.
    """

    def __init__(
        self,
        network: keras.Layer,
        schedule: Any = None,
        *,
        student_steps: int,
        integrator: Any = None,
        eta: float = DEFAULT_ETA,
        x_var: samplers.Variance | None = None,
        **kwargs: Any,
    ):
        student_steps = checks.check_positive_integer(
            "student_steps", student_steps, 2**20
        )
        eta = checks.check_number("eta", eta, 0, "in [0, 1]", high=1)
        integrator = samplers.ADDIM() if integrator is None else integrator
        checks.check_function(
            "integrator",
            integrator,
            "a function or a deterministic sampler, such as `samplers.ADDIM()`",
        )
        if isinstance(integrator, samplers.Sampler) and integrator.stochastic:
            raise ValueError(
                "`integrator` must be deterministic: a student learns where "
                "one z_t leads, and noise in the teacher's step leads it to "
                "many places, of which it would learn the blurred mean. "
                f"Received: integrator={integrator}"
            )
        if x_var is not None:
            checks.check_function("x_var", x_var, "a function of log-SNR")
        self._check_variances(integrator, eta, x_var)
        super().__init__(network, schedule, **kwargs)
        self.student_steps, self.integrator = student_steps, integrator
        self.eta, self.x_var = eta, x_var

    @staticmethod
    def _check_variances(integrator: Any, eta: Any, x_var: Any) -> None:
        """Raises if something that says the posterior variance is not heard."""
        given = {
            "eta": None if eta == DEFAULT_ETA else eta,
            "x_var": x_var,
            "integrator": _own_variance(integrator),
        }
        given = {k: value for k, value in given.items() if value is not None}
        came = ", ".join(f"{k}={checks.describe(given[k])}" for k in given)
        if given and type(integrator) in (samplers.DDIM, samplers.Heun):
            raise ValueError(
                f"`{'` and `'.join(given)}` must not be given: {integrator} "
                "takes no posterior variance, as `samplers.ADDIM()` does. "
                f"Received: {came}"
            )
        if len(given) > 1:
            raise ValueError(
                f"`{'` and `'.join(given)}` must not be given together, as "
                "each says what the posterior variance is. Received: "
                f"{came}"
            )

    def teacher_step(
        self,
        x: Tensor,
        z_t: Tensor,
        logsnr_t: Tensor,
        logsnr_s: Tensor,
        conditioning: Conditioning,
    ) -> Tensor:
        """The `x` with which DDIM takes the teacher's step from t to s.

        Args:
            x: The images that `z_t` was made of, `(batch, ...)`.
            z_t: Noisy images at t, of the same shape.
            logsnr_t: Log-SNR at t, `(batch,)`.
            logsnr_s: Log-SNR at s, `(batch,)`.
            conditioning: What the network takes besides.

        Returns:
            Images, `(batch, ...)`.
        """
        predictions = self.teach(z_t, logsnr_t, conditioning)
        return self.integrate(
            *predictions, x, z_t, logsnr_t, logsnr_s, conditioning
        )

    def integrate(
        self,
        x_teacher: Tensor,
        x_conditional: Tensor,
        x: Tensor,
        z_t: Tensor,
        logsnr_t: Tensor,
        logsnr_s: Tensor,
        conditioning: Conditioning,
    ) -> Tensor:
        """`teacher_step`, given the teacher's predictions at t."""
        variance = self.x_var or _own_variance(self.integrator)
        if variance is not None:
            x_var = variance(logsnr_t)
        else:
            square = ops.square(x_conditional - x)
            x_var = self.eta * ops.mean(square, axis=(1, 2, 3))

        def denoise(z, logsnr):
            return self.teach(z, logsnr, conditioning)[0]

        integrate = getattr(self.integrator, "step_x", self.integrator)
        return integrate(x_teacher, z_t, logsnr_t, logsnr_s, x_var, denoise)

    def trained_steps(self) -> int:
        """Number of steps that the model is trained for at present."""
        return self.student_steps

    def generate(
        self,
        num_images: int | None = None,
        *,
        num_steps: int | None = None,
        labels: Any = None,
        context: Any = None,
        context_mask: Any = None,
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
            context: Sequence conditioning, `(num_images, length,
                context_width)`; none by default.
            context_mask: Which of it counts, `(num_images, length)`; all by
                default.
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
        return self._draw(
            self._request(
                num_images=num_images,
                num_steps=num_steps,
                labels=labels,
                context=context,
                context_mask=context_mask,
                noise=noise,
                seed=seed,
                batch_size=batch_size,
            )
        )

    def _request(self, **arguments: Any) -> Request:
        trained = self.trained_steps()
        num_steps = arguments["num_steps"]
        num_steps = checks.check_positive_integer(
            "num_steps", trained if num_steps is None else num_steps
        )
        if num_steps != trained:
            raise ValueError(
                "`num_steps` must be the number that the student was trained "
                f"for, student_steps={trained}. Received: "
                f"num_steps={num_steps}"
            )
        arguments |= {"num_steps": num_steps, "sampler": samplers.DDIM()}
        return super()._request(**arguments)

    def get_config(self) -> dict[str, Any]:
        serialize = keras.saving.serialize_keras_object
        return {
            **super().get_config(),
            "student_steps": self.student_steps,
            "integrator": serialize(self.integrator),
            "eta": self.eta,
            "x_var": serialize(self.x_var),
        }

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: Any = None
    ) -> Self:
        """The inverse of `get_config`, also of version 0.1's."""
        # In that, `eta` and `x_var` had no effect beside some integrators.
        kind = (config.get("integrator") or {}).get("class_name")
        if kind in ("DDIM", "Heun"):
            config = {**config, "eta": DEFAULT_ETA, "x_var": None}
        elif config.get("x_var") is not None:
            config = {**config, "eta": DEFAULT_ETA}
        return super().from_config(config, custom_objects)


def _own_variance(integrator: Any) -> samplers.Variance | None:
    """The posterior variance that an aDDIM was made with; None by default."""
    if not isinstance(integrator, samplers.ADDIM):
        return None
    default = samplers.ADDIM().x_var
    return None if integrator.x_var is default else integrator.x_var
