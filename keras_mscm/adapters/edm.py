"""Networks with the preconditioning of EDM (Karras et al., 2022)."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_mscm import checks, spaces
from keras_mscm.adapters.network import AdaptedNetwork
from keras_mscm.conditioning import Condition, check_declared
from keras_mscm.models import DiffusionModel
from keras_mscm.schedules import DiscreteSchedule, KarrasSchedule


def from_edm(
    network: keras.Layer,
    image_shape: Sequence[int],
    *,
    sigma_data: float = 0.5,
    names: Mapping[str, str] | Sequence[str] | None = None,
    conditioning: Mapping[str, Condition] | None = None,
    time_embedding: str | None = None,
    **kwargs: Any,
) -> DiffusionModel:
    """A diffusion model around an EDM-preconditioned network.

    You want it for a network `F` that was trained within `D = c_skip z + c_out
    F(c_in z, c_noise)`: EDM's, EDM2's, and those of consistency models.

    Args:
        network: `F`, a Keras layer of `c_in z` and `c_noise`, `(batch,)`.
        image_shape: Shape of one example.
        sigma_data: The data's deviation in training.
        names: As for `AdaptedNetwork`; by default a list of `z`, the time, and
            the conditioning in its order.
        conditioning: As for `AdaptedNetwork`.
        time_embedding: For a student of several numbers of steps: the name of
            the layer that embeds time, as for `AdaptedNetwork`.
        **kwargs: As for `DiffusionModel`; the schedule is by default
            `KarrasSchedule()`, and the space `Pixels` for 1 or 3 channels.

    Returns:
        The model. Its network is the very one that was given.

    Raises:
        ValueError: If an argument isn't as above.
    """
    declared = check_declared(
        "conditioning", {} if conditioning is None else conditioning
    )
    adapted = AdaptedNetwork(
        network,
        image_shape,
        process="edm",
        time="edm",
        output="edm",
        sigma_data=sigma_data,
        names=["z", "logsnr", *declared] if names is None else names,
        conditioning=declared,
        time_embedding=time_embedding,
    )
    shape = adapted.image_shape
    pixels = len(shape) == 3 and shape[-1] in (1, 3)
    nulls = [c.can_be_absent for c in adapted.conditioning.values()]
    kwargs = {
        "ema": None,
        "guidable": bool(nulls) and all(nulls),
        "schedule": KarrasSchedule(),
        "space": spaces.Pixels(shape) if pixels else spaces.Box(shape),
        **kwargs,
    }
    return DiffusionModel(adapted, **kwargs)


def edm_grid(
    num_steps: int,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> DiscreteSchedule:
    """The noise levels of EDM's sampler: eq. 5, then none.

    Args:
        num_steps: Number of steps, at least 2, for which alone it is made.
        sigma_min: As for `KarrasSchedule`.
        sigma_max: As for `KarrasSchedule`.
        rho: As for `KarrasSchedule`.

    Returns:
        The schedule, for `generate(num_steps=..., schedule=...)`.

    Raises:
        ValueError: If an argument isn't as above.
    """
    n = checks.check_integer("num_steps", num_steps, 2)
    made = KarrasSchedule(sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
    low, high = (
        sigma ** (1 / made.rho) for sigma in (made.sigma_min, made.sigma_max)
    )
    sigma = np.linspace(low, high, n) ** made.rho
    return DiscreteSchedule([1.0, *(1 / (1 + sigma**2))])
