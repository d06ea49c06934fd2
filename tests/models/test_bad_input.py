"""Errors say what is wrong, before anything is compiled."""

import re

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import (
    DiffusionModel,
    MultistepConsistencyModel,
    UViT,
    callbacks,
    losses,
)
from tests.models.data_forms import Batches


def images_of(shape=(8, 4, 4, 1), dtype="float32"):
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(dtype)


IMAGES, LABELS = images_of(), np.arange(8) % 3
NAN = np.where(np.indices(IMAGES.shape)[0] == 5, np.nan, IMAGES)
PIXELS = np.random.default_rng(0).integers(0, 256, IMAGES.shape)


def check(function, names, came, allowed):
    """Asserts a ValueError with the argument, what came and what may."""
    with pytest.raises(ValueError) as error:  # noqa: PT011
        function()
    for part in (names, came, allowed):
        assert re.search(part, str(error.value)), (part, str(error.value))


@pytest.fixture(scope="module")
def models():
    """A plain and a conditional model, never trained: built once."""

    def network(num_classes):
        return UViT(
            (4, 4, 1),
            widths=(8,),
            depths=(1,),
            attention=True,
            head_width=8,
            embedding_width=8,
            num_classes=num_classes,
        )

    made = {
        name: DiffusionModel(network(num_classes))
        for name, num_classes in (("plain", None), ("conditional", 3))
    }
    for name in tuple(made):
        made[f"{name} student"] = MultistepConsistencyModel.from_teacher(
            made[name], student_steps=2, teacher_steps=8
        )
    for model in made.values():
        model.compile()

        def never(*args, **kwargs):
            raise AssertionError("compiled before the check")

        model.training_example = never
    return made


# Data.

BAD_IMAGES = {
    "rank": (IMAGES[..., 0], "shape", r"\(8, 4, 4\)", r"batch, 4, 4, 1"),
    "channels": (images_of((8, 4, 4, 3)), "", r"8, 4, 4, 3", r"4, 4, 1"),
    "size": (images_of((8, 5, 5, 1)), "", r"8, 5, 5, 1", r"4, 4, 1"),
    "none at all": (IMAGES[:0], "", r"\(0, 4, 4, 1\)", "no images"),
    "integers": (PIXELS, r"127\.5", r"int64 from \d+ to 255", r"\[-1, 1\]"),
    "bytes": (PIXELS.astype("uint8"), "", "uint8 .* 255", r"\[-1, 1\]"),
    "255.0": (PIXELS.astype("float32"), r"127\.5", "to 255", r"\[-1, 1\]"),
    "integers -1..1": (np.sign(IMAGES).astype("int8"), "", "int8", "floats"),
    "outside": (1.5 * IMAGES, "", r"from -1\.\d+ to 1\.\d+", r"\[-1, 1\]"),
    "NaN": (NAN, "", "16 NaN of 128", "finite"),
    "infinite": (np.where(IMAGES > 0.9, np.inf, IMAGES), "", "inf", "-1, 1"),
}


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_images(kind, models):
    images, hint, came, allowed = BAD_IMAGES[kind]
    for name, data in (
        ("x", {"x": images}),
        ("x", {"x": Batches([images])}),
        ("x", {"x": Batches([(images,)])}),
        ("validation_data", {"x": IMAGES, "validation_data": images}),
        ("validation_data", {"x": IMAGES, "validation_data": (images,)}),
        (
            "validation_data",
            {"x": IMAGES, "validation_data": Batches([images])},
        ),
    ):
        for model in (models["plain"], models["plain student"]):
            check(
                lambda model=model, data=data: model.fit(**data, verbose=0),
                f"`{name} .*{hint}",
                came,
                allowed,
            )
    for run in (
        lambda: models["plain"].fit(iter([images])),
        lambda: models["plain"].evaluate(images),
    ):
        check(run, "`x ", came, allowed)


