"""PeRFlow against its formulas in float64."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import PeRFlowModel


def to_numpy(tensor):
    return ops.convert_to_numpy(tensor).astype("float64")


def logsnr_at(t):
    """The cosine schedule from 15 to -15, in float64."""
    low, high = np.arctan(np.exp(-7.5)), np.arctan(np.exp(7.5))
    return -2 * np.log(np.tan(low + np.asarray(t) * (high - low)))


def times_of(logsnr):
    low, high = np.arctan(np.exp(-7.5)), np.arctan(np.exp(7.5))
    return (np.arctan(np.exp(-to_numpy(logsnr) / 2)) - low) / (high - low)


def rates(logsnr):
    alpha = np.sqrt(1 / (1 + np.exp(-logsnr)))
    sigma = np.sqrt(1 / (1 + np.exp(logsnr)))
    return alpha[:, None, None, None], sigma[:, None, None, None]


@pytest.mark.parametrize(("k", "n"), [(1, 4), (4, 3), (4, 1)])
def test_the_example_is_the_papers(k, n, make_teacher, toy_images):
    # A closed form teaches, and notes what it is asked.
    model = PeRFlowModel.from_teacher(
        make_teacher(), student_steps=k, solver_steps=n, seed=1
    )
    asked = []

    def closed_form(z, logsnr, conditioning):
        asked.append(to_numpy(z))
        return ops.tanh(z) + logsnr[:, None, None, None] / 50

    model.attach_teacher(closed_form)
    asked.clear()  # the check's
    images = toy_images(64)
    inputs, target, weight = model.training_example(
        ops.convert_to_tensor(images), {}, True
    )
    assert len(asked) == n  # and no other evaluation
    t = times_of(inputs["logsnr"])
    segment = np.ceil(t * k - 1e-6) - 1
    assert set(segment) == set(range(k))
    begin, end = (segment + 1) / k, segment / k

    # The teacher's path, in rectified flow's z / (alpha + sigma).
    z = asked[0]
    for part in range(n):
        l_a, l_b = (logsnr_at(begin - i / n / k) for i in (part, part + 1))
        (alpha_a, sigma_a), (alpha_b, sigma_b) = rates(l_a), rates(l_b)
        np.testing.assert_allclose(asked[part], z, atol=1e-5)
        x = np.tanh(z) + l_a[:, None, None, None] / 50
        z = alpha_b * x + sigma_b / sigma_a * (z - alpha_a * x)
    times, flow = [], []
    for at, z_at in ((begin, asked[0]), (end, z)):
        alpha, sigma = rates(logsnr_at(at))
        times.append(sigma / (alpha + sigma))
        flow.append(z_at / (alpha + sigma))

    # The velocity of the straight line, on it, as the x that it implies.
    velocity = (flow[0] - flow[1]) / (times[0] - times[1])
    alpha, sigma = rates(to_numpy(inputs["logsnr"]))
    time = sigma / (alpha + sigma)
    on_line = flow[0] + (time - times[0]) * velocity
    np.testing.assert_allclose(
        to_numpy(inputs["z"]) / (alpha + sigma), on_line, atol=2e-5
    )
    np.testing.assert_allclose(
        to_numpy(target), on_line - time * velocity, atol=2e-5
    )
    np.testing.assert_allclose(
        to_numpy(weight), np.exp(to_numpy(inputs["logsnr"])) + 1, rtol=1e-5
    )

    # The noise at the segment's beginning is standard normal.
    alpha, sigma = rates(logsnr_at(begin))
    epsilon = (asked[0] - alpha * images) / sigma
    assert abs(np.mean(epsilon)) < 4 / epsilon.size**0.5
    assert abs(np.std(epsilon) - 1) < 4 / (2 * epsilon.size) ** 0.5


def test_a_loaded_model_goes_on(make_teacher, toy_images, weights_of, tmp_path):
    teacher = make_teacher(dropout=0.2, num_classes=3)
    model = PeRFlowModel.from_teacher(
        teacher, student_steps=2, solver_steps=2, seed=2
    )
    assert model.teacher.attached
    model.compile(keras.optimizers.Adam(1e-3))
    data = dict(x=toy_images(12), y=np.arange(12) % 3)
    common = dict(batch_size=4, shuffle=False, verbose=0)
    model.fit(**data, **common)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert (loaded.student_steps, loaded.solver_steps) == (2, 2)
    loaded.attach_teacher(teacher)
    for each in (model, loaded):
        each.fit(**data, **common)
    for theirs, ours in zip(weights_of(loaded), weights_of(model), strict=True):
        np.testing.assert_array_equal(theirs, ours)
    with pytest.raises(ValueError, match=r"`num_steps`.*student_steps=2"):
        model.generate(num_steps=3)


def test_the_teacher_is_guided_in_one_call(make_teacher, toy_images):
    teacher = make_teacher(num_classes=3, model_with={"label_dropout": 0.1})
    labels = {"labels": ops.convert_to_tensor(np.arange(6, dtype="int32") % 3)}
    images, targets = ops.convert_to_tensor(toy_images(6)), []
    for scale in (1.0, 3.0):
        model = PeRFlowModel.from_teacher(
            teacher, guidance_scale=scale, solver_steps=1, seed=2
        )
        targets.append(
            to_numpy(model.training_example(images, labels, True)[1])
        )
    assert np.abs(targets[0] - targets[1]).max() > 1e-3
    with pytest.raises(ValueError, match="`guidance_scale`"):
        PeRFlowModel.from_teacher(
            make_teacher(num_classes=3), guidance_scale=2.0
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"student_steps": 0}, "`student_steps` must be an integer"),
        ({"solver_steps": 65}, "`solver_steps` must be an integer"),
        ({"guidance_scale": -1}, "`guidance_scale` must be a number"),
    ],
)
def test_bad_arguments(arguments, message, dense_network):
    with pytest.raises(ValueError, match=message):
        PeRFlowModel(dense_network(), image_shape=(4, 4, 1), **arguments)
