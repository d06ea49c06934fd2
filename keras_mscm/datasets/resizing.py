"""How every loader makes an image square; Pillow does the work."""

from typing import Any

import numpy as np

from keras_mscm.checks import check_positive_integer


def pillow() -> Any:
    """Pillow's module `PIL.Image`, imported when it is first needed.

    Raises:
        ImportError: If Pillow isn't installed; says how to install it.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "Reading, drawing and resizing images need Pillow. Install it: "
            'pip install "keras-mscm[images]"'
        ) from error
    return Image


def check_image_size(name: str, size: Any) -> int:
    """Raises unless `size` is a number of pixels, 1..65,535 as in a JPEG."""
    return check_positive_integer(name, size, 2**16 - 1)


def center_square(image: np.ndarray, size: int) -> np.ndarray:
    """The central square of an image at `size` by `size` pixels.

    As ADM makes its ImageNet sets (Dhariwal & Nichol, 2021): halve with a box
    filter while the shorter side is at least twice `size`, bring that side to
    `size` with Pillow's bicubic filter (antialiased), cut out the middle.
    Smaller images are enlarged by the bicubic filter alone.

    Args:
        image: uint8, `(height, width, channels)`, 1 or 3 channels.
        size: Pixels of a side, at least 1.

    Returns:
        uint8, `(size, size, channels)`.
    """
    Image = pillow()
    picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    while min(picture.size) >= 2 * size:
        halves = tuple(pixels // 2 for pixels in picture.size)
        picture = picture.resize(halves, Image.Resampling.BOX)
    scale = size / min(picture.size)
    scaled = tuple(round(pixels * scale) for pixels in picture.size)
    picture = picture.resize(scaled, Image.Resampling.BICUBIC)
    left, top = ((pixels - size) // 2 for pixels in scaled)
    picture = picture.crop((left, top, left + size, top + size))
    return np.asarray(picture).reshape(size, size, image.shape[2])