BAD_LABELS = {
    "missing": (None, "None", "num_classes=3"),
    "out of range": (LABELS + 1, "from 1 to 3", r"0\.\.2"),
    "negative": (LABELS - 1, "from -1 to 1", r"0\.\.2"),
    "one-hot": (np.eye(3)[LABELS], r"\(8, 3\), dtype float64", "integers"),
    "floats": (LABELS.astype("float32"), "float32", "integers"),
    "booleans": (LABELS > 1, "bool", "integers"),
    "a list": (LABELS.tolist(), "list", "array"),
    "too few": (LABELS[:5], "8 images, 5 labels", "one entry per image"),
}


@pytest.mark.parametrize("kind", BAD_LABELS)
def test_labels(kind, models):
    labels, came, allowed = BAD_LABELS[kind]
    batch = IMAGES if labels is None else (IMAGES, labels)
    good = (IMAGES, LABELS)
    model = models["conditional"]
    for name, run in (
        ("x", lambda: model.fit(IMAGES, labels)),
        ("x", lambda: model.fit(Batches([batch]))),
        ("x", lambda: model.fit(iter([batch]))),
        ("x", lambda: model.evaluate(IMAGES, labels)),
        ("valid", lambda: model.fit(*good, validation_data=batch)),
        ("valid", lambda: model.fit(*good, validation_data=Batches([batch]))),
    ):
        check(run, f"`{name}", came, allowed)


def test_labels_without_classes(models):
    model = models["plain"]
    for run in (
        lambda: model.fit(IMAGES, LABELS),
        lambda: model.fit(Batches([(IMAGES, LABELS)])),
    ):
        check(run, "labels", r"shape \(8,\)", "must not be given.*None")
    check(lambda: model.generate(labels=[0]), "labels", "shape", "no classes")


def test_sample_weight(models):
    model, plain = models["conditional"], models["plain"]
    few = np.ones(3, "float32")
    matrix = np.ones((8, 2), "float32")
    for weight, came in ((few, r"\(3,\)"), (matrix, r"\(8, 2\)")):
        for run in (
            lambda w=weight: model.fit(IMAGES, LABELS, sample_weight=w),
            lambda w=weight: model.fit(Batches([(IMAGES, LABELS, w)])),
            lambda w=weight: model.evaluate(IMAGES, LABELS, sample_weight=w),
            lambda w=weight: model.fit(
                IMAGES, LABELS, validation_data=(IMAGES, LABELS, w)
            ),
        ):
            check(run, "sample_weight", came, r"\(8,\)")
    nan = np.full(8, np.nan, "float32")
    check(
        lambda: model.fit(IMAGES, LABELS, sample_weight=nan),
        "sample_weight",
        "NaN",
        "finite",
    )
    # Keras would leave it out without a word.
    check(
        lambda: plain.fit(IMAGES, sample_weight=np.ones(8)),
        "sample_weight",
        "None",
        "must come with labels",
    )


def test_no_data(models):
    model = models["plain"]
    for data in (iter([]), Batches([]), (batch for batch in ())):
        check(lambda data=data: model.fit(data), "`x`", "no batch", "empty")
    check(lambda: model.fit(None), "`x`", "None", "array")
    for empty in ((), []):
        check(
            lambda empty=empty: model.fit(IMAGES, validation_data=empty),
            "`validation_data`",
            "0 parts",
            "images",
        )


@pytest.mark.parametrize(
    ("data", "came"),
    [
        ((IMAGES, LABELS), "tuple"),
        ([IMAGES], "list"),
        ({"images": IMAGES}, "dict"),
        (IMAGES.tolist(), "list"),
        ("images", "str"),
        (5, "int"),
    ],
    ids=["tuple", "list", "dict", "numbers", "str", "int"],
)
def test_data_of_no_known_kind(data, came, models):
    for model in models.values():
        check(lambda model=model: model.fit(data), "`x`", came, "PyDataset")


@pytest.mark.parametrize(
    ("batch", "came"),
    [
        ({"images": IMAGES}, "dict"),
        ((IMAGES.tolist(), LABELS), "list"),
        ((IMAGES, None, None, None), "NoneType"),
    ],
    ids=["dict", "list", "four"],
)
def test_batches_of_no_known_kind(batch, came, models):
    for data in (Batches([batch]), iter([batch])):
        check(
            lambda data=data: models["plain"].fit(data),
            "`x`",
            came,
            r"\(images, labels\)",
        )


