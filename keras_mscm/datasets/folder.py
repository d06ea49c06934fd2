"""Images in a folder, read when their batch is due."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from keras_mscm.checks import check_positive_integer
from keras_mscm.datasets.image_batches import ImageBatches
from keras_mscm.datasets.resizing import center_square, pillow

EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp"}


def from_folder(
    directory: str | os.PathLike,
    *,
    image_size: int,
    batch_size: int,
    labels: bool = True,
    channels: int = 3,
    workers: int = 4,
    **kwargs: Any,
) -> ImageBatches:
    """Batches of the images in a folder; needs no TensorFlow.

    Pillow reads the files when their batch is due. (Keras'
    `image_dataset_from_directory` needs TensorFlow or Grain, and has neither
    an antialiased resize nor an order by epoch.)

    Images are made square as ADM makes its ImageNet sets (Dhariwal & Nichol,
    2021): the shorter side is halved with a box filter as long as that leaves
    `image_size`, then resized with a bicubic one; the middle is cut out.
    Smaller images are enlarged. Before that a camera's rotation (EXIF) is
    undone, and transparent parts become white.

    Args:
        directory: Folder with a subfolder per class, in the order of their
            names; or, with `labels=False`, with images wherever in it.
            BMP, GIF (its first picture), JPEG, PNG and WebP files.
        image_size: Pixels of a side.
        batch_size: Images per batch.
        labels: Whether the subfolders are classes.
        channels: 3 (RGB) or 1 (grey).
        workers: Threads that read a batch.
        **kwargs: `shuffle`, `seed`, `flip`, `repeat`, `drop_remainder` and
            `shard`, as for `ImageBatches`.

    Returns:
        A `PyDataset` of float32 images in [-1, 1], and int32 labels unless
        `labels=False`; it has `class_names`.

    Raises:
        ValueError: If the folder has no images, or no subfolders of images
            where labels are asked for, or an argument is out of its range;
            while training, if a file can't be read or has 16 bits per channel.
        ImportError: If Pillow isn't installed.

    Example:

    >>> # photos/cat/1.jpg, photos/dog/1.jpg, ...
    >>> # dataset = from_folder("photos", image_size=64, batch_size=32)
    >>> # dataset.class_names
    >>> # model.fit(dataset, epochs=10)
    """
    for name, value in (("image_size", image_size), ("workers", workers)):
        check_positive_integer(name, value)
    if channels not in (1, 3):
        raise ValueError(
            "`channels` must be 1 (grey) or 3 (RGB). Received: "
            f"channels={channels!r}"
        )
    pillow()  # if it is missing, say so now
    directory = Path(directory)
    paths = [p for p in directory.rglob("*") if p.suffix.lower() in EXTENSIONS]
    paths = sorted(paths)
    class_of = [path.relative_to(directory).parts[0] for path in paths]
    class_names = sorted(set(class_of)) if labels else None
    if not paths or (labels and any(p.parent == directory for p in paths)):
        raise ValueError(
            "`directory` must be a folder of images "
            + ("in subfolders, one per class" if labels else "")
            + f" ({', '.join(sorted(EXTENSIONS))}). Received: {directory} with "
            f"{len(paths)} images"
            + (", some outside of subfolders" if paths else "")
        )

    def load(index):
        return _load(paths[index], image_size, channels)

    def read(indices):
        with ThreadPoolExecutor(workers) as pool:
            return np.stack([*pool.map(load, indices)])

    return ImageBatches(
        read,
        len(paths),
        # Numbers in the order of `class_names`.
        np.unique(class_of, return_inverse=True)[1] if labels else None,
        batch_size=batch_size,
        class_names=class_names,
        **kwargs,
    )


def _load(path: Path, image_size: int, channels: int) -> np.ndarray:
    Image = pillow()
    from PIL import ImageOps

    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
    except (OSError, SyntaxError) as error:  # what Pillow raises
        raise ValueError(
            f"`directory` has an image that can't be read. Received: {path}"
        ) from error
    if picture.mode.startswith(("I", "F")):  # Pillow would clip it to 0..255
        raise ValueError(
            "`directory` must have images of 8 bits per channel. Received: "
            f"{path} of Pillow's mode {picture.mode}"
        )
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture)
    pixels = np.asarray(picture.convert("RGB" if channels == 3 else "L"))
    return center_square(
        pixels.reshape(*pixels.shape[:2], channels), image_size
    )
