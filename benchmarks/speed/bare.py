"""A training step and a forward pass without Keras' `fit` and our `generate`.

The same network and the same mathematics (algorithm 1, CT and CD), in a loop
written by hand for each framework: Adam, moving average, random numbers.
"""

import keras
import numpy as np
from keras import ops

from keras_mscm import functional as F
from keras_mscm import losses

RATE, BETA_1, BETA_2, EPSILON, EMA = 1e-4, 0.9, 0.999, 1e-7, 0.9999


def student_loss(model, x, labels, epsilon, segment, place):
    """Algorithm 1, for `epsilon` normal, `segment` and `place` in [0, 1)."""
    steps, per_segment = model.student_steps, 8.0
    times = F.segment_times(
        ops.floor(segment * steps),
        1 + ops.floor(place * per_segment),
        steps,
        per_segment,
    )
    logsnr_t, logsnr_s, logsnr_step = map(model.schedule, times)

    def predict(network, z, logsnr, training):
        inputs = {"z": z, "logsnr": logsnr}
        if labels is not None:
            inputs["labels"] = labels
        return F.predict_x(network(inputs, training=training), z, logsnr, "v")

    z_t = F.add_noise(x, epsilon, logsnr_t)
    x_teacher = x
    if model.method == "distillation":
        x_hat = predict(model.teacher.network, z_t, logsnr_t, False)
        x_var = 0.75 * ops.mean(ops.square(x_hat - x), axis=(1, 2, 3))
        x_teacher = F.addim_x(x_hat, z_t, logsnr_t, logsnr_s, x_var)
    z_s = F.ddim(x_teacher, z_t, logsnr_t, logsnr_s)
    x_ref = predict(model.network, z_s, logsnr_s, True)
    target = ops.stop_gradient(
        F.consistency_target(x_teacher, x_ref, logsnr_t, logsnr_s, logsnr_step)
    )
    x_hat = predict(model.network, z_t, logsnr_t, True)
    distance = losses.PseudoHuber().call(target, x_hat)
    return ops.mean(distance * losses.sqrt_snr_plus_one(logsnr_t))


def step(model):
    """A function of `images, labels` that trains; and returns the loss."""
    return {"jax": _jax_step, "tensorflow": _tf_steps, "torch": _torch_steps}[
        keras.backend.backend()
    ](model)


def _jax_step(model):
    import jax
    import jax.numpy as jnp

    trained = model.trainable_variables
    others = [
        v
        for v in model.non_trainable_variables
        if not any(v is w for w in model.ema_network.weights)
    ]

    def loss(weights, fixed, key, x, labels):
        scope = keras.StatelessScope(
            state_mapping=[*zip(trained, weights), *zip(others, fixed)]
        )
        a, b, c = jax.random.split(key, 3)
        n = x.shape[:1]
        with scope:
            return student_loss(
                model,
                x,
                labels,
                jax.random.normal(a, x.shape),
                jax.random.uniform(b, n),
                jax.random.uniform(c, n),
            )

    def update(state, fixed, x, labels):
        key, count, weights, average, first, second = state
        key, draw = jax.random.split(key)
        value, gradients = jax.value_and_grad(loss)(
            weights, fixed, draw, x, labels
        )
        count = count + 1
        scale = jnp.sqrt(1 - BETA_2**count) / (1 - BETA_1**count)

        def adam(w, a, m, v, g):
            m = m + (1 - BETA_1) * (g - m)
            v = v + (1 - BETA_2) * (g * g - v)
            w = w - RATE * scale * m / (jnp.sqrt(v) + EPSILON)
            return w, a + (1 - EMA) * (w - a), m, v

        rows = map(adam, weights, average, first, second, gradients)
        return value, (key, count, *map(list, zip(*rows)))

    compiled = jax.jit(update, donate_argnums=0)

    def fresh():
        return [jnp.copy(v.value) for v in trained]

    zeros = [[jnp.zeros(v.shape) for v in trained] for _ in range(2)]
    held = [(jax.random.key(0), jnp.zeros(()), fresh(), fresh(), *zeros)]
    fixed = [jnp.copy(v.value) for v in others]

    def run(x, labels):
        value, held[0] = compiled(held[0], fixed, x, labels)
        return value

    return {"jit": run}


