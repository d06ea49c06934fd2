"""What the adapters' tests share: comparing samplers, and looking within."""

import keras
import numpy as np
from keras import ops

from keras_mscm import samplers


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
