"""DDIM, an integrator of first order."""

import numpy as np
import pytest
from keras import ops

from keras_mscm import samplers
from tests.samplers.problems import (
    NOISE,
    errors,
    every_grid,
    rates,
    sample_eagerly,
)


@every_grid
def test_ddim_is_of_first_order(grid):
    error = errors(samplers.DDIM(), grid, (32, 64, 128, 256))
    ratios = error[:-1] / error[1:]
    assert np.all((ratios > 1.9) & (ratios < 2.1))
    assert error[-1] < 0.02


@pytest.mark.parametrize("num_steps", [1, 2, 9])
def test_ddim_with_a_prediction_that_stays_ends_there(num_steps):
    x = ops.full(NOISE.shape, 0.7)
    got = sample_eagerly(samplers.DDIM(), num_steps, lambda z, logsnr: x)
    # alpha_0 x, and of the noise as much as sigma_0 = 5.5e-4.
    alpha_0, sigma_0 = rates(15.0)
    expected = alpha_0 * 0.7 + sigma_0 * (NOISE - sigma_0 * 0.7)
    np.testing.assert_allclose(got, expected, atol=2e-6)