def test_data_loader_of_bare_tensors(models):
    torch = pytest.importorskip("torch")
    loader = torch.utils.data.DataLoader(torch.as_tensor(IMAGES))
    check(lambda: models["plain"].fit(loader), "`x`", "tensor", "TensorDataset")


def test_tf_data(models):
    tf = pytest.importorskip("tensorflow")
    data = tf.data.Dataset.from_tensor_slices(PIXELS.astype("uint8")).batch(2)
    check(lambda: models["plain"].fit(data), "`x", "uint8", r"\[-1, 1\]")
    check(lambda: models["plain"].fit(data.take(0)), "`x`", "no", "empty")


# Arguments of `generate`.


def bad_generate_arguments():
    for steps, came in ((True, "bool"), (2.0, "float"), ("2", "str")):
        yield {"num_steps": steps}, "num_steps", came, "integer"
    yield {"num_steps": np.array([2])}, "num_steps", "ndarray", "integer"
    yield {"num_steps": 0}, "num_steps", "num_steps=0", "at least 1"
    for number, came in ((True, "bool"), (2.0, "float")):
        yield {"num_images": number}, "num_images", came, "integer"
    yield {"num_images": 0}, "num_images", "num_images=0", "at least 1"
    yield {"batch_size": 0}, "batch_size", "batch_size=0", "at least 1"
    yield {"batch_size": 1.0}, "batch_size", "float", "integer"
    for shape in ((4, 4, 1), (2, 4, 4), (2, 4, 4, 3), (2, 5, 5, 1)):
        came = re.escape(str(shape))
        yield {"noise": images_of(shape)}, "noise", came, r"4, 4, 1\)"
    yield {"noise": IMAGES[:0]}, "noise", r"\(0, 4, 4, 1\)", "no images"
    yield (
        {"noise": IMAGES, "num_images": 3},
        "`num_images`, .*`noise`",
        "'num_images': 3, 'noise': 8",
        "agree",
    )


@pytest.mark.parametrize("number", range(len([*bad_generate_arguments()])))
def test_generate(number, models):
    arguments, name, came, allowed = [*bad_generate_arguments()][number]
    for model in (models["plain"], models["plain student"]):
        check(
            lambda model=model: model.generate(**{"num_steps": 2, **arguments}),
            name,
            came,
            allowed,
        )


@pytest.mark.parametrize(
    ("labels", "came", "allowed"),
    [
        ([3], "3 to 3", r"0\.\.2"),
        ([-1, 0], "-1 to 0", r"0\.\.2"),
        ([0.5], "float64", "integers"),
        ([True], "bool", "integers"),
        ([[0]], r"\(1, 1\)", r"\(batch,\)"),
        (0, r"\(\)", r"\(batch,\)"),
        ([], r"\(0,\)", r"\(batch,\)"),
        (np.zeros(0, "int32"), r"\(0,\)", r"\(batch,\)"),
    ],
)
def test_generate_labels(labels, came, allowed, models):
    for name in ("conditional", "conditional student"):
        check(
            lambda name=name: models[name].generate(labels=labels),
            "labels",
            came,
            allowed,
        )
    check(
        lambda: models["conditional"].generate(3, labels=[0, 1]),
        "labels",
        "'num_images': 3, 'labels': 2",
        "agree",
    )


def test_a_student_knows_its_number_of_steps(models):
    for steps in (1, 3, 256):
        check(
            lambda steps=steps: models["plain student"].generate(
                num_steps=steps
            ),
            "`num_steps`",
            f"num_steps={steps}",
            "student_steps=2",
        )


def test_an_unknown_sampler(models):
    check(
        lambda: models["plain"].generate(num_steps=2, sampler="ddim"),
        "`sampler`",
        "'ddim'",
        "keras_mscm.samplers",
    )


# Arguments of constructors and `compile`.


