"""`Teacher`: what it says, against float64, and what it holds."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm.conditioning import Condition
from keras_mscm.teachers import Teacher
from tests.dense import array, dense_network, numbers, rates, x_of

DECLARED = {"pooled": Condition((2,), null=[1.0, -2.0])}
Z = 2 * numbers(6, (3, 2))
LOGSNR = np.linspace(-6, 6, 6).astype("float32")
POOLED = numbers(6, (2,), 1)
NULL = np.tile(np.float32([1, -2]), (6, 1))


def inputs(pooled=POOLED):
    tensors = map(ops.convert_to_tensor, (Z, LOGSNR, pooled))
    z, logsnr, pooled = tensors
    return z, logsnr, {"pooled": pooled}


def network_says(network, pooled):
    z, logsnr, given = inputs(pooled)
    return array(network({"z": z, "logsnr": logsnr, **given}))


@pytest.mark.parametrize("prediction_type", ["v", "x", "epsilon"])
def test_a_networks_word_is_x(prediction_type):
    network, teacher = dense_network((3, 2), DECLARED), Teacher()
    assert not teacher.attached
    teacher.hold(network, prediction_type, DECLARED)
    assert teacher.attached

    def x(pooled):
        output = network_says(network, pooled)
        return x_of(output, Z.astype("float64"), LOGSNR, prediction_type)

    tolerance = {"rtol": 1e-4, "atol": 1e-4}
    got, conditional = teacher.teach(*inputs())
    assert got is conditional
    np.testing.assert_allclose(array(got), x(POOLED), **tolerance)
    got, conditional = teacher.teach(*inputs(), 3.0)
    np.testing.assert_allclose(array(conditional), x(POOLED), **tolerance)
    want = x(NULL) + 3.0 * (x(POOLED) - x(NULL))
    np.testing.assert_allclose(array(got), want, rtol=1e-3, atol=1e-3)
    got, conditional = teacher.teach(*inputs(), 0.0)
    np.testing.assert_allclose(array(got), x(NULL), **tolerance)
    np.testing.assert_allclose(array(conditional), x(POOLED), **tolerance)


def posterior_mean(mean, variance):
    """`E[x | z]` of data of a normal distribution, in `keras.ops`."""

    def teacher(z, logsnr, conditioning):
        logsnr = ops.reshape(logsnr, (-1, 1, 1))
        alpha, sigma2 = ops.sqrt(ops.sigmoid(logsnr)), ops.sigmoid(-logsnr)
        m = mean * conditioning["pooled"][:, None, :]
        gain = alpha * variance / (alpha**2 * variance + sigma2)
        return m + gain * (z - alpha * m)

    return teacher


def test_a_closed_form_is_its_own_word():
    teacher = Teacher()
    teacher.hold(
        None,
        conditioning=DECLARED,
        closed_form=posterior_mean(0.5, 0.3),
    )
    assert teacher.attached
    assert teacher.variables == []
    alpha, sigma = rates(LOGSNR, 3)

    def x(pooled):
        m = 0.5 * pooled.astype("float64")[:, None, :]
        gain = alpha * 0.3 / (alpha**2 * 0.3 + sigma**2)
        return m + gain * (Z - alpha * m)

    got, _ = teacher.teach(*inputs())
    np.testing.assert_allclose(array(got), x(POOLED), atol=1e-5)
    got, conditional = teacher.teach(*inputs(), 2.5)
    want = x(NULL) + 2.5 * (x(POOLED) - x(NULL))
    np.testing.assert_allclose(array(got), want, atol=1e-5)
    np.testing.assert_allclose(array(conditional), x(POOLED), atol=1e-5)
    assert keras.backend.standardize_dtype(got.dtype) == "float32"


def test_what_it_holds_is_frozen_and_can_be_replaced():
    networks = [dense_network((3, 2), DECLARED, name=n) for n in ("a", "b")]
    teacher = Teacher()
    for network in networks:
        teacher.hold(network, "v", DECLARED)
        assert not network.trainable
        assert teacher.trainable_variables == []
        assert {id(v) for v in teacher.variables} == {
            id(v) for v in network.variables
        }
        want = x_of(network_says(network, POOLED), Z, LOGSNR, "v")
        np.testing.assert_allclose(
            array(teacher.teach(*inputs())[0]), want, atol=1e-4
        )
    teacher.hold(None, closed_form=posterior_mean(1.0, 1.0))
    assert teacher.variables == []
    teacher.hold(networks[0], "v", DECLARED)
    assert len(teacher.variables) == len(networks[0].variables)


@pytest.mark.once
def test_no_file_holds_it_unless_it_is_to():
    teacher = Teacher()
    teacher.hold(dense_network((3, 2)), "v")
    assert "network" not in dir(teacher)
    teacher.saved = True
    assert "network" in dir(teacher)
