"""Images that are in memory."""

from typing import Any

import numpy as np

from keras_mscm.checks import check_images, check_positive_integer
from keras_mscm.datasets.image_batches import ImageBatches
from keras_mscm.datasets.resizing import center_square


def from_arrays(
    images: Any,
    labels: Any = None,
    *,
    batch_size: int,
    image_size: int | None = None,
    **kwargs: Any,
) -> ImageBatches:
    """Batches of images that are in memory; needs no TensorFlow.

    uint8 images stay as they are in memory, a quarter of what floats take, and
    become floats batch by batch.

    Args:
        images: uint8 0..255, or floats in [-1, 1]; `(num, height, width,
            channels)`, or `(num, height, width)` of one channel.
        labels: An integer per image, or None for batches of `images` alone.
        batch_size: Images per batch.
        image_size: Pixels of a side; uint8 images are cropped and resized to
            it at once, by the rule of `from_folder`. None leaves them.
        **kwargs: `shuffle`, `seed`, `flip`, `repeat`, `drop_remainder`,
            `class_names` and `shard`, as for `ImageBatches`.

    Returns:
        A `PyDataset` of float32 images in [-1, 1], and int32 labels.

    Raises:
        ValueError: If the images are of another type or range, or an argument
            is out of its range.
        ImportError: If `image_size` is given and Pillow isn't installed.

    Example:

    >>> import numpy as np
    >>> images = np.full((10, 8, 8, 3), 255, "uint8")
    >>> dataset = from_arrays(images, np.arange(10), batch_size=5, seed=0)
    >>> batch, labels = dataset[0]
    >>> batch.shape, batch.dtype, float(batch.max()), labels.dtype
    ((5, 8, 8, 3), dtype('float32'), 1.0, dtype('int32'))
    """
    images = np.asarray(images)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(
            "`images` must have shape (num, height, width, channels) or (num, "
            f"height, width). Received: shape {images.shape}"
        )
    if images.dtype != np.uint8:
        _check_floats(images)
    if image_size is not None:
        check_positive_integer("image_size", image_size)
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


def _check_floats(images: np.ndarray) -> None:
    check_images("images", images, images.shape[1:])
    if images.min() >= 0:
        # All in [0, 1] would pass as [-1, 1], and train on pale pictures.
        raise ValueError(
            "`images` must be uint8 0..255 or floats in [-1, 1]; floats of "
            "which none is below 0 look like [0, 1], which become [-1, 1] by "
            f"`images * 2 - 1`. Received: dtype {images.dtype} from "
            f"{images.min():g} to {images.max():g}"
        )
