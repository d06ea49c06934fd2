import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import norm

from keras_mscm import DiffusionModel, MultistepConsistencyModel

SCRIPT = Path(__file__).parents[2] / "examples" / "two_modes.py"


@pytest.fixture(scope="module")
def two_modes():
    """The script as a module, with a teacher of 16 steps to be quick."""
    spec = importlib.util.spec_from_file_location("two_modes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.TEACHER_STEPS, module.TIMES = 16, np.linspace(1, 0, 17)
    return module


def marginal_cdf(z, logsnr, modes, std):
    """Distribution function of z_t, a mixture of normals at every time."""
    alpha = np.sqrt(expit(logsnr))
    scale = np.sqrt(alpha**2 * std**2 + expit(-logsnr))
    return norm.cdf(z, alpha * modes, scale).mean()


@pytest.mark.parametrize("logsnr", [-15.0, -3.0, 0.0, 2.0, 5.0, 15.0])
def test_posterior_mean_is_bayes_rule_by_quadrature(two_modes, logsnr):
    x = np.linspace(-1.5, 1.5, 60_001)
    alpha, sigma = np.sqrt(expit(logsnr)), np.sqrt(expit(-logsnr))
    prior = norm.pdf(x[:, None], two_modes.MODES, two_modes.STD).sum(axis=1)
    for z in (-0.7, -0.02, 0.0, 0.3, 0.6):
        posterior = prior * norm.pdf(z, alpha * x, sigma)
        expected = (posterior * x).sum() / posterior.sum()
        actual = two_modes.posterior_mean(z, logsnr)
        np.testing.assert_allclose(actual, expected, atol=1e-8)


def test_probability_flow_maps_quantiles_to_quantiles(two_modes):
    # In one dimension the trajectories cannot cross, so each keeps its
    # quantile: of the noise at t = 1, of the mixture at t = 0.
    noise = np.array([-3.0, -1.0, -0.3, -0.01, 0.0, 0.05, 0.5, 2.0])
    times = np.array([1.0, 0.6, 0.2, 0.0])
    path = two_modes.probability_flow(noise, times)
    logsnr = np.asarray([-15.0, *_logsnr(two_modes, times[1:-1]), 15.0])
    mixture = two_modes.MODES, two_modes.STD
    quantiles = [marginal_cdf(z, -15.0, *mixture) for z in noise]
    expected = [
        [
            brentq(
                lambda z, at=at, q=q: marginal_cdf(z, at, *mixture) - q,
                -5,
                5,
                xtol=1e-12,
            )
            for q in quantiles
        ]
        for at in logsnr
    ]
    np.testing.assert_allclose(path, expected, atol=1e-5)


def _logsnr(two_modes, times):
    # The cosine schedule in float64: -2 log tan of an angle linear in time.
    first = np.arctan(np.exp(-two_modes.SCHEDULE.logsnr_max / 2))
    last = np.pi / 2 - np.arctan(np.exp(two_modes.SCHEDULE.logsnr_min / 2))
    return -2 * np.log(np.tan(first + times * (last - first)))


def test_drawn_trajectories_end_where_generate_does(two_modes):
    teacher = DiffusionModel(two_modes.make_network(), space=two_modes.SPACE)
    student = MultistepConsistencyModel.from_teacher(teacher, student_steps=4)
    noise = np.linspace(-1, 1, 6, dtype="float32").reshape(-1, 1)
    path = two_modes.trajectories(student, noise, 4)
    assert path.shape == (len(two_modes.TIMES), 6)
    np.testing.assert_array_equal(path[0], noise.ravel())
    np.testing.assert_allclose(
        np.clip(path[-1], -1, 1),
        student.generate(noise=noise).ravel(),
        atol=1e-5,
    )


# What its parts make of each backend, the test above asks.
@pytest.mark.once
def test_quick_run_writes_the_figure_and_the_numbers(two_modes, tmp_path):
    two_modes.main(
        two_modes.parse_arguments(["--quick", "--output", str(tmp_path)])
    )
    assert (tmp_path / "two_modes.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "two_modes.json").read_text())
    assert [*results["steps"]] == ["1", "2", "4", "16"]
    for entry in results["steps"].values():
        assert all(0 < value < 3 for value in entry.values())
        assert entry["rms_distance"] <= entry["max_distance"]
