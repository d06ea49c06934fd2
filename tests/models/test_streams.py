"""Batches of a stream are checked as they pass, on every backend alike."""

import re
import warnings

import keras
import numpy as np
import pytest

from keras_mscm import backend, datasets
from keras_mscm.conditioning import standard
from keras_mscm.models import data_checks
from keras_mscm.spaces import Pixels
from tests.models.data_forms import Batches

NUM, BAD = 6, 4
IMAGES = np.random.default_rng(0).uniform(-1, 1, (8, 4, 4, 1)).astype("float32")
LABELS = (np.arange(8) % 3).astype("int32")


def with_entry(array, value):
    array = np.array(array)
    array.flat[array.size // 2] = value
    return array


# What is in batch 4 of 6: its images and labels, what is said of it.
BAD_BATCHES = {
    "NaN": (with_entry(IMAGES, np.nan), LABELS, "images", "1 NaN", "finite"),
    "infinite": (with_entry(IMAGES, np.inf), LABELS, "images", "inf", "-1, 1"),
    "0 to 255": (IMAGES * 100 + 100, LABELS, "images", "to 199", "/ 127.5 - 1"),
    "a label too large": (
        IMAGES,
        with_entry(LABELS, 3),
        "labels",
        "from 0 to 3",
        "0..2",
    ),
    "a label below 0": (
        IMAGES,
        with_entry(LABELS, -1),
        "labels",
        "from -1 to 2",
        "0..2",
    ),
}
OTHER_TYPES = {
    "uint8": (np.full(IMAGES.shape, 9, "uint8"), LABELS, "images", "uint8", ""),
    "shape": (IMAGES[:, 1:], LABELS, "images", "(8, 3, 4, 1)", "4, 4, 1"),
    "labels of floats": (IMAGES, LABELS / 1.0, "labels", "float", "integers"),
}


def batches_with(images, labels):
    return [
        (images, labels) if i == BAD else (IMAGES, LABELS) for i in range(NUM)
    ]


def generator(batches):
    yield from batches


def tf_data(batches):
    tf = pytest.importorskip("tensorflow")
    images, labels = (np.concatenate(part) for part in zip(*batches))
    return tf.data.Dataset.from_tensor_slices((images, labels)).batch(8)


def data_loader(batches):
    data = pytest.importorskip("torch.utils.data")
    import torch

    images, labels = (np.concatenate(part) for part in zip(*batches))
    return data.DataLoader(
        data.TensorDataset(torch.tensor(images), torch.tensor(labels)), 8
    )


def grain(batches):
    import grain

    return grain.MapDataset.source(batches)


STREAMS = {
    "generator": generator,
    "py_dataset": Batches,
    "grain": grain,
    "tf.data": tf_data,
    "data_loader": data_loader,
}


@pytest.fixture
def model(make_teacher):
    return make_teacher(num_classes=3)


def assert_refused(run, name, part, came, allowed):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        run()
    for text in (f"batch {BAD} of {name} ({part})", came, allowed):
        assert text in str(error.value), (text, str(error.value))


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("bad", BAD_BATCHES)
def test_a_bad_value_in_a_later_batch(bad, stream, model, weights_of):
    if stream == "data_loader" and backend.NAME != "torch":
        pytest.importorskip("torch")
    *batch, part, came, allowed = BAD_BATCHES[bad]
    before = weights_of(model.network)
    assert_refused(
        lambda: model.fit(
            STREAMS[stream](batches_with(*batch)), shuffle=False, verbose=0
        ),
        "x",
        part,
        came,
        allowed,
    )
    # What was learnt before it stays, and what is wrong has not come in.
    after = weights_of(model.network)
    assert all(np.all(np.isfinite(array)) for array in after)
    assert any(np.any(one != other) for one, other in zip(before, after))
    assert int(model.iteration) in (BAD - 2, BAD - 1, BAD)
    model.generate(2, num_steps=1)


@pytest.mark.parametrize("bad", OTHER_TYPES)
def test_another_type_in_a_later_batch(bad, model):
    *batch, part, came, allowed = OTHER_TYPES[bad]
    for stream in ("generator", "py_dataset", "grain"):
        assert_refused(
            lambda stream=stream: model.fit(
                STREAMS[stream](batches_with(*batch)), shuffle=False, verbose=0
            ),
            "x",
            part,
            came,
            allowed,
        )


@pytest.mark.parametrize("stream", STREAMS)
def test_validation_evaluation_and_measuring(stream, model):
    *batch, part, came, allowed = BAD_BATCHES["a label too large"]

    def bad():
        return STREAMS[stream](batches_with(*batch))

    for name, run in (
        ("x", lambda: model.evaluate(bad(), verbose=0)),
        ("x", lambda: model.measure_x_var(bad())),
        (
            "validation_data",
            lambda: model.fit(IMAGES, LABELS, validation_data=bad(), verbose=0),
        ),
    ):
        assert_refused(run, name, part, came, allowed)


@pytest.mark.parametrize("stream", STREAMS)
def test_a_good_stream_is_what_it_was(stream, make_teacher, weights_of):
    ends = []
    for watched in (True, False):
        keras.utils.set_random_seed(1)
        model = make_teacher(num_classes=3)
        x = STREAMS[stream](batches_with(IMAGES[::-1].copy(), LABELS))
        if not watched:  # Keras' own `fit`
            keras.Model.fit(model, x, shuffle=False, verbose=0)
        else:
            model.fit(x, shuffle=False, verbose=0)
        assert int(model.iteration) == NUM
        ends.append(weights_of(model.network))
    for one, other in zip(*ends):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_labels_that_a_data_set_holds_are_checked_beforehand(
    model, count_calls
):
    calls = count_calls(model)
    images = np.zeros((40, 4, 4, 1), "uint8")
    labels = with_entry(np.zeros(40, "int64"), 3)
    data = datasets.from_arrays(images, labels, batch_size=8, shuffle=False)
    with pytest.raises(ValueError, match=r"`x \(labels\)` must be in 0\.\.2"):
        model.fit(data, verbose=0)
    assert not calls


def test_an_error_of_a_data_set_is_its_own(model):
    def read(indices):
        if 3 in indices:
            raise KeyError("no third picture")
        return IMAGES[indices]

    data = datasets.ImageBatches(read, 8, LABELS, batch_size=2, shuffle=False)
    with pytest.raises(KeyError, match="no third picture"):
        model.fit(data, shuffle=False, verbose=0)


# Images in [0, 1].

UNIT = (IMAGES + 1) / 2


def test_arrays_in_0_1_are_refused(model, count_calls):
    calls = count_calls(model)
    for run in (
        lambda **kw: model.fit(UNIT, LABELS, verbose=0, **kw),
        lambda **kw: model.evaluate(UNIT, LABELS, verbose=0, **kw),
        lambda **kw: model.measure_x_var(UNIT, LABELS, **kw),
        lambda **kw: model.fit(
            IMAGES, LABELS, validation_data=(UNIT, LABELS), verbose=0, **kw
        ),
    ):
        with pytest.raises(ValueError, match=r"images \* 2 - 1") as error:
            run()
        assert re.search(r"\(images\)` must be .*\[-1, 1\]", str(error.value))
        assert "nonnegative=True" in str(error.value)
        assert not calls
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.measure_x_var(UNIT, LABELS, nonnegative=True)
        model.fit(UNIT, LABELS, verbose=0, nonnegative=True)
        model.fit(np.zeros_like(UNIT), LABELS, verbose=0)  # grey is grey
    for bad in (1, None, "yes"):
        with pytest.raises(ValueError, match="`nonnegative` must be True"):
            model.fit(UNIT, LABELS, verbose=0, nonnegative=bad)


def test_streams_in_0_1_are_told(model):
    def stream():
        return Batches([(UNIT, LABELS)] * 2)

    for run in (
        lambda **kw: model.fit(stream(), verbose=0, **kw),
        lambda **kw: model.evaluate(stream(), verbose=0, **kw),
        lambda **kw: model.measure_x_var(stream(), **kw),
    ):
        with pytest.warns(UserWarning, match=r"images \* 2 - 1"):
            run()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            run(nonnegative=True)


# What else a stream may be.


def test_a_dictionary_batch_is_told_its_keys(model):
    batches = Batches([{"image": IMAGES, "label": LABELS}])
    with pytest.raises(ValueError, match="'image', 'label'") as error:
        model.fit(batches, verbose=0)
    assert 'batch["image"]' in str(error.value)


def test_channels_first_is_told_to_move_them(make_teacher):
    model = make_teacher(
        image_shape=(4, 4, 3), model_with={"image_shape": (4, 4, 3)}
    )
    images = np.zeros((2, 3, 4, 4), "float32")
    with pytest.raises(ValueError, match=r"np.moveaxis\(images, 1, -1\)"):
        model.fit(images, verbose=0)


def test_class_weights_ask_for_labels(model, make_teacher):
    plain = make_teacher()
    for run in (
        lambda: plain.fit(IMAGES, class_weight={0: 1.0}, verbose=0),
        lambda: model.fit(
            Batches([(IMAGES, LABELS)]), class_weight={0: 1.0}, verbose=0
        ),
    ):
        with pytest.raises(ValueError, match="`class_weight` must come with"):
            run()
    model.fit(IMAGES, LABELS, class_weight={0: 1.0, 1: 2.0, 2: 0.5}, verbose=0)


def test_a_network_that_is_frozen_is_not_trained(dense_network, make_teacher):
    network = dense_network()
    network.trainable = False
    model = make_teacher(network=network)
    with pytest.raises(ValueError, match="weights that are trained"):
        model.fit(IMAGES, verbose=0)
    model.evaluate(IMAGES, verbose=0)


# Devices that share a batch.

SHARED = data_checks.Expected(Pixels((4, 4, 1)), standard(3), shares=4)
LAST = [(IMAGES, LABELS)] * 2 + [(IMAGES[:6], LABELS[:6])]


def test_a_last_batch_that_does_not_divide_is_refused_beforehand():
    images, labels = (np.concatenate(part) for part in zip(*LAST))
    loaders = [
        Batches(LAST),
        datasets.from_arrays(images, labels, batch_size=8, seed=0),
    ]
    if backend.NAME == "torch":
        loaders.append(data_loader(LAST))
    for x in loaders:
        with pytest.raises(ValueError, match="6 images in the last") as error:
            data_checks.check_data("x", x, None, None, SHARED)
        assert "multiple of 4" in str(error.value)
        assert "drop_remainder=True" in str(error.value)
    for x in (
        Batches(LAST[:2]),
        datasets.from_arrays(
            images, labels, batch_size=8, seed=0, drop_remainder=True
        ),
        datasets.from_arrays(images, labels, batch_size=8, seed=0, repeat=True),
    ):
        data_checks.check_data("x", x, None, None, SHARED)


def test_of_a_stream_that_does_not_say_it_is_refused_as_it_passes():
    passing, _ = data_checks.check_data(
        "x", generator(LAST), None, None, SHARED
    )
    with pytest.raises(ValueError, match=r"batch 2 of x` .*multiple of 4"):
        for _ in passing:
            pass
    with pytest.warns(UserWarning, match="drop_remainder=True"):
        data_checks.check_data("x", tf_data(LAST), None, None, SHARED)
