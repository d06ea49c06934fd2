"""Files of models whose space has an autoencoder, or whose network a say."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_mscm import (
    DiffusionModel,
    MultistepConsistencyModel,
    callbacks,
    spaces,
)
from keras_mscm.conditioning import Condition
from tests.dense import dense_network, numbers

PICTURES = (4, 4, 3)


def make(**kw):
    """A model on latents of an autoencoder with weights."""
    encoder = keras.layers.Conv2D(2, 2, 2, name="encode")
    decoder = keras.layers.Conv2DTranspose(3, 2, 2, name="decode")
    space = spaces.Latents((2, 2, 2), encoder, decoder, image_shape=PICTURES)
    return DiffusionModel(dense_network((2, 2, 2)), space=space, seed=1, **kw)


@pytest.mark.parametrize(
    ("dtype", "atol"), [("float32", 1e-6), ("float16", 5e-3)]
)
def test_a_preset_has_the_autoencoders_weights(dtype, atol, tmp_path):
    model = make()
    model.save_to_preset(tmp_path / "preset", weights_dtype=dtype)
    names = {path.name for path in (tmp_path / "preset").iterdir()}
    assert {"encoder.weights.h5", "decoder.weights.h5"} < names
    loaded = DiffusionModel.from_preset(tmp_path / "preset")
    pictures, noise = numbers(3, PICTURES), numbers(3, (2, 2, 2))
    for run in (
        lambda m: m.generate(noise=noise, num_steps=2),
        lambda m: ops.convert_to_numpy(m.space.encode(pictures)),
    ):
        np.testing.assert_allclose(run(loaded), run(model), atol=atol)
    # A preset of ours is replaced, with what it holds.
    make().save_to_preset(tmp_path / "preset")


def test_a_preset_without_them_is_refused(tmp_path):
    make().save_to_preset(tmp_path / "preset")
    (tmp_path / "preset" / "decoder.weights.h5").unlink()
    with pytest.raises(ValueError, match=r"decoder\.weights\.h5"):
        DiffusionModel.from_preset(tmp_path / "preset")
    DiffusionModel.from_preset(tmp_path / "preset", load_weights=False)


def test_damaged_ones_are_refused(tmp_path):
    make().save_to_preset(tmp_path / "preset")
    path = tmp_path / "preset" / "encoder.weights.h5"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"encoder\.weights\.h5"):
        DiffusionModel.from_preset(tmp_path / "preset")


def test_what_a_functional_network_is_told_is_not_lost(tmp_path):
    declared = {"embedding": Condition((3,), null=0.0)}
    network = dense_network((2, 2, 1), declared)
    network.conditioning = declared
    model = DiffusionModel(network, image_shape=(2, 2, 1), label_dropout=0.1)
    student = MultistepConsistencyModel.from_teacher(
        model, student_steps=2, guidance_scale=2.0
    )
    student.compile()
    images = numbers(4, (2, 2, 1)) / 4
    student.fit(images, {"embedding": np.ones((4, 3), "float32")}, verbose=0)
    student.save(tmp_path / "student.keras")
    loaded = keras.saving.load_model(tmp_path / "student.keras")
    assert loaded.conditioning == declared


def test_what_has_no_effect_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`reference`.*ema=None"):
        MultistepConsistencyModel(
            dense_network((2, 2, 1)),
            image_shape=(2, 2, 1),
            student_steps=2,
            reference="ema",
            ema=None,
        )
    with pytest.raises(ValueError, match="`decode`"):
        callbacks.SampleGrid(tmp_path, every=1, decode=False)


def test_a_codec_of_a_strangers_size_takes_no_memory():
    config = make().get_config()
    config["space"]["config"]["decoder"]["config"]["filters"] = 2**40
    with pytest.raises(ValueError, match="weights must fit"):
        DiffusionModel.from_config(config)
