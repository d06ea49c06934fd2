"""Images that are in memory."""

from typing import Any

import numpy as np

from keras_mscm.checks import (
    check_boolean,
    check_images,
    check_signed,
    describe,
)
from keras_mscm.datasets.image_batches import ImageBatches, is_float
from keras_mscm.datasets.indexed_batches import as_array, check_options
from keras_mscm.datasets.resizing import center_square, check_image_size


def from_arrays(
    images: Any,
    labels: Any = None,
    *,
    batch_size: int,
    image_size: int | None = None,
    nonnegative: bool = False,
    **kwargs: Any,
) -> ImageBatches:
    """Batches of images that are in memory; needs no TensorFlow.

    uint8 images stay as they are in memory, a quarter of what floats take, and
    become floats batch by batch.

    Args:
        images: uint8 0..255, or floats in [-1, 1]; `(num, height, width,
            channels)`, or `(num, height, width)` of one channel.
        labels: An integer from 0 per image, or None for batches of `images`
            alone.
        batch_size: Images per batch.
        image_size: Pixels of a side; uint8 images are cropped and resized to
            it at once, by the rule of `from_folder`. None leaves them.
        nonnegative: Whether it is meant that no image goes below 0. Else floats
            of which none does are refused, because they look like [0, 1]; all
            of 0 are not. uint8 images always become [-1, 1].
        **kwargs: `shuffle`, `seed`, `flip`, `repeat`, `drop_remainder`,
            `class_names` and `shard`, as for `ImageBatches`.

    Returns:
        A `PyDataset` of float32 images in [-1, 1], and int32 labels.

    Raises:
        ValueError: If the images, all of which are looked at, are of another
            type, range or order of axes, or an argument is out of its range.
        ImportError: If `image_size` is given and Pillow isn't installed.

    Example:

    >>> import numpy as np
    >>> images = np.full((10, 8, 8, 3), 255, "uint8")
    >>> dataset = from_arrays(images, np.arange(10), batch_size=5, seed=0)
    >>> batch, labels = dataset[0]
    >>> batch.shape, batch.dtype, float(batch.max()), labels.dtype
    ((5, 8, 8, 3), dtype('float32'), 1.0, dtype('int32'))
    """
    check_options(
        "from_arrays", {"batch_size": batch_size, **kwargs}, "class_names"
    )
    images = _as_images(images, check_boolean("nonnegative", nonnegative))
    if image_size is not None:
        image_size = check_image_size("image_size", image_size)
        if images.dtype != np.uint8 or images.shape[3] not in (1, 3):
            raise ValueError(
                "`image_size` must be None but for uint8 images of 1 or 3 "
                f"channels. Received: image_size={image_size}, images of dtype "
                f"{images.dtype} and {images.shape[3]} channels"
            )
        images = np.stack(
            [center_square(image, image_size) for image in images]
        )
    return ImageBatches(
        images.__getitem__,
        len(images),
        labels,
        batch_size=batch_size,
        **kwargs,
    )


def _as_images(images: Any, nonnegative: bool) -> np.ndarray:
    """Four axes of uint8 or floats in [-1, 1]; raises unless they are that."""
    allowed = (
        "an array of shape (num, height, width, channels) or (num, height, "
        "width), uint8 0..255 or floats in [-1, 1]"
    )
    images = as_array("images", images, allowed)
    if images.ndim == 3:
        images = images[..., None]
    hint = ""
    if images.ndim == 4:
        _, first, second, last = images.shape
        # Squares are let through, because they may be latents of many channels.
        if first in (1, 3, 4) and last not in range(1, 5) and first != second:
            hint = (
                " Move the channels last: `np.moveaxis(images, 1, -1)`, since "
                f"{first} on axis 1 looks like channels and {last} on the last "
                "doesn't."
            )
    floats = is_float(images)
    if images.dtype.kind in "iu" and images.dtype != np.uint8 and images.size:
        low, high = images.min(), images.max()
        if low >= 0 and high <= 255:
            hint += " These become uint8 by `images.astype('uint8')`."
    elif images.dtype == bool:
        hint += " Black and white become floats by `images * 2.0 - 1`."
    good = images.ndim == 4 and images.size and not hint
    if not good or not (floats or images.dtype == np.uint8):
        raise ValueError(
            f"`images` must be {allowed}.{hint} Received: {describe(images)}"
        )
    if nonnegative and not floats:
        raise ValueError(
            "`nonnegative` must be False of uint8 images, which become "
            "[-1, 1]. Received: nonnegative=True"
        )
    if floats:
        check_images("images", images, images.shape[1:])
        if not nonnegative:
            check_signed("images", images)
    return images
