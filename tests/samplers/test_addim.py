"""aDDIM, beside DDIM."""

import numpy as np

from keras_mscm import samplers
from tests.samplers.problems import (
    every_grid,
    flow_end,
    sample,
)


@every_grid
def test_addim_tends_to_ddim_and_to_the_flow(grid):
    # On the cosine grids by half for four times the steps, not by a quarter:
    # these data fill space, so epsilon_hat goes to 0 with sigma, and in the
    # last sqrt(N) steps what aDDIM adds is no longer small beside it. The grid
    # of Karras has smaller steps there.
    steps = (16, 64, 256)
    addim, ddim = (
        [sample(sampler, n, grid) for n in steps]
        for sampler in (samplers.ADDIM(), samplers.DDIM())
    )
    apart = np.array([np.abs(a - b).max() for a, b in zip(addim, ddim)])
    ratios = apart[:-1] / apart[1:]
    assert np.all((ratios > 1.7) & (ratios < 4))
    assert np.abs(addim[-1] - flow_end(grid)).max() < 0.04
