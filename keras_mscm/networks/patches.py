"""Images as patches, whose pixels are channels, and back."""

from keras import ops

from keras_mscm.functional.process import Tensor


def to_patches(images: Tensor, p: int) -> Tensor:
    """`(b, h, w, c)` to `(b, h / p, w / p, p p c)`."""
    if p == 1:
        return images
    _, h, w, c = images.shape
    x = ops.reshape(images, (-1, h // p, p, w // p, p, c))
    x = ops.transpose(x, (0, 1, 3, 2, 4, 5))
    return ops.reshape(x, (-1, h // p, w // p, p * p * c))


def to_pixels(patches: Tensor, p: int) -> Tensor:
    """The inverse of `to_patches`."""
    if p == 1:
        return patches
    _, h, w, c = patches.shape
    x = ops.reshape(patches, (-1, h, w, p, p, c // p**2))
    x = ops.transpose(x, (0, 1, 3, 2, 4, 5))
    return ops.reshape(x, (-1, h * p, w * p, c // p**2))
