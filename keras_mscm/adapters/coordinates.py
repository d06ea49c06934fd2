"""What foreign networks take for `z` and log-SNR, and what they say."""

from typing import Any

from keras import ops

from keras_mscm.functional import parameterizations as P
from keras_mscm.functional.process import Tensor

PROCESSES = (
    "variance_preserving",
    "rectified_flow",
    "variance_exploding",
    "edm",
)
TIMES = (
    "logsnr",
    "sigma",
    "noise_variance",
    "flow_time",
    "edm",
    "discrete_step",
)
OUTPUTS = ("v", "x", "epsilon", "flow", "edm")


def noisy_input(
    process: str, z: Tensor, logsnr: Tensor, sigma_data: float
) -> Tensor:
    """Our `z` in the coordinates of one of `PROCESSES`."""
    if process == "rectified_flow":
        return P.flow_input(z, logsnr)
    if process == "variance_exploding":
        return P.exploding_input(z, logsnr)
    if process == "edm":
        return P.edm_input(z, logsnr, sigma_data)
    return z


def time_input(time: str, logsnr: Tensor, alphas_cumprod: Any) -> Tensor:
    """A log-SNR as one of `TIMES`, `(batch,)`."""
    if time == "discrete_step":
        return P.discrete_step(logsnr, P.logsnr_table(alphas_cumprod))
    functions = {
        "logsnr": lambda logsnr: logsnr,
        "sigma": P.noise_to_signal,
        "noise_variance": lambda logsnr: ops.sigmoid(-logsnr),
        "flow_time": P.flow_time,
        "edm": P.edm_time,
    }
    return functions[time](logsnr)


def prediction(
    output_type: str,
    output: Tensor,
    z: Tensor,
    logsnr: Tensor,
    sigma_data: float,
) -> Tensor:
    """One of `OUTPUTS` as `v`; `x` and `epsilon` as they are."""
    if output_type == "flow":
        return P.v_from_flow(output, z, logsnr)
    if output_type == "edm":
        return P.v_from_edm(output, z, logsnr, sigma_data)
    return output
