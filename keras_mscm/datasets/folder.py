"""Images in a folder, read when their batch is due."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from keras_mscm.checks import (
    check_boolean,
    check_integer,
    check_path,
    check_positive_integer,
    check_sequence,
    check_string,
    invalid,
)
from keras_mscm.datasets.image_batches import ImageBatches
from keras_mscm.datasets.indexed_batches import check_options
from keras_mscm.datasets.resizing import center_square, check_image_size, pillow

EXTENSIONS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp"}

# Names that systems put beside a user's files: macOS' archives, Synology's
# thumbnails, the bins of Windows and Linux. Names that begin with a dot are
# left out too.
SYSTEM_NAMES = {
    "$RECYCLE.BIN",
    "@eaDir",
    "System Volume Information",
    "__MACOSX",
    "lost+found",
}


def from_folder(
    directory: str | os.PathLike,
    *,
    image_size: int,
    batch_size: int,
    labels: bool = True,
    channels: int = 3,
    workers: int = 4,
    class_names: list[str] | None = None,
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
    undone, and transparent parts become white. Of an animation the first
    picture is taken. Palettes, grey, black and white, and CMYK become RGB.

    Names that begin with a dot are left out, wherever they are, as are those
    that systems make (`SYSTEM_NAMES`, such as `__MACOSX`) and files of other
    extensions; links are followed. Names and links are looked at here, and what
    is wrong with them is said at once. A file is opened when its batch is due:
    to open a million before would take minutes.

    Args:
        directory: Folder with a subfolder per class, in the order of their
            names; or, with `labels=False`, with images wherever in it.
            BMP, GIF, JPEG, PNG and WebP files, in subfolders of any depth.
        image_size: Pixels of a side.
        batch_size: Images per batch.
        labels: Whether the subfolders are classes.
        channels: 3 (RGB) or 1 (grey).
        workers: Threads that read a batch.
        class_names: The subfolders that are classes, in the order of their
            labels; others are left out, and one of these may have no images.
            None takes all of them, each of which must have images, because the
            labels of two folders (for training and for tests) would else
            differ.
        **kwargs: `shuffle`, `seed`, `flip`, `repeat`, `drop_remainder` and
            `shard`, as for `ImageBatches`.

    Returns:
        A `PyDataset` of float32 images in [-1, 1], and int32 labels unless
        `labels=False`; it has `class_names`.

    Raises:
        ValueError: If the folder has no images, or no subfolders of images
            where labels are asked for, a link leads nowhere or in a circle, or
            an argument is out of its range; while training, if a file can't be
            read, is larger than Pillow allows or has more than 8 bits per
            channel. Each names the file.
        ImportError: If Pillow isn't installed.

    Example:

    >>> # photos/cat/1.jpg, photos/dog/1.jpg, ...
    >>> # dataset = from_folder("photos", image_size=64, batch_size=32)
    >>> # dataset.class_names
    >>> # model.fit(dataset, epochs=10)
    """
    check_options("from_folder", {"batch_size": batch_size, **kwargs})
    directory = check_path("directory", directory)
    image_size = check_image_size("image_size", image_size)
    workers = check_positive_integer("workers", workers)
    if check_integer("channels", channels, 1) not in (1, 3):
        raise invalid("channels", "1 (grey) or 3 (RGB)", channels)
    pillow()  # because a missing Pillow is to be reported now
    if check_boolean("labels", labels):
        classes = _classes(directory, class_names)
        class_names = list(classes)
    elif class_names is not None:
        raise invalid("class_names", "None with labels=False", class_names)
    else:
        classes = {"": _images_in(directory)}
    found = sorted(
        (path, number)
        for number, paths in enumerate(classes.values())
        for path in paths
    )
    if not found:
        raise ValueError(
            "`directory` must be a folder of images "
            + ("in subfolders, one per class " if labels else "")
            + f"({', '.join(sorted(EXTENSIONS))}). Received: "
            f"{str(directory)!r} with 0 images"
        )

    def load(index):
        return _load(found[index][0], image_size, channels)

    def read(indices):
        with ThreadPoolExecutor(workers) as pool:
            return np.stack([*pool.map(load, indices)])

    return ImageBatches(
        read,
        len(found),
        [number for _, number in found] if labels else None,
        batch_size=batch_size,
        class_names=class_names,
        **kwargs,
    )


