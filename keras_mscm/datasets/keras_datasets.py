"""The images of `keras.datasets`."""

from pathlib import Path
from typing import Any

import keras

from keras_mscm.checks import check_choice
from keras_mscm.datasets.arrays import from_arrays
from keras_mscm.datasets.image_batches import ImageBatches
from keras_mscm.datasets.indexed_batches import check_options
from keras_mscm.datasets.resizing import check_image_size

NAMES = ("mnist", "fashion_mnist", "cifar10", "cifar100")

# Where Debian's package dataset-fashion-mnist puts the original files.
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def from_keras(
    name: str, split: str = "train", *, batch_size: int, **kwargs: Any
) -> ImageBatches:
    """Batches of a data set of `keras.datasets`, images and labels.

    Keras downloads it once. Of Fashion-MNIST, files that Keras doesn't have yet
    are copied from Debian's package `dataset-fashion-mnist` into Keras' cache
    (below `KERAS_HOME`, or `~/.keras`) if that package is installed; then
    nothing is downloaded.

    Args:
        name: `"mnist"`, `"fashion_mnist"` (28x28, one channel), `"cifar10"` or
            `"cifar100"` (32x32, three channels).
        split: `"train"` or `"test"`.
        batch_size: Images per batch.
        **kwargs: `image_size`, `shuffle`, `seed`, `flip`, `repeat`,
            `drop_remainder`, `class_names` and `shard`, as for `from_arrays`.

    Returns:
        A `PyDataset` of float32 images in [-1, 1], and int32 labels.

    Raises:
        ValueError: If an argument is not one of those allowed; nothing has been
            downloaded then.

    Example:

    >>> # dataset = from_keras("fashion_mnist", batch_size=64, flip=True)
    >>> # model.fit(dataset, epochs=10)
    """
    check_choice("name", name, NAMES)
    check_choice("split", split, ("train", "test"))
    check_options(
        "from_keras",
        {"batch_size": batch_size, **kwargs},
        "class_names",
        "image_size",
    )
    if kwargs.get("image_size") is not None:
        check_image_size("image_size", kwargs["image_size"])
    if name == "fashion_mnist":
        for path in sorted(FASHION_MNIST.glob("*.gz")):
            # This copies only what isn't in the cache yet.
            keras.utils.get_file(
                path.name,
                origin=path.as_uri(),
                cache_subdir="datasets/fashion-mnist",
            )
    train, test = getattr(keras.datasets, name).load_data()
    images, labels = train if split == "train" else test
    # The labels are flattened, because those of CIFAR are a column.
    return from_arrays(images, labels.ravel(), batch_size=batch_size, **kwargs)
