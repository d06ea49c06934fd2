"""Classifier-free guidance against float64, with a denoiser that is linear."""

import numpy as np
import pytest
from keras import ops

from keras_mscm import functional as F
from tests.dense import array, numbers


@pytest.mark.parametrize("shape", [(1,), (3, 2), (2, 2, 1), (2, 2, 2, 1)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5])
def test_guided_is_the_formula_in_one_call(shape, scale):
    z, logsnr = numbers(5, shape), np.linspace(-3, 3, 5).astype("float32")
    given = {"a": numbers(5, shape, 1), "b": np.arange(5) % 3}
    without = {"a": numbers(5, shape, 2), "b": np.full(5, 7)}
    sizes = []

    def denoise(z, logsnr, given):
        sizes.append([len(v) for v in (z, logsnr, *given.values())])
        tail = [1] * len(shape)
        rest = ops.cast(given["b"], "float32") + logsnr
        return 0.5 * z + given["a"] ** 2 + ops.reshape(rest, (-1, *tail))

    def as_tensors(entries):
        return {k: ops.convert_to_tensor(v) for k, v in entries.items()}

    def reference(entries):
        rest = (entries["b"] + logsnr).reshape(-1, *[1] * len(shape))
        return (
            0.5 * z.astype("float64")
            + entries["a"].astype("float64") ** 2
            + rest
        )

    x, conditional = F.guided(
        denoise,
        ops.convert_to_tensor(z),
        ops.convert_to_tensor(logsnr),
        as_tensors(given),
        as_tensors(without),
        scale,
    )
    assert sizes == [[10] * 4]
    with_it, without_it = reference(given), reference(without)
    np.testing.assert_allclose(array(conditional), with_it, atol=1e-5)
    expected = without_it + scale * (with_it - without_it)
    np.testing.assert_allclose(array(x), expected, atol=1e-4)
    apart = np.abs(array(x) - array(conditional)).max()
    assert apart < 1e-5 if scale == 1 else apart > 1
