"""Classes and sequences: how they are given, left out, and guided with."""

import re

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import DiffusionModel, losses, samplers
from tests.models.data_forms import (
    Batches,
    as_py_dataset,
    as_tf_data,
    in_batches,
)

EAGER = keras.backend.backend() == "torch"
NUM_CLASSES, WIDTH = 3, 6


def logsnr_at(t):
    """The cosine schedule from 15 to -15."""
    low = np.arctan(np.exp(-7.5))
    return -2 * np.log(np.tan(low + t * (np.pi / 2 - 2 * low)))


def rates(logsnr):
    return (1 + np.exp(-logsnr)) ** -0.5, (1 + np.exp(logsnr)) ** -0.5


def sequences(num, length=4, seed=0):
    """Vectors, and a mask that lets 1 to all of them count."""
    rng = np.random.default_rng(seed)
    context = rng.standard_normal((num, length, WIDTH)).astype("float32")
    count = 1 + np.arange(num) % length
    return context, np.arange(length) < count[:, None]


KINDS = {
    "labels": {"num_classes": NUM_CLASSES},
    "context": {"context_width": WIDTH},
    "both": {"num_classes": NUM_CLASSES, "context_width": WIDTH},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def conditioning_of(kind, num, seed=0):
    """As `generate` takes it, and as a network does."""
    given = {}
    if kind != "context":
        given["labels"] = (np.arange(num) + seed) % NUM_CLASSES
    if kind != "labels":
        context, mask = sequences(num, seed=seed)
        given |= {"context": context, "context_mask": mask}
    return given


def without(conditioning):
    """What a network sees in its place: class K, and no vector at all."""
    absent = dict(conditioning)
    if "labels" in absent:
        absent["labels"] = np.full_like(absent["labels"], NUM_CLASSES)
    if "context" in absent:
        mask = absent["context_mask"]
        absent["context_mask"] = np.zeros(mask.shape, "bool")
    return absent


@pytest.fixture
def make_model(make_teacher):
    """A factory of models trained with label dropout, by kind."""

    def make(kind, label_dropout=0.3):
        model_with = {"label_dropout": label_dropout}
        return make_teacher(model_with=model_with, **KINDS[kind])

    return make


def fit(model, *data, **kw):
    return model.fit(*data, verbose=0, **kw).history


# Label dropout.


@every_kind
def test_dropout_leaves_a_part_out_as_a_whole(kind, make_model, toy_images):
    model, count = make_model(kind), 2000
    images = np.zeros((count, 4, 4, 1), "float32")
    given = conditioning_of(kind, count)
    y = given["labels"] if kind == "labels" else given
    draws = []
    for training in (True, True, False):
        inputs, _, _ = model._example((images, y), training)
        seen = {k: ops.convert_to_numpy(inputs[k]) for k in given}
        absent = without(given)
        whole, nothing = (
            np.all(
                [
                    np.reshape(seen[k] == want[k], (count, -1)).all(axis=1)
                    for k in given
                ],
                axis=0,
            )
            for want in (given, absent)
        )
        assert np.all(whole ^ nothing)
        draws.append(nothing)
    tolerance = 4 * (0.3 * 0.7 / count) ** 0.5
    assert abs(draws[0].mean() - 0.3) < tolerance
    # Another part in each step, and none in evaluation.
    both = np.mean(draws[0] & draws[1])
    assert abs(both - 0.09) < tolerance
    assert not draws[2].any()


def test_dropout_in_fit_and_none_in_evaluation(toy_images):
    # A network that says the label it sees, and a loss that hands it on.
    layers = keras.layers
    inputs = {
        "z": keras.Input((4, 4, 1), name="z"),
        "logsnr": keras.Input((), name="logsnr"),
        "labels": keras.Input((), dtype="int32", name="labels"),
    }
    said = layers.Embedding(4, 16)
    output = layers.Reshape((4, 4, 1))(said(inputs["labels"]))
    model = DiffusionModel(
        keras.Model(inputs, output),
        image_shape=(4, 4, 1),
        prediction_type="x",
        num_classes=3,
        label_dropout=0.25,
        weighting=ops.ones_like,
        seed=0,
    )

    only_the_last = np.repeat([[0.0], [0.0], [0.0], [1.0]], 16, axis=1)
    for network in (model.network, model.ema_network):
        network.set_weights([only_the_last])

    class Said(keras.losses.Loss):
        def call(self, target, predicted):
            return ops.mean(predicted, axis=(1, 2, 3))

    model.compile(keras.optimizers.SGD(0.0), Said())
    images, labels = toy_images(1024), np.arange(1024) % 3
    history = fit(
        model,
        images,
        labels,
        batch_size=256,
        validation_data=(images, labels),
    )
    dropped = history["loss"][0]
    assert abs(dropped - 0.25) < 4 * (0.25 * 0.75 / 1024) ** 0.5
    assert history["val_loss"] == [0.0]
    assert model.evaluate(images, labels, verbose=0) == 0.0


def test_label_dropout_is_a_share_of_something(dense_network):
    def make(label_dropout, **kw):
        DiffusionModel(
            dense_network(**kw),
            image_shape=(4, 4, 1),
            label_dropout=label_dropout,
            **kw,
        )

    for value in (1.0, -0.1, np.nan, "some", None, True):
        with pytest.raises(ValueError, match=r"`label_dropout` .*\[0, 1\)"):
            make(value, num_classes=3)
    with pytest.raises(ValueError, match=r"without conditioning.*=0\.1"):
        make(0.1)


# Guidance.


def numpy_ddim(model, noise, conditioning, num_steps, scale):
    """DDIM with guidance, in float64 but for the network itself."""
    z = noise.astype("float64")

    def predict(conditioning):
        inputs = {"z": z.astype("float32"), "logsnr": logsnr, **conditioning}
        inputs = {k: ops.convert_to_tensor(v) for k, v in inputs.items()}
        v = ops.convert_to_numpy(model.ema_network(inputs)).astype("float64")
        return alpha_t * z - sigma_t * v

    for i in range(num_steps, 0, -1):
        at = logsnr_at(i / num_steps)
        logsnr = np.full(len(z), at, "float32")
        (alpha_t, sigma_t), (alpha_s, sigma_s) = map(
            rates, (at, logsnr_at((i - 1) / num_steps))
        )
        x, x_without = map(predict, (conditioning, without(conditioning)))
        x = x_without + scale * (x - x_without)
        z = alpha_s * x + sigma_s / sigma_t * (z - alpha_t * x)
    return np.clip(z, -1, 1)


@every_kind
def test_guidance_is_the_numpy_guidance(kind, make_model, toy_images):
    model, noise = make_model(kind), toy_images(6)
    given = conditioning_of(kind, 6)
    arguments = {"noise": noise, "num_steps": 3, "sampler": samplers.DDIM()}
    arguments |= given
    ends = []
    for scale in (0, 1, 2.5):
        got = model.generate(guidance_scale=scale, **arguments)
        expected = numpy_ddim(model, noise, given, 3, scale)
        np.testing.assert_allclose(got, expected, atol=1e-4)
        ends.append(got)
    for one, other in ((0, 1), (1, 2)):
        assert np.abs(ends[one] - ends[other]).max() > 1e-2
    unguided = model.generate(**arguments)
    np.testing.assert_allclose(ends[1], unguided, atol=1e-5)
    # A scale of 0 has no use for the conditioning; all others have.
    others = conditioning_of(kind, 6, seed=1)
    for scale, differs in ((0, False), (1, True)):
        got = model.generate(guidance_scale=scale, **{**arguments, **others})
        apart = np.abs(got - ends[scale]).max()
        assert apart > 1e-2 if differs else apart < 1e-5


def test_guidance_is_one_call_of_twice_the_batch(make_model, toy_images):
    model, noise, calls = make_model("labels"), toy_images(3), []
    denoise = model.denoise

    def counting(network, z, logsnr, conditioning):
        assert len(z) == len(logsnr) == len(conditioning["labels"])
        calls.append(len(z))
        return denoise(network, z, logsnr, conditioning)

    model.denoise = counting
    arguments = {"noise": noise, "sampler": samplers.DDIM(), "num_steps": 4}

    def calls_for(**kw):
        calls.clear()
        return model.generate(**arguments, **kw), [*calls]

    plain, sizes = calls_for()
    assert set(sizes) == {3}
    times = len(sizes)
    guided, sizes = calls_for(guidance_scale=2.0)
    # As often as without, in each step or in the one trace.
    assert sizes == [6] * times
    assert times == 4 or not EAGER
    # Nor does another scale need another trace.
    more, sizes = calls_for(guidance_scale=4.0)
    assert sizes == ([6] * 4 if EAGER else [])
    for one, other in ((plain, guided), (guided, more)):
        assert np.abs(one - other).max() > 1e-2


@pytest.mark.parametrize("scale", [-0.5, np.nan, np.inf, "much", True], ids=str)
def test_guidance_is_a_number_of_at_least_0(scale, make_model):
    with pytest.raises(ValueError, match=r"`guidance_scale` .* at least 0"):
        make_model("labels").generate(num_steps=1, guidance_scale=scale)


def test_guidance_needs_label_dropout(make_teacher, make_model):
    for model in (make_teacher(), make_model("labels", label_dropout=0.0)):
        with pytest.raises(ValueError, match=r"`guidance_scale` .*dropout > 0"):
            model.generate(num_steps=1, guidance_scale=2.0)


# Sequences.


@pytest.mark.parametrize("kind", ["context", "both"])
def test_every_kind_of_data_gives_the_same_training(
    kind, make_model, toy_images, weights_of
):
    # 10 images in batches of 4: the last one is smaller.
    images, y = toy_images(10), conditioning_of(kind, 10)

    def train(*data, y=y, **kw):
        keras.utils.set_random_seed(0)
        model = make_model(kind)
        history = fit(model, *data, shuffle=False, **kw)
        assert int(model.iteration) == 3
        validation = model.evaluate(images, y, batch_size=10, verbose=0)
        return [*history["loss"], validation], weights_of(model.network)

    expected = train(images, y, batch_size=4)
    for stream in (as_tf_data, as_py_dataset, in_batches):
        got = train(stream(images, y))
        np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
        for ours, theirs in zip(got[1], expected[1]):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    # And it is the data that make it.
    others = conditioning_of(kind, 10, seed=1)
    other = train(images, others, y=others, batch_size=4)
    assert np.all(np.abs(np.subtract(other[0], expected[0])) > 1e-5)


def test_labels_may_come_in_a_dictionary(make_model, toy_images):
    images, labels = toy_images(8), np.arange(8) % NUM_CLASSES
    ends = []
    for y in (labels, {"labels": labels}):
        keras.utils.set_random_seed(0)
        history = fit(
            make_model("labels"), images, y, validation_data=(images, y)
        )
        ends.append(history)
    assert ends[0] == ends[1]


def test_generate_with_a_context(make_model, toy_images):
    model, noise = make_model("context"), toy_images(4)
    context, mask = sequences(4)

    def generate(**kw):
        return model.generate(noise=noise, num_steps=2, **kw)

    got = generate(context=context, context_mask=mask)
    assert got.shape == (4, 4, 4, 1)
    # All counts where no mask is given, and the mask may be of integers.
    whole = generate(context=context)
    ones = generate(context=context, context_mask=np.ones((4, 4), "int64"))
    np.testing.assert_array_equal(whole, ones)
    assert np.abs(whole - got).max() > 1e-3
    # What is masked has no say, and nor has its place.
    changed = np.where(mask[..., None], context, 7.0)
    np.testing.assert_allclose(
        generate(context=changed, context_mask=mask), got, atol=1e-6
    )
    longer = np.concatenate([context, context], axis=1)
    padded = np.concatenate([mask, np.zeros_like(mask)], axis=1)
    np.testing.assert_allclose(
        generate(context=longer, context_mask=padded), got, atol=1e-6
    )
    # Each image has its own.
    swapped = generate(context=context[::-1], context_mask=mask[::-1])
    assert np.abs(swapped - got).max() > 1e-3
    in_parts = generate(context=context, context_mask=mask, batch_size=3)
    np.testing.assert_allclose(in_parts, got, atol=1e-6)
    # Without a context there is none.
    none = generate()
    masked = generate(context=context, context_mask=np.zeros_like(mask))
    np.testing.assert_allclose(masked, none, atol=1e-6)
    assert np.abs(none - got).max() > 1e-3
    # It says how many images.
    assert model.generate(num_steps=1, context=context[:2]).shape[0] == 2


def test_generate_with_a_context_and_labels(make_model, toy_images):
    model, noise = make_model("both"), toy_images(4)
    context, mask = sequences(4)
    given = {"context": context, "context_mask": mask}
    in_turn = model.generate(noise=noise, num_steps=2, **given)
    given["labels"] = np.array([0, 1, 2, 0])
    labelled = model.generate(noise=noise, num_steps=2, **given)
    np.testing.assert_array_equal(in_turn, labelled)
    given["labels"] = np.array([0, 1, 2, 1])
    other = model.generate(noise=noise, num_steps=2, **given)
    np.testing.assert_array_equal(other[:3], labelled[:3])
    assert np.abs(other[3] - labelled[3]).max() > 1e-3


def test_a_student_takes_its_teachers_conditioning(
    make_model, make_student, toy_images
):
    student = make_student(
        teacher=make_model("both"),
        student_with={"guidance_scale": 2.0, "label_dropout": 0.2},
    )
    assert student.context_width == WIDTH
    images, y = toy_images(8), conditioning_of("both", 8)
    history = fit(student, images, y, validation_data=(images, y))
    assert np.all(np.isfinite([*history.values()]))
    given = conditioning_of("both", 4)
    assert student.generate(**given).shape == (4, 4, 4, 1)


# Bad input.

CONTEXT, MASK = sequences(8)
BAD_CONTEXTS = {
    "nothing": (None, "NoneType", "context_mask"),
    "an array": (CONTEXT, r"\(8, 4, 6\)", "no classes"),
    "no context": ({"context_mask": MASK}, "NoneType", "dictionary by name"),
    "no mask": ({"context": CONTEXT}, "NoneType", r"\(context_mask\)"),
    "other keys": (
        {"context": CONTEXT, "mask": MASK, "text": MASK},
        r"\['mask', 'text'\]",
        r"\['context', 'context_mask'\]",
    ),
    "labels": (
        {"context": CONTEXT, "context_mask": MASK, "labels": np.arange(8)},
        r"shape \(8,\)",
        "no classes",
    ),
    "width": (
        {"context": CONTEXT[..., :5], "context_mask": MASK},
        r"\(8, 4, 5\)",
        "length, 6",
    ),
    "rank": (
        {"context": CONTEXT[:, 0], "context_mask": MASK},
        r"\(8, 6\)",
        "length, 6",
    ),
    "length": (
        {"context": CONTEXT, "context_mask": MASK[:, :3]},
        r"\(8, 3\)",
        r"\(8, 4\)",
    ),
    "too few": (
        {"context": CONTEXT[:5], "context_mask": MASK[:5]},
        "8 images, 5 context",
        "one entry per image",
    ),
}


@pytest.fixture(scope="module")
def never_trained():
    """A model with context that has not been compiled by Keras' `fit`."""
    z = keras.Input((4, 4, 1), name="z")
    logsnr = keras.Input((), name="logsnr")
    context = keras.Input((None, WIDTH), name="context")
    mask = keras.Input((None,), dtype="bool", name="context_mask")
    inputs = {"z": z, "logsnr": logsnr, "context": context}
    network = keras.Model(
        {**inputs, "context_mask": mask}, keras.layers.Dense(1)(z)
    )
    model = DiffusionModel(network, image_shape=(4, 4, 1), context_width=WIDTH)
    model.compile(loss=losses.SquaredL2())

    def never(*args, **kwargs):
        raise AssertionError("compiled before the check")

    model.training_example = never
    return model


@pytest.mark.parametrize("kind", BAD_CONTEXTS)
def test_bad_context(kind, never_trained, toy_images):
    y, came, allowed = BAD_CONTEXTS[kind]
    images, model = toy_images(8), never_trained
    good = {"context": CONTEXT, "context_mask": MASK}
    batch = images if y is None else (images, y)
    for name, run in (
        ("x", lambda: model.fit(images, y)),
        ("x", lambda: model.fit(Batches([batch]))),
        ("x", lambda: model.evaluate(images, y)),
        ("valid", lambda: model.fit(images, good, validation_data=batch)),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            run()
        for part in (f"`{name}", came, allowed):
            assert re.search(part, str(error.value)), (part, str(error.value))


@pytest.mark.parametrize(
    ("given", "came", "allowed"),
    [
        ({"context": CONTEXT[..., :5]}, r"\(8, 4, 5\)", "length, 6"),
        ({"context": CONTEXT[0]}, r"\(4, 6\)", "length, 6"),
        (
            {"context": CONTEXT, "context_mask": MASK[:, :2]},
            r"\(8, 2\)",
            r"\(8, 4\)",
        ),
        ({"context": CONTEXT, "num_images": 3}, "'context': 8", "agree"),
        (
            {"context": CONTEXT, "context_mask": MASK[:4]},
            "'context_mask': 4",
            "agree",
        ),
        ({"context": CONTEXT, "labels": [0] * 8}, r"\(8,\)", "no classes"),
    ],
)
def test_bad_context_in_generate(given, came, allowed, never_trained):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        never_trained.generate(num_steps=2, **given)
    for part in (came, allowed):
        assert re.search(part, str(error.value)), (part, str(error.value))


def test_a_context_where_there_is_none(make_teacher):
    for given in ({"context": CONTEXT}, {"context_mask": MASK}):
        name = next(iter(given))
        with pytest.raises(ValueError, match=rf"`{name}` must not be given"):
            make_teacher().generate(num_steps=2, **given)


def test_a_network_sees_what_it_was_told_it_would(dense_network):
    with pytest.raises(ValueError, match="context"):
        DiffusionModel(
            dense_network(context_width=WIDTH), image_shape=(4, 4, 1)
        )