@pytest.mark.parametrize(
    ("arguments", "came", "allowed"),
    [
        ({"student_steps": 0}, "student_steps=0", "at least 1"),
        ({"student_steps": 2.0}, "float", "integer"),
        ({"student_steps": True}, "bool", "integer"),
        ({"method": "CD"}, "'CD'", "'distillation', 'training'"),
        ({"method": None}, "None", "'distillation', 'training'"),
        ({"eta": 1.5}, "1.5", r"\[0, 1\]"),
        ({"eta": "much"}, "'much'", r"\[0, 1\]"),
        ({"teacher_steps": 1}, "teacher_steps=1", "student_steps=2"),
        ({"teacher_steps": "8"}, "'8'", "student_steps=2"),
        ({"teacher_steps": None}, "None", "student_steps=2"),
        ({"teacher_steps": np.nan}, "nan", "student_steps=2"),
        ({"teacher_steps": np.inf}, "inf", "student_steps=2"),
        ({"ema_decay": 1.0}, "1.0", r"\[0, 1\)"),
        ({"ema_decay": -0.1}, "-0.1", r"\[0, 1\)"),
        ({"weighting": "snr"}, "'snr'", "keras_mscm.weightings"),
    ],
)
def test_student(arguments, came, allowed, models):
    check(
        lambda: MultistepConsistencyModel.from_teacher(
            models["plain"], **{"student_steps": 2, **arguments}
        ),
        f"`{next(iter(arguments))}`",
        came,
        allowed,
    )


def test_teacher(models, dense_network):
    check(
        lambda: MultistepConsistencyModel.from_teacher(
            dense_network(), student_steps=2
        ),
        "`teacher`",
        "Functional",
        "DiffusionModel",
    )
    student = models["plain student"]
    for teacher, name, came in (
        (models["conditional"], "num_classes", "3"),
        (
            DiffusionModel(
                dense_network(image_shape=(2, 2, 1)), image_shape=(2, 2, 1)
            ),
            "image_shape",
            r"\(2, 2, 1\)",
        ),
    ):
        check(
            lambda teacher=teacher: student.attach_teacher(teacher),
            "`teacher`",
            f"Received: {came}",
            f"student's {name}",
        )
    # Not what only looks like one: a student, itself, a network.
    for teacher in (student, models["plain student"], dense_network(), None):
        check(
            lambda teacher=teacher: student.attach_teacher(teacher),
            "`teacher`",
            type(teacher).__name__,
            "DiffusionModel",
        )


def test_network(dense_network):
    check(
        lambda: DiffusionModel(dense_network()),
        "`image_shape`",
        "None",
        "height, width, channels",
    )
    check(
        lambda: DiffusionModel(dense_network(), image_shape=(4, 4)),
        "`image_shape`",
        r"\(4, 4\)",
        "height, width, channels",
    )
    check(
        lambda: DiffusionModel(
            dense_network(), image_shape=(4, 4, 1), prediction_type="noise"
        ),
        "`prediction_type`",
        "'noise'",
        "'v', 'x', 'epsilon'",
    )
    z = keras.Input((4, 4, 1), name="z")
    logsnr = keras.Input((), name="logsnr")
    halves = keras.Model(
        {"z": z, "logsnr": logsnr}, keras.layers.AveragePooling2D(2)(z)
    )
    check(
        lambda: DiffusionModel(halves, image_shape=(4, 4, 1)),
        "`network`",
        r"\(2, 2, 1\)",
        r"\(4, 4, 1\)",
    )


@pytest.mark.parametrize(
    ("loss", "came", "allowed"),
    [
        ("nonsense", "'nonsense'", "keras_mscm.losses"),
        (42, "42", "keras_mscm.losses"),
        (["mse"], "'mse'", "keras_mscm.losses"),
        ({"a": "mse"}, "'mse'", "keras_mscm.losses"),
        ("mse", r"\(2, 4, 4\)", "one value per example"),
        (losses.SquaredL2(reduction="none"), "'none'", "sum_over_batch_size"),
    ],
    ids=["word", "number", "list", "dict", "per pixel", "not reduced"],
)
def test_loss(loss, came, allowed, dense_network):
    model = DiffusionModel(dense_network(), image_shape=(4, 4, 1))
    check(lambda: model.compile(loss=loss), "`loss`", came, allowed)


