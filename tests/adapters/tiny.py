"""What the adapters' tests share: comparing samplers, and looking within."""

import keras
import numpy as np
from keras import ops

from keras_mscm import MultistepConsistencyModel, samplers


def difference(ours, theirs):
    """The largest difference, relative to the deviation of theirs."""
    ours, theirs = ops.convert_to_numpy(ours), ops.convert_to_numpy(theirs)
    assert ours.shape == theirs.shape
    assert np.all(np.isfinite(theirs))
    return np.abs(ours - theirs).max() / theirs.std()


def sampled(model, noise, num_steps, schedule=None, **arguments):
    """What the model makes of noise by DDIM, in its network's coordinates."""
    return model.generate(
        len(noise),
        noise=noise,
        num_steps=num_steps,
        sampler=samplers.DDIM(),
        schedule=schedule,
        decode=False,
        batch_size=len(noise),
        **arguments,
    )


def perturb(network, scale=0.3, seed=0):
    """Adds noise to all weights: what begins at zero says something then."""
    rng = np.random.default_rng(seed)
    for weight in network.trainable_variables:
        noise = rng.standard_normal(weight.shape).astype("float32")
        fan_in = max(1, int(np.prod(weight.shape[:-1])))
        weight.assign(weight + scale * noise * fan_in**-0.5)


def check_student(student, x, y):
    """One step of training reaches the student's copy, and not the teacher."""
    before = [ops.convert_to_numpy(v) for v in student.network.weights]
    teacher = [ops.convert_to_numpy(v) for v in student.teacher.network.weights]
    student.compile(optimizer=keras.optimizers.SGD(1e-2))
    history = student.fit(x, y, batch_size=len(x), epochs=1, verbose=0)
    assert np.isfinite(history.history["loss"][0])
    after = [ops.convert_to_numpy(v) for v in student.network.weights]
    assert any(np.any(a != b) for a, b in zip(after, before))
    for value, was in zip(student.teacher.network.weights, teacher):
        np.testing.assert_array_equal(value, was)


def inputs_of(model, conditioning, **times):
    """A network's inputs, of noise drawn with a fixed seed."""
    batch = len(times["logsnr"])
    noise = np.random.default_rng(3).standard_normal(
        (batch, *model.image_shape)
    )
    inputs = {"z": noise.astype("float32"), **conditioning}
    inputs |= {name: np.array(t, "float32") for name, t in times.items()}
    return {k: ops.convert_to_tensor(value) for k, value in inputs.items()}


def check_several_steps(model, x, y=None, tmp_path=None, limit=0, **kwargs):
    """A student of several numbers of steps, of an adapted model.

    It begins as its teacher, learns what the end of its step is, is copied and
    written with that, and predicts as before where it isn't told.
    """
    student = MultistepConsistencyModel.from_teacher(
        model, student_steps=(1, 2, 4), ema_decay=0.5, **kwargs
    )
    assert not {id(w) for w in student.network.weights} & {
        id(w) for w in model.network.weights
    }
    teacher = [ops.convert_to_numpy(w) for w in model.network.weights]
    y = y or {}
    begins = inputs_of(model, y, logsnr=[0.0] * len(x))
    noise = begins.pop("z")
    given = {name: begins[name] for name in y}

    def jumps(z, logsnr, logsnr_end):
        return student.denoise(
            student.network, z, logsnr, given, logsnr_end=logsnr_end
        )

    def denoises(z, logsnr):
        return model.denoise(model.network, z, logsnr, given)

    own = samplers.FlowMap()(jumps, noise, model.schedule, 4)
    expected = samplers.DDIM()(denoises, noise, model.schedule, 4)
    assert difference(own, expected) < 1e-5

    level = {"logsnr": [-4.0] * len(x)}
    ends = [
        inputs_of(model, y, **level, logsnr_end=[end] * len(x))
        for end in (-3.0, 6.0)
    ]

    def said(network, inputs):
        return ops.convert_to_numpy(network(inputs))

    network = student.network
    plain = inputs_of(model, y, **level)
    expected = said(model.network, plain)
    for end in (plain, *ends):
        assert difference(said(network, end), expected) == 0
    before = [ops.convert_to_numpy(w) for w in network.embed_end.weights]
    student.compile(optimizer=keras.optimizers.SGD(1e-2))
    history = student.fit(x, y or None, batch_size=len(x), epochs=1, verbose=0)
    assert np.isfinite(history.history["loss"][0])
    assert any(
        np.any(ops.convert_to_numpy(weight) != old)
        for weight, old in zip(network.embed_end.weights, before)
    )
    for value, was in zip(student.teacher.network.weights, teacher):
        np.testing.assert_array_equal(value, was)
    learnt, average = (
        [said(each, end) for end in ends]
        for each in (network, student.ema_network)
    )
    assert difference(*learnt) > 0
    assert difference(*average) > 0
    end = ends[-1]
    assert difference(said(network.clone(), end), learnt[-1]) <= limit
    if tmp_path is not None:
        student.save(tmp_path / "student.keras")
        loaded = keras.models.load_model(tmp_path / "student.keras")
        for each, ours in (
            (loaded.network, learnt[-1]),
            (loaded.ema_network, average[-1]),
        ):
            assert difference(ours, said(each, end)) <= limit
    # Without an end it is what it would be without the embedding.
    expected = said(network, plain)
    for weight in network.embed_end.weights:
        weight.assign(weight + 0.1)
    assert difference(said(network, plain), expected) == 0
    assert difference(said(network, end), learnt[-1]) > 0
    return student