def _tf_steps(model):
    import tensorflow as tf

    trained = model.trainable_variables
    average = [tf.Variable(v.value) for v in trained]
    first, second = (
        [tf.Variable(tf.zeros(v.shape)) for v in trained] for _ in range(2)
    )
    count = tf.Variable(0.0)

    def update(x, labels):
        n = tf.shape(x)[:1]
        epsilon = tf.random.normal(tf.shape(x))
        draws = tf.random.uniform(n), tf.random.uniform(n)
        with tf.GradientTape() as tape:
            value = student_loss(model, x, labels, epsilon, *draws)
        # The gradient of an embedding comes as slices.
        gradients = map(
            tf.convert_to_tensor,
            tape.gradient(value, [v.value for v in trained]),
        )
        count.assign_add(1.0)
        scale = tf.sqrt(1 - BETA_2**count) / (1 - BETA_1**count)
        for v, a, m, s, g in zip(trained, average, first, second, gradients):
            m.assign_add((1 - BETA_1) * (g - m))
            s.assign_add((1 - BETA_2) * (g * g - s))
            v.value.assign_sub(RATE * scale * m / (tf.sqrt(s) + EPSILON))
            a.assign_add((1 - EMA) * (v.value - a))
        return value

    return {
        "graph": tf.function(update, autograph=False),
        "XLA": tf.function(update, jit_compile=True, autograph=False),
    }


def _torch_steps(model):
    import torch

    trained = [v.value for v in model.trainable_variables]
    average = [v.detach().clone() for v in trained]
    optimizer = torch.optim.Adam(
        trained, RATE, (BETA_1, BETA_2), EPSILON, foreach=True
    )

    def loss(x, labels, *draws):
        return student_loss(model, x, labels, *draws)

    def stepper(loss):
        def update(x, labels):
            x = torch.as_tensor(x)
            labels = labels if labels is None else torch.as_tensor(labels)
            n = len(x)
            draws = torch.randn(x.shape), torch.rand(n), torch.rand(n)
            value = loss(x, labels, *draws)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(average, trained, 1 - EMA)
            return value

        return update

    return {"eager": stepper(loss), "compile": stepper(torch.compile(loss))}


def forward(model):
    """Functions of `z, logsnr, labels`: bare passes of the network."""
    network, name = model.ema_network, keras.backend.backend()

    def predict(z, logsnr, labels):
        inputs = {"z": z, "logsnr": logsnr}
        if labels is not None:
            inputs["labels"] = labels
        return network(inputs, training=False)

    if name == "jax":
        import jax

        @jax.jit
        def compiled(weights, *inputs):
            scope = zip(network.variables, weights)
            with keras.StatelessScope(state_mapping=scope):
                return predict(*inputs)

        return {
            "jit": lambda *inputs: compiled(
                [v.value for v in network.variables], *inputs
            )
        }
    if name == "tensorflow":
        import tensorflow as tf

        return {
            "graph": tf.function(predict, autograph=False),
            "XLA": tf.function(predict, jit_compile=True, autograph=False),
        }
    import torch

    def without_gradient(function):
        def run(*inputs):
            with torch.inference_mode():
                return function(*inputs)

        return run

    return {
        "eager": without_gradient(predict),
        "compile": without_gradient(torch.compile(predict)),
    }


def passes(run, model, num_steps, batch_size, labels):
    """A function that makes `num_steps` bare passes, to NumPy at the end."""
    z = np.random.default_rng(0).standard_normal(
        (batch_size, *model.image_shape), dtype="float32"
    )
    levels = [np.full(batch_size, i - 4.0, "float32") for i in range(num_steps)]
    z, *levels = map(ops.convert_to_tensor, (z, *levels))
    labels = labels if labels is None else ops.convert_to_tensor(labels)

    def all_passes():
        for logsnr in levels:
            output = run(z, logsnr, labels)
        return ops.convert_to_numpy(output)

    return all_passes
