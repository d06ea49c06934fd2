"""Heun's method, an integrator of second order."""

import numpy as np

from keras_mscm import samplers
from tests.samplers.problems import (
    SCHEDULES,
    errors,
    every_grid,
)


@every_grid
def test_heun_is_of_second_order(grid):
    error = errors(samplers.Heun(), grid, (16, 32, 64, 128, 256))
    ratios = error[:-1] / error[1:]
    # On the cosine grids the error falls by 8 before it falls by 4: the first
    # step carries it (see below), and is multiplied by 1 / N.
    assert np.all((ratios > 3.8) & (ratios < (4.5 if grid == "karras" else 9)))
    assert error[-1] < 3e-4


def test_heun_wants_the_grid_of_karras():
    # Appendix A.4. Heun's step changes x by tau_t / (2 tau_s) (x_s - x_t), and
    # the cosine grid's first step is a long one in tau = sigma / alpha: from
    # 1808 to 2 N / pi. With as many evaluations DDIM is better there.
    for evaluations in (16, 32):
        heun, ddim = (
            {grid: errors(sampler, grid, [steps])[0] for grid in SCHEDULES}
            for sampler, steps in (
                (samplers.Heun(), evaluations // 2),
                (samplers.DDIM(), evaluations),
            )
        )
        assert heun["cosine"] > 5 * ddim["cosine"]
        assert heun["cosine"] > 5 * heun["karras"]
    assert heun["karras"] < ddim["karras"]
    assert errors(samplers.Heun(), "cosine", [4]) > 10
