"""`Generator`: what `generate` compiles, by itself."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import DiffusionModel, samplers, schedules, spaces
from keras_mscm.conditioning import Condition
from keras_mscm.generator import Generator
from keras_mscm.plan import steps as plan_steps
from tests.dense import array, dense_network, numbers

EAGER = keras.backend.backend() == "torch"
CLASSES = {"labels": Condition((), "int32", null=3, num_classes=3)}


@pytest.fixture(scope="module")
def model():
    return DiffusionModel(
        dense_network((3, 2), CLASSES),
        space=spaces.Box((3, 2), low=-1.0),
        conditioning=CLASSES,
        label_dropout=0.1,
        seed=0,
    )


SEED = np.array([0, 0], "uint32")


@pytest.mark.parametrize(
    "sampler",
    [samplers.DDIM(), samplers.ADDIM(), samplers.Heun()],
    ids=lambda sampler: type(sampler).__name__,
)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("decode", [False, True])
def test_is_what_generate_does(sampler, guided, decode, model):
    if decode and type(sampler) is not samplers.DDIM:
        return
    noise, labels = numbers(4, (3, 2)) * 2, np.array([0, 1, 2, 0], "int32")
    scale = [np.float32(2.5)] if guided else []
    run = Generator(model, sampler, guided=guided, decode=decode).compiled()
    got = run(noise, {"labels": labels}, np.int32(3), SEED, *scale)
    expected = model.generate(
        noise=noise,
        labels=labels,
        num_steps=3,
        sampler=sampler,
        guidance_scale=2.5 if guided else None,
        decode=decode,
    )
    np.testing.assert_array_equal(ops.convert_to_numpy(got), expected)
    assert (expected.min() >= -1) or not decode


def test_numbers_in_the_place_of_noise(model):
    # The same seed gives an example of the same number the same noise.
    whole = model.generate(5, num_steps=2, seed=3, labels=[0] * 5)
    few = model.generate(5, num_steps=2, seed=3, labels=[0] * 5, batch_size=2)
    np.testing.assert_allclose(whole, few, atol=1e-5)
    assert np.abs(whole[0] - whole[1]).max() > 1e-2


def test_compiles_once_for_all_steps_and_scales(model):
    traces = []

    def sampler(denoise, noise, schedule, num_steps, seed):
        traces.append(num_steps)
        return samplers.DDIM()(denoise, noise, schedule, num_steps, seed)

    run = Generator(model, sampler, guided=True).compiled()
    noise, given = numbers(2, (3, 2)), {"labels": np.array([0, 1], "int32")}
    ends = [
        array(run(noise, given, np.int32(n), SEED, np.float32(s)))
        for n, s in ((1, 1.0), (7, 1.0), (7, 4.0))
    ]
    assert len(traces) == (3 if EAGER else 1)
    for one, other in ((0, 1), (1, 2)):
        assert np.abs(ends[one] - ends[other]).max() > 1e-3


def test_another_schedule(model):
    noise, given = numbers(2, (3, 2)), {"labels": np.array([0, 1], "int32")}
    karras = schedules.KarrasSchedule()
    run = Generator(model, samplers.DDIM(), karras).compiled()
    got = array(run(noise, given, np.int32(4), SEED))
    expected = model.generate(
        noise=noise,
        labels=[0, 1],
        num_steps=4,
        sampler=samplers.DDIM(),
        schedule=karras,
    )
    np.testing.assert_array_equal(got, expected)
    plain = array(
        Generator(model, samplers.DDIM()).compiled()(
            noise, given, np.int32(4), SEED
        )
    )
    assert np.abs(plain - got).max() > 1e-3


def test_reads_variables_as_they_are(model):
    noise, given = numbers(2, (3, 2)), {"labels": np.array([0, 1], "int32")}
    run = Generator(model, samplers.DDIM()).compiled()
    before = array(run(noise, given, np.int32(2), SEED))
    kept = model.ema_network.get_weights()
    model.ema_network.set_weights([1.5 * w for w in kept])
    after = array(run(noise, given, np.int32(2), SEED))
    model.ema_network.set_weights(kept)
    assert np.abs(after - before).max() > 1e-3
    again = array(run(noise, given, np.int32(2), SEED))
    np.testing.assert_array_equal(again, before)


@pytest.mark.once
def test_the_planner_plans_it():
    assert plan_steps.Generator is Generator
