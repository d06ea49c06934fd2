"""Half precision and what else saves memory, from training to sampling."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import DiffusionModel, MultistepConsistencyModel


@pytest.mark.parametrize(
    ("policy", "attention"),
    [("mixed_bfloat16", (True,)), ("mixed_float16", (False, True))],
)
def test_trained_saved_loaded_and_sampled(
    policy, attention, tiny_uvit, tmp_path
):
    """A network with all its layers, rematerialised, and accumulation."""
    network = tiny_uvit(
        widths=(16,) * len(attention),
        depths=(1,) * len(attention),
        attention=attention,
        context_width=8,
        dropout=0.1,
        remat=True,
        dtype=policy,
        name="network",
    )
    model = MultistepConsistencyModel(
        network, student_steps=2, method="training", teacher_steps=8, seed=1
    )
    optimizer = keras.optimizers.Adam(1e-3, gradient_accumulation_steps=2)
    model.compile(optimizer)
    scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (policy == "mixed_float16")
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (8, 8, 8, 1)).astype("float32")
    context = {
        "context": rng.standard_normal((8, 3, 8)).astype("float32"),
        "context_mask": np.arange(24).reshape(8, 3) % 4 > 0,
    }
    before = network.get_weights()
    kwargs = {"batch_size": 2, "shuffle": False, "verbose": 0}
    history = model.fit(images, context, epochs=2, **kwargs)
    assert np.all(np.isfinite(history.history["loss"]))
    assert int(model.iteration) == 4
    moved = [np.any(a != b) for a, b in zip(before, network.get_weights())]
    assert np.mean(moved) > 0.8
    assert not {"float16", "bfloat16"} & {w.dtype for w in model.weights}

    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.network.dtype_policy.name == policy
    assert loaded.network.remat == (True,) * len(attention)
    draws = [m.generate(2, seed=0) for m in (model, loaded)]
    assert np.all(np.isfinite(draws[0]))
    assert draws[0].std() > 0.01
    np.testing.assert_array_equal(*draws)
    ends = []
    for trained in (model, loaded):
        history = trained.fit(images, context, **kwargs)
        ends.append([*trained.get_weights(), history.history["loss"][0]])
    for one, other in zip(*ends, strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_update_that_overflows_is_none(make_teacher, toy_images):
    """Neither of the weights, nor of their average, nor in the count."""
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(1e-2), initial_scale=2.0**60
    )
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = make_teacher(compile_with={"optimizer": optimizer})
    finally:
        keras.config.set_dtype_policy(before)
    weights = model.get_weights()
    history = model.fit(toy_images(8), batch_size=4, epochs=2, verbose=0)
    assert np.all(np.isfinite(history.history["loss"]))
    assert int(model.iteration) == int(model.optimizer.iterations) == 0
    for one, other in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    scale = float(ops.convert_to_numpy(model.optimizer.dynamic_scale))
    assert scale == 2.0**56  # halved by each of four steps


@pytest.mark.parametrize(
    ("floatx", "method"),
    [("bfloat16", "distillation"), ("float64", "training")],
)
def test_another_default_format(floatx, method, dense_network, toy_images):
    before = keras.config.floatx()
    keras.config.set_floatx(floatx)
    try:
        teacher = DiffusionModel(dense_network(), image_shape=(4, 4, 1), seed=1)
        teacher.compile("sgd")
        teacher.fit(toy_images(8), verbose=0)
        student = MultistepConsistencyModel.from_teacher(
            teacher, student_steps=2, teacher_steps=8, method=method
        )
        student.compile("sgd")
        history = student.fit(toy_images(8), verbose=0)
        assert np.isfinite(float(history.history["loss"][-1]))
        images = student.generate(3, seed=1)
        assert images.dtype == "float32"
        assert np.all(np.abs(images) <= 1)
    finally:
        keras.config.set_floatx(before)
