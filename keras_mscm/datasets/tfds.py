"""The data sets of TensorFlow Datasets, through `tf.data`.

TensorFlow reads the files here, on whatever backend Keras trains.
"""

import contextlib
from typing import Any

import keras

from keras_mscm.checks import check_positive_integer
from keras_mscm.datasets.image_batches import as_shard, check_seed
from keras_mscm.datasets.resizing import center_square, pillow


def from_tfds(
    name: str,
    split: str = "train",
    *,
    batch_size: int,
    image_size: int | None = None,
    labels: bool = True,
    shuffle: bool = True,
    shuffle_buffer: int = 10_000,
    seed: int | None = None,
    flip: bool = False,
    repeat: bool = False,
    drop_remainder: bool = False,
    cache: bool | str = False,
    image_key: str = "image",
    label_key: str = "label",
    shard: tuple[int, int] | None = None,
    **kwargs: Any,
) -> Any:
    """Batches of a data set of TensorFlow Datasets; a `tf.data.Dataset`.

    Files are read interleaved, images decoded and resized in parallel (by the
    rule of `from_folder`), batches prefetched. On the JAX and PyTorch backends
    TensorFlow is told to leave the GPUs alone, unless it runs already.

    Args:
        name: Its name, such as `"cifar10"`, `"imagenet_resized/64x64"` or
            `"imagenet2012"`.
        split: Its part, such as `"train"`, `"test"` or `"train[:90%]"`.
        batch_size: Images per batch.
        image_size: Pixels of a side. None leaves the images as they are; they
            must then be of one size.
        labels: Whether to give labels.
        shuffle: Whether to shuffle files and images, anew in each epoch.
        shuffle_buffer: Images to draw the next one from. Images 64 wide take
            12 KB each.
        seed: Seed of the order and the flips, from 0. None draws new ones.
        flip: Whether to mirror each image, left to right, with probability 1/2.
        repeat: Whether to go on for ever; `fit` then needs `steps_per_epoch`.
        drop_remainder: Whether to leave out a last, smaller batch. One that is
            kept costs `fit` one more trace.
        cache: Whether to keep the resized images in memory; or a file to keep
            them in.
        image_key: The feature that is the image: uint8, 1 or 3 channels.
        label_key: The feature that is the label.
        shard: Which part of the split to give, and of how many parts: `(index,
            count)`, index from 0. Parts are of one size, and no two share an
            image; a part's files are all that is read. None gives each of JAX's
            processes a part of its own, all of it where there is one process.
        **kwargs: As for `tfds.load`: `data_dir`, `download`, `decoders`, ...

    Returns:
        A `tf.data.Dataset` of float32 images in [-1, 1], and int32 labels
        unless `labels=False`.

    Raises:
        ValueError: If the data set has no such features, an argument is out of
            its range, or Keras would share out a part once more.
        ImportError: If TensorFlow Datasets, TensorFlow or Pillow isn't
            installed.

    Example:

    >>> # dataset = from_tfds(
    >>> #     "imagenet2012", image_size=64, batch_size=256, repeat=True
    >>> # )
    >>> # model.fit(dataset, epochs=100, steps_per_epoch=1000)
    """
    check_positive_integer("batch_size", batch_size)
    check_positive_integer("shuffle_buffer", shuffle_buffer)
    check_seed(seed)
    if not {"as_supervised", "with_info"}.isdisjoint(kwargs):
        raise ValueError(
            "`as_supervised` and `with_info` must not be given: `image_key` "
            "and `label_key` name what is read. Received: "
            f"{', '.join(sorted(kwargs))}"
        )
    if image_size is not None:
        check_positive_integer("image_size", image_size)
        pillow()  # if it is missing, say so now
    index, count = as_shard(shard)
    if count > 1:
        _check_not_shared_out((index, count))
    tf, tfds = _tensorflow()
    if count > 1:
        split = tfds.even_splits(split, n=count, drop_remainder=True)[index]
    dataset = tfds.load(
        name,
        split=split,
        shuffle_files=shuffle,
        read_config=tfds.ReadConfig(shuffle_seed=seed),
        **kwargs,
    )
    keys = [image_key, label_key] if labels else [image_key]
    shape = _image_shape(dataset.element_spec, keys, image_size)

    def resize(image):
        def center(pixels):
            return center_square(pixels, shape[0])

        if image.shape != shape:
            image = tf.numpy_function(center, [image], tf.uint8, stateful=False)
        return tf.ensure_shape(image, shape)

    def example(features):
        image = resize(features[image_key])
        label = [tf.cast(features[key], "int32") for key in keys[1:]]
        return (image, *label)

    def mirror(batch, number):
        image, *label = batch
        image = tf.cond(number % 2 == 0, lambda: image[:, ::-1], lambda: image)
        return (image, *label)

    def in_range(images, *label):
        images = tf.cast(images, "float32") / 127.5 - 1.0
        return (images, *label) if label else images

    dataset = dataset.map(example, tf.data.AUTOTUNE)
    if cache:
        dataset = dataset.cache(cache if isinstance(cache, str) else "")
    if shuffle:
        dataset = dataset.shuffle(shuffle_buffer, seed)
    if repeat:
        dataset = dataset.repeat()
    if flip:
        # Numbers from a stream: drawn in parallel, they would not be the same
        # ones for a seed.
        numbers = tf.data.Dataset.random(seed, rerandomize_each_iteration=True)
        dataset = tf.data.Dataset.zip(dataset, numbers)
        dataset = dataset.map(mirror, tf.data.AUTOTUNE)
    dataset = dataset.batch(batch_size, drop_remainder)
    if count > 1:  # TensorFlow's workers are not to take a part of the part
        options = tf.data.Options()
        off = tf.data.experimental.AutoShardPolicy.OFF
        options.experimental_distribute.auto_shard_policy = off
        dataset = dataset.with_options(options)
    return dataset.map(in_range, tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def _check_not_shared_out(shard: tuple[int, int]) -> None:
    """Raises if Keras would give each process a part of its part."""
    distribution = keras.distribution.distribution()
    processes = getattr(distribution, "num_processes", 1)
    if processes > 1 and distribution.auto_shard_dataset:
        raise ValueError(
            "`shard` must be (0, 1) where Keras shares out the batches; for "
            "each process to read a part only, set `distribution."
            f"auto_shard_dataset = False`. Received: shard={shard}"
        )


def _tensorflow() -> tuple[Any, Any]:
    try:
        import tensorflow as tf
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            "`from_tfds` needs TensorFlow Datasets and TensorFlow. Install "
            'them: pip install "keras-mscm[tfds,tensorflow]"'
        ) from error
    if keras.backend.backend() != "tensorflow":
        # It would take all of a GPU's memory, only to read files. If it runs
        # already (the error), it has what it has.
        with contextlib.suppress(RuntimeError):
            tf.config.set_visible_devices([], "GPU")
    return tf, tfds