# Models that aren't ready.


def test_an_uncompiled_model(dense_network):
    model = DiffusionModel(dense_network(), image_shape=(4, 4, 1))
    for method in (model.fit, model.evaluate):
        check(lambda m=method: m(IMAGES), "compile", "is not", "compile")
    for method in (model.train_on_batch, model.test_on_batch):
        with pytest.raises(ValueError, match="compile"):
            method(IMAGES)


def test_an_unattached_teacher(make_student, count_calls, tmp_path):
    make_student().save(tmp_path / "student.keras")
    student = keras.saving.load_model(tmp_path / "student.keras")
    calls = count_calls(student)
    for method in (
        student.fit,
        student.evaluate,
        student.train_on_batch,
        student.test_on_batch,
    ):
        check(
            lambda method=method: method(IMAGES),
            "`teacher`",
            "None",
            "attach_teacher",
        )
    assert not calls
    assert student.generate(2).shape == (2, 4, 4, 1)


@pytest.mark.parametrize(
    ("arguments", "name", "came", "allowed"),
    [
        ({"start": 4}, "start", "start=4", "student_steps=8"),
        ({"end": 7}, "end", "end=7", "student_steps=8"),
        ({"start": "64"}, "start", "'64'", "number of at least 1"),
        ({"iterations": 0}, "iterations", "iterations=0", "at least 1"),
        ({"iterations": 1e5}, "iterations", "float", "integer"),
    ],
)
def test_anneal(
    arguments, name, came, allowed, make_teacher, make_student, count_calls
):
    student = make_student(student_with={"student_steps": 8})
    calls = count_calls(student)

    def fit():
        anneal = callbacks.TeacherStepAnneal(**arguments)
        student.fit(IMAGES, callbacks=[anneal], verbose=0)

    check(
        fit,
        f"`{name}`",
        came,
        allowed,
    )
    assert not calls
    assert int(student.iteration) == 0


def test_anneal_of_a_model_without_teacher_steps(make_teacher, count_calls):
    model = make_teacher()
    calls = count_calls(model)
    check(
        lambda: model.fit(
            IMAGES, callbacks=[callbacks.TeacherStepAnneal()], verbose=0
        ),
        "`TeacherStepAnneal`",
        "DiffusionModel",
        "MultistepConsistencyModel",
    )
    assert not calls


# What an error leaves behind.


def test_a_first_step_that_fails_loses_nothing(make_teacher, weights_of):
    model = make_teacher()
    before = weights_of(model)
    example = model.training_example

    def fails(*args):
        raise RuntimeError("no such luck")

    model.training_example = fails
    for method in (model.fit, model.evaluate):
        with pytest.raises(RuntimeError, match="no such luck"):
            method(IMAGES, verbose=0)
    with pytest.raises(ValueError, match=r"dictionary of .*logsnr.*z"):
        model.predict(IMAGES, verbose=0)
    for ours, theirs in zip(before, weights_of(model)):
        np.testing.assert_array_equal(ours, theirs)
    model.training_example = example
    model.fit(IMAGES, verbose=0)
    assert int(model.iteration) == 1


def test_the_first_batch_is_looked_at_and_not_lost(make_teacher):
    # Each batch adds its mean to the loss's mean over batches.
    class Recorder(keras.losses.Loss):
        def call(self, target, predicted):
            return ops.mean(target, axis=(1, 2, 3)) + 0 * ops.mean(
                predicted, axis=(1, 2, 3)
            )

    model = make_teacher(
        compile_with={"loss": Recorder()},
        model_with={"weighting": ops.ones_like},
    )
    batches = [np.full((2, 4, 4, 1), i / 10, "float32") for i in (8, 4, 0)]
    for stream in (Batches(batches), iter(batches)):
        history = model.fit(stream, steps_per_epoch=3, shuffle=False, verbose=0)
        np.testing.assert_allclose(history.history["loss"], 0.4, rtol=1e-5)
