"""Fashion-MNIST from local files, and what Keras' cache does with them."""

import gzip
import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest

from keras_mscm.datasets import from_keras, keras_datasets

DEBIAN = keras_datasets.FASHION_MNIST
# A small set in Fashion-MNIST's format, and a fresh cache of Keras'.
CODE = """if True:
    import json, sys
    from pathlib import Path
    from keras_mscm.datasets import from_keras, keras_datasets
    keras_datasets.FASHION_MNIST = Path(sys.argv[1])
    found = {}
    for split in ("train", "test"):
        dataset = from_keras(
            "fashion_mnist", split, batch_size=5, shuffle=False
        )
        images, labels = dataset[0]
        found[split] = images.tolist(), labels.tolist()
    print(json.dumps(found))
"""


def test_copies_the_files_of_debian_into_keras_cache(tmp_path, pictures):
    source, home = tmp_path / "debian", tmp_path / "home"
    source.mkdir()
    home.mkdir()
    written = {}
    for seed, (split, part) in enumerate(
        (("train", "train"), ("test", "t10k"))
    ):
        images = pictures(5, 28, 28, 1, seed)
        labels = np.arange(5, dtype="uint8") + seed
        for name, header, content in (
            ("images-idx3", bytes(16), images),
            ("labels-idx1", bytes(8), labels),
        ):
            with gzip.open(source / f"{part}-{name}-ubyte.gz", "wb") as file:
                file.write(header + content.tobytes())
        written[split] = images, labels
    done = subprocess.run(
        [sys.executable, "-c", CODE, source],
        env={**os.environ, "KERAS_HOME": str(home), "KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    for split, (images, labels) in written.items():
        np.testing.assert_allclose(
            found[split][0], images / 127.5 - 1, atol=1e-6
        )
        assert found[split][1] == labels.tolist()
    assert len([*(home / "datasets/fashion-mnist").glob("*.gz")]) == 4


@pytest.mark.skipif(
    not DEBIAN.exists(), reason="needs Debian's package dataset-fashion-mnist"
)
@pytest.mark.parametrize(
    ("split", "num"), [("train", 60_000), ("test", 10_000)]
)
def test_all_of_fashion_mnist(split, num, check_batch, train):
    dataset = from_keras("fashion_mnist", split, batch_size=1000, seed=0)
    assert dataset.num_images == num
    check_batch(dataset[0], (1000, 28, 28, 1))
    assert np.bincount(dataset.labels).tolist() == [num // 10] * 10
    train(dataset, (28, 28, 1), 10)


def test_labels_in_a_column(monkeypatch, pictures, train):
    images = pictures(8, 32, 32), np.arange(8).reshape(8, 1)
    monkeypatch.setattr(
        keras.datasets.cifar10, "load_data", lambda: (None, images)
    )
    dataset = from_keras("cifar10", "test", batch_size=4, image_size=8)
    train(dataset, (8, 8, 3), 10)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "cifar"}, "`name` must be one of .* name='cifar'"),
        ({"name": ["mnist"]}, "`name` must be one of"),
        ({"split": "val"}, "`split` must be one of .* split='val'"),
        ({"split": True}, "`split` must be one of"),
        ({"batch_size": 2.5}, "`batch_size` must be an integer"),
        ({"image_size": 0}, "`image_size` must be an integer of at least 1"),
        ({"shuffle": "no"}, "`shuffle` must be True or False"),
        ({"seed": 0.5}, "`seed` must be an integer in 0"),
        ({"shard": (True, 2)}, "`shard` must be .index, count."),
    ],
)
def test_bad_arguments_are_named_before_a_download(
    monkeypatch, kwargs, message
):
    monkeypatch.setattr(keras.datasets.mnist, "load_data", None)
    with pytest.raises(ValueError, match=message):
        from_keras(**{"name": "mnist", "batch_size": 2, **kwargs})


@pytest.mark.parametrize("keyword", ["labels", "nonnegative", "shufle"])
def test_an_unknown_keyword(monkeypatch, keyword):
    monkeypatch.setattr(keras.datasets.mnist, "load_data", None)
    with pytest.raises(TypeError, match=rf"from_keras\(\) got .*'{keyword}'"):
        from_keras("mnist", batch_size=2, **{keyword: True})