def _classes(directory: Path, chosen: Any) -> dict[str, list[Path]]:
    """The images of each class, in the order of labels."""
    images, folders = _entries(directory)
    names = sorted(folder.name for folder in folders)
    if chosen is not None:
        allowed = "a list of names of subfolders, each once, or None"
        try:
            names_chosen = [
                check_string("class_names", name)
                for name in check_sequence("class_names", chosen, allowed)
            ]
        except ValueError:
            raise invalid("class_names", allowed, chosen) from None
        missing = sorted(set(names_chosen) - set(names))
        if missing or len(set(names_chosen)) < len(names_chosen):
            raise ValueError(
                f"`class_names` must be {allowed}. Received: {names_chosen}"
                + (f"; there is no {missing[0]!r}" if missing else "")
            )
        names = names_chosen
    if images:
        raise ValueError(
            "`directory` must be a folder of images in subfolders, one per "
            f"class, or come with labels=False. Received: {str(directory)!r} "
            f"with {len(images)} images outside of subfolders, the first "
            f"{images[0].name!r}"
        )
    classes = {name: _images_in(directory / name, directory) for name in names}
    empty = [name for name in names if not classes[name]]
    if empty and chosen is None and len(empty) < len(names):
        raise ValueError(
            "`directory` must have images in every subfolder, since a class "
            "without them would shift the labels of others. Received: "
            f"{str(directory / empty[0])!r} with 0 images. Take it away, or "
            "say which are classes: `class_names`"
        )
    return classes


def _images_in(folder: Path, *above: Path) -> list[Path]:
    """Images in a folder and below; raises for a circle of links."""
    images, folders = _entries(folder)
    if folder.is_symlink() and any(folder.samefile(path) for path in above):
        raise ValueError(
            "`directory` must not have links that lead back to a folder above "
            f"them. Received: {str(folder)!r}, which leads to "
            f"{os.path.realpath(folder)!r}"
        )
    for inner in folders:
        images += _images_in(inner, *above, folder)
    return images


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """Images and folders in a folder, but for those that systems make."""
    images, folders = [], []
    try:
        with os.scandir(folder) as scanned:
            entries = sorted(scanned, key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(
            "`directory` must be a folder that can be read. Received: "
            f"{str(folder)!r} ({error.strerror})"
        ) from error
    for entry in entries:
        if entry.name.startswith(".") or entry.name in SYSTEM_NAMES:
            continue
        path = folder / entry.name
        image = path.suffix.lower() in EXTENSIONS
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:  # a link to itself, or to where one may not look
            is_folder = is_file = False
        if is_folder:
            folders.append(path)
        elif is_file and image:
            images.append(path)
        elif not is_file and (image or entry.is_symlink()):
            what = "a link that leads nowhere" if entry.is_symlink() else "none"
            raise ValueError(
                "`directory` must be of files, folders and links to them. "
                f"Received: {str(path)!r}, {what}"
            )
    return images, folders


def _load(path: Path, image_size: int, channels: int) -> np.ndarray:
    Image = pillow()
    try:
        return center_square(_pixels(path, channels), image_size)
    except Exception as error:  # because Pillow raises many kinds
        reason = str(error).rstrip(".") or type(error).__name__
        bombs = Image.DecompressionBombError, Image.DecompressionBombWarning
        if isinstance(error, bombs):
            reason += "; `PIL.Image.MAX_IMAGE_PIXELS` sets that limit"
        raise ValueError(
            "`directory` has an image that can't be read. Received: "
            f"{str(path)!r} ({reason})"
        ) from error


def _pixels(path: Path, channels: int) -> np.ndarray:
    Image = pillow()
    from PIL import ImageOps

    with Image.open(path) as file:
        # Such files are refused, because Pillow clips its modes I and F to
        # 0..255, and drops 8 of 16 bits per channel. Its `tile` says how the
        # bits lie. BMP is let through, because its 16 bits are per pixel.
        wide = file.format != "BMP" and ";16" in str(getattr(file, "tile", ""))
        if wide or file.mode.startswith(("I", "F")):
            raise ValueError(
                "it must be of 8 bits per channel, and Pillow's mode is "
                f"{file.mode}, of {'16' if wide else 'more'}"
            )
        limit = Image.MAX_IMAGE_PIXELS or file.width * file.height
        if file.width * file.height > limit:
            # Because Pillow's own warning doesn't name the file.
            warnings.warn(
                f"{str(path)!r} has {file.width}x{file.height} pixels, more "
                f"than the {limit} of `PIL.Image.MAX_IMAGE_PIXELS`",
                Image.DecompressionBombWarning,
                stacklevel=2,
            )
        picture = ImageOps.exif_transpose(file).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture)
    pixels = np.asarray(picture.convert("RGB" if channels == 3 else "L"))
    return pixels.reshape(*pixels.shape[:2], channels)
