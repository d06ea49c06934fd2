"""The data sets of TensorFlow Datasets, through `tf.data`.

TensorFlow reads the files here, on whatever backend Keras trains.
"""

import contextlib
import inspect
import os
from typing import Any

import keras

from keras_mscm.checks import (
    check_boolean,
    check_path,
    check_positive_integer,
    check_seed,
    check_string,
    invalid,
)
from keras_mscm.datasets.indexed_batches import as_shard
from keras_mscm.datasets.resizing import center_square, check_image_size, pillow

# Arguments of TFDS that are set here, and the ones here that say so.
OURS = {
    "as_supervised": "image_key",
    "batch_size": "batch_size",
    "shuffle_files": "shuffle",
    "split": "split",
    "with_info": "image_key",
}


def from_tfds(
    name: Any,
    split: Any = "train",
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
    cache: bool | str | os.PathLike = False,
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
            `"imagenet2012"`; or a builder that is prepared, such as
            `tfds.builder_from_directory` gives, or a
            `tfds.folder_dataset.ImageFolder`.
        split: Its part, such as `"train"`, `"test"` or `"train[:90%]"`; or a
            `tfds.core.ReadInstruction`.
        batch_size: Images per batch.
        image_size: Pixels of a side. None leaves the images as they are; they
            must then be of one size.
        labels: Whether to give labels.
        shuffle: Whether to shuffle files and images, anew in each epoch.
        shuffle_buffer: Images to draw the next one from. Images 64 wide take
            12 KB each. All there is of an `ImageFolder`'s order.
        seed: Seed of the order and the flips, 0..2**31 - 3. None draws new
            ones.
        flip: Whether to mirror each image, left to right, with probability 1/2.
        repeat: Whether to go on for ever; `fit` then needs `steps_per_epoch`.
        drop_remainder: Whether to leave out a last, smaller batch. One that is
            kept costs `fit` one more trace.
        cache: Whether to keep the resized images in memory; or a file to keep
            them in, another one for each data set, split and `image_size`.
        image_key: The feature that is the image: uint8, 1 or 3 channels.
        label_key: The feature that is the label.
        shard: Which part of the split to give, and of how many parts: `(index,
            count)`, index from 0. Parts are of one size, and no two share an
            image; a part's files are all that is read. None gives each of JAX's
            processes a part of its own, all of it where there is one process.
        **kwargs: As for `tfds.load`: `data_dir`, `download`, `decoders`,
            `read_config`, ...; of these a builder takes the last two.

    Returns:
        A `tf.data.Dataset` of float32 images in [-1, 1], and int32 labels
        unless `labels=False`.

    Raises:
        ValueError: If the data set has no such features, isn't prepared, or
            can't be read in parts; if an argument is out of its range, or Keras
            would share out a part once more.
        TypeError: If `tfds.load` has no such keyword.
        ImportError: If TensorFlow Datasets, TensorFlow or Pillow isn't
            installed.

    Example:

    >>> # dataset = from_tfds(
    >>> #     "imagenet2012", image_size=64, batch_size=256, repeat=True
    >>> # )
    >>> # model.fit(dataset, epochs=100, steps_per_epoch=1000)
    """
    batch_size = check_positive_integer("batch_size", batch_size)
    shuffle_buffer = check_positive_integer("shuffle_buffer", shuffle_buffer)
    seed = check_seed("seed", seed)
    labels = check_boolean("labels", labels)
    shuffle = check_boolean("shuffle", shuffle)
    flip, repeat = check_boolean("flip", flip), check_boolean("repeat", repeat)
    drop_remainder = check_boolean("drop_remainder", drop_remainder)
    image_key = check_string("image_key", image_key)
    label_key = check_string("label_key", label_key)
    if isinstance(cache, (str, os.PathLike)):
        cache = os.fspath(check_path("cache", cache))
    else:
        try:
            cache = check_boolean("cache", cache)
        except ValueError:
            allowed = "True, False or the path of a file"
            raise invalid("cache", allowed, cache) from None
    if image_size is not None:
        image_size = check_image_size("image_size", image_size)
        pillow()  # because a missing Pillow is to be reported now
    shard = as_shard("shard", shard)
    if shard[1] > 1:
        _check_not_shared_out(shard)
    tf, tfds = _tensorflow()
    dataset = _dataset(tfds, name, split, shard, shuffle, seed, kwargs)
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

    def in_shape(image, *label):
        return (tf.ensure_shape(image, shape), *label)

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
        # The shape is set again, because a cache may hold another size.
        dataset = dataset.map(in_shape)
    if shuffle:
        dataset = dataset.shuffle(shuffle_buffer, seed)
    if repeat:
        dataset = dataset.repeat()
    if flip:
        # The numbers come from a stream, because numbers that are drawn in the
        # parallel `map` would differ from run to run.
        numbers = tf.data.Dataset.random(seed, rerandomize_each_iteration=True)
        dataset = tf.data.Dataset.zip(dataset, numbers)
        dataset = dataset.map(mirror, tf.data.AUTOTUNE)
    dataset = dataset.batch(batch_size, drop_remainder)
    if shard[1] > 1:  # because TensorFlow's workers would shard the part again
        options = tf.data.Options()
        off = tf.data.experimental.AutoShardPolicy.OFF
        options.experimental_distribute.auto_shard_policy = off
        dataset = dataset.with_options(options)
    return dataset.map(in_range, tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def _dataset(
    tfds: Any,
    name: Any,
    split: Any,
    shard: tuple[int, int],
    shuffle: bool,
    seed: int | None,
    kwargs: dict[str, Any],
) -> Any:
    """TFDS' own `tf.data.Dataset` of a name or builder, one part of it."""
    builder = isinstance(name, tfds.core.DatasetBuilder)
    if not builder and not (isinstance(name, str) and name):
        raise invalid("name", "the name of a data set, or a builder", name)
    if not isinstance(split, tfds.core.splits.AbstractSplit) and not (
        isinstance(split, str) and split
    ):
        raise invalid("split", "a string such as 'train[:90%]'", split)
    kwargs, read_config = _reading(tfds, builder, kwargs)
    if seed is not None:
        if read_config.shuffle_seed not in (None, seed):
            raise ValueError(
                "`seed` must be None where `read_config` has a shuffle_seed. "
                f"Received: seed={seed}, shuffle_seed="
                f"{read_config.shuffle_seed}"
            )
        read_config = read_config.replace(shuffle_seed=seed)
    files = tfds.core.dataset_builder.FileReaderBuilder
    if builder and not isinstance(name, files):
        # Files are not shuffled, because these builders do it by a seed that
        # can't be set, and only once where they keep the files in memory.
        shuffle = False
        if shard[1] > 1:
            raise ValueError(
                "`shard` must be (0, 1) for a builder that can't read a part "
                "of a split, or use `from_folder`. Received: shard="
                f"{shard}, name={type(name).__name__}"
            )
    if shard[1] > 1:
        parts = tfds.even_splits(split, n=shard[1], drop_remainder=True)
        split = parts[shard[0]]
    options = {
        "split": split,
        "shuffle_files": shuffle,
        "read_config": read_config,
        **kwargs,
    }
    try:
        if builder:
            return name.as_dataset(**options)
        return tfds.load(name, **options)
    except AssertionError as error:  # which TFDS raises if it isn't prepared
        raise ValueError(
            "`name` must be of a data set that is prepared: call its builder's "
            "`download_and_prepare()`, or give a name and download=True. "
            f"Received: name={str(name)!r}. TFDS: {error}"
        ) from error


def _reading(
    tfds: Any, builder: bool, kwargs: dict[str, Any]
) -> tuple[dict[str, Any], Any]:
    """Keyword arguments for TFDS, and apart from them the `read_config`."""
    known = inspect.signature(tfds.load).parameters
    for key in kwargs:
        if key not in known:
            raise TypeError(
                f"from_tfds() got an unexpected keyword argument {key!r}, "
                "which `tfds.load` doesn't have either"
            )
    inner = kwargs.get("as_dataset_kwargs")
    inner = {} if inner is None else inner
    kwargs = {k: v for k, v in kwargs.items() if k != "as_dataset_kwargs"}
    if not isinstance(inner, dict):
        raise invalid("as_dataset_kwargs", "a dictionary", inner)
    kwargs = {**kwargs, **inner}
    for key, value in kwargs.items():
        if key in OURS:
            raise ValueError(
                f"`{key}` must not be given: `{OURS[key]}` says what is read. "
                f"Received: {key}={value!r}"
            )
        if builder and key not in ("decoders", "read_config"):
            raise ValueError(
                f"`{key}` must not be given with a builder, which has its own. "
                f"Received: {key}={value!r}"
            )
    read_config = kwargs.pop("read_config", None)
    if read_config is None:
        read_config = tfds.ReadConfig()
    if not isinstance(read_config, tfds.ReadConfig):
        raise invalid("read_config", "a `tfds.ReadConfig`", read_config)
    return kwargs, read_config


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
        # GPUs are hidden from TensorFlow, because it would take all of their
        # memory only to read files. The error, that it runs already, is passed
        # over because nothing can be changed then.
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
    # It may have no shape, because a feature may be made of others.
    rank = getattr(getattr(image, "shape", None), "rank", None)
    good = rank == 3 and image.dtype.name == "uint8"
    if not good or image.shape[2] not in (1, 3):
        raise ValueError(
            "`image_key` must be a feature of uint8 images, (height, width, 1 "
            f"or 3). Received: {keys[0]!r}, {image}"
        )
    for key in keys[1:]:
        rank = getattr(getattr(spec[key], "shape", None), "rank", None)
        if rank != 0 or not spec[key].dtype.is_integer:
            raise ValueError(
                "`label_key` must be a feature of one integer. Received: "
                f"{key!r}, {spec[key]}"
            )
    if image_size is not None:
        return (image_size, image_size, image.shape[2])
    if None in tuple(image.shape):
        raise ValueError(
            "`image_size` must be given: the images are of different sizes. "
            f"Received: None, images of shape {tuple(image.shape)}"
        )
    return tuple(image.shape)