def _image_shape(
    spec: Any, keys: list[str], image_size: int | None
) -> tuple[int, int, int]:
    """Shape of the images to come; raises unless the features are usable."""
    if not isinstance(spec, dict) or not set(keys) <= set(spec):
        raise ValueError(
            "`image_key` and `label_key` must be features of the data set. "
            f"Received: {keys}; it has {list(spec)}"
        )
    image = spec[keys[0]]
    good = image.dtype.name == "uint8" and len(image.shape) == 3
    if not good or image.shape[2] not in (1, 3):
        raise ValueError(
            "`image_key` must be a feature of uint8 images, (height, width, 1 "
            f"or 3). Received: {keys[0]!r}, {image.dtype.name} of shape "
            f"{tuple(image.shape)}"
        )
    for key in keys[1:]:
        if not spec[key].dtype.is_integer or len(spec[key].shape) != 0:
            raise ValueError(
                "`label_key` must be a feature of one integer. Received: "
                f"{key!r}, {spec[key].dtype.name} of shape "
                f"{tuple(spec[key].shape)}"
            )
    if image_size is not None:
        return (image_size, image_size, image.shape[2])
    if None in tuple(image.shape):
        raise ValueError(
            "`image_size` must be given: the images are of different sizes. "
            f"Received: None, images of shape {tuple(image.shape)}"
        )
    return tuple(image.shape)
