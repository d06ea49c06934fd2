"""The noise levels of the schedulers of Hugging Face's diffusers."""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_mscm import checks
from keras_mscm.schedules import (
    DiscreteSchedule,
    NoiseSchedule,
    RectifiedFlowSchedule,
)

OUTPUTS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x"}
# Log-SNR of no signal and of no noise, where a float32 can't tell any more.
_BOUND = 30.0


def scheduler_grid(
    scheduler: Any, num_steps: int | None = None, *, shift: float | None = None
) -> NoiseSchedule:
    """The noise levels at which a scheduler of diffusers takes its steps.

    Args:
        scheduler: As for `from_diffusers`.
        num_steps: Number of steps, for which it is exact. None for a schedule
            of any number: of all levels of the scheduler's table, which is
            exact for trailing spacing; or of flow time as it is shifted.
        shift: As for `from_diffusers`.

    Returns:
        Schedule whose values at k / num_steps are the levels' log-SNR.

    Raises:
        ValueError: If an argument isn't as above or is lacking.

    Example:

    ```python
    model.generate(
        num_steps=20, schedule=scheduler_grid(pipe.scheduler, 20)
    )
    ```
    """
    check_scheduler(scheduler)
    if num_steps is not None:
        num_steps = checks.check_positive_integer("num_steps", num_steps)
    if _is_flow(scheduler):
        _check_shift(scheduler, shift)
        if num_steps is None:
            return RectifiedFlowSchedule(shift=_flow_shift(scheduler, shift))
        logsnr = _flow_levels(scheduler, num_steps, shift)
    elif shift is not None:
        raise checks.invalid(
            "shift", "None for a scheduler without flow matching", shift
        )
    else:
        logsnr = _table_levels(scheduler, num_steps)
    logsnr = np.clip(np.asarray(logsnr, "float64"), -_BOUND, _BOUND)
    if logsnr[0] - logsnr[1] < 1e-4:
        # Where the last step leads nowhere (`set_alpha_to_one=False`).
        logsnr[0] = logsnr[1] + 1e-4
    return DiscreteSchedule(1 / (1 + np.exp(-logsnr)))


def _check_shift(scheduler: Any, shift: Any) -> None:
    """Raises unless a shift is given where it depends on the images' size."""
    if not scheduler.config.get("use_dynamic_shifting"):
        if shift is not None:
            raise checks.invalid(
                "shift",
                "None for a scheduler without use_dynamic_shifting",
                shift,
            )
    elif shift is None:
        raise checks.invalid(
            "shift",
            "exp(mu) of the images' size, because the scheduler has "
            "use_dynamic_shifting=True",
            shift,
        )
    else:
        checks.check_positive_number("shift", shift)


def _flow_shift(scheduler: Any, shift: float | None) -> float:
    if shift is None:
        shift = getattr(scheduler, "shift", None)
    return scheduler.config.get("flow_shift", 1.0) if shift is None else shift


def _flow_levels(
    scheduler: Any, num_steps: int, shift: float | None
) -> np.ndarray:
    """Log-SNR from no noise to no signal, for a scheduler of flow matching."""
    scheduler = copy.deepcopy(scheduler)
    mu = {} if shift is None else {"mu": float(np.log(shift))}
    scheduler.set_timesteps(num_steps, **mu)
    times = np.asarray(scheduler.sigmas.cpu(), "float64")[::-1]
    with np.errstate(divide="ignore"):
        return 2 * (np.log1p(-times) - np.log(times))


def _table_levels(scheduler: Any, num_steps: int | None) -> np.ndarray:
    """Log-SNR from the last level to the first, for a table of them."""
    table = np.asarray(scheduler.alphas_cumprod.cpu(), "float64")
    final = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    with np.errstate(divide="ignore"):
        if num_steps is not None:
            scheduler = copy.deepcopy(scheduler)
            scheduler.set_timesteps(num_steps)
            if getattr(scheduler, "init_noise_sigma", 1.0) != 1.0:
                # These count in noise-to-signal ratios.
                sigmas = np.asarray(scheduler.sigmas.cpu(), "float64")
                return -2 * np.log(sigmas[::-1])
            places = np.asarray(scheduler.timesteps.cpu(), int)[::-1]
            table = table[places]
        levels = np.log(table) - np.log1p(-table)
        last = np.log(final) - np.log1p(-final)
    return np.concatenate([[last], levels])


def _is_flow(scheduler: Any) -> bool:
    config = scheduler.config
    if config.get("use_flow_sigmas"):
        return True
    return "FlowMatch" in type(scheduler).__name__


def check_scheduler(scheduler: Any) -> None:
    """Raises unless the process of a scheduler is known.

    Args:
        scheduler: What came.
    """
    allowed = (
        "a scheduler of diffusers with alphas_cumprod, such as DDIMScheduler "
        "or EulerDiscreteScheduler, or FlowMatchEulerDiscreteScheduler; for "
        "another process put DiffusersModule(network) into an AdaptedNetwork, "
        "which is told what it predicts"
    )
    config = getattr(scheduler, "config", None)
    if not isinstance(config, Mapping):
        raise checks.invalid("scheduler", allowed, scheduler)
    flow = _is_flow(scheduler)
    if config.get("invert_sigmas") or not (
        flow or hasattr(scheduler, "alphas_cumprod")
    ):
        raise checks.invalid("scheduler", allowed, scheduler)
    kind = config.get("prediction_type", "epsilon")
    if not flow and kind not in OUTPUTS:
        raise ValueError(
            "`scheduler` must have a prediction_type of "
            f"{[*OUTPUTS]}. Received: {kind!r}"
        )


def coordinates(scheduler: Any) -> dict[str, Any]:
    """What an `AdaptedNetwork` is to know of the scheduler."""
    config = scheduler.config
    if _is_flow(scheduler):
        return {
            "process": "rectified_flow",
            "time": "flow_time",
            "output": "flow",
            "time_scale": float(config["num_train_timesteps"]),
        }
    kind = config.get("prediction_type", "epsilon")
    if config.get("timestep_type") == "continuous" and kind == "v_prediction":
        return {"time": "edm", "output": "v"}
    table = np.asarray(scheduler.alphas_cumprod.cpu(), "float64")
    return {
        "time": "discrete_step",
        "output": OUTPUTS[kind],
        "alphas_cumprod": table,
    }
