"""The square every loader makes, against closed forms."""

import sys

import numpy as np
import pytest

from keras_mscm.datasets.resizing import center_square, check_image_size


def halved(image):
    """Means of 2x2 pixels, first of rows and then of columns, as bytes."""
    image = image.astype("float64")
    for _ in range(2):
        image = np.floor((image[:, ::2] + image[:, 1::2]) / 2 + 0.5)
        image = image.swapaxes(0, 1)
    return image.astype("uint8")


@pytest.mark.parametrize("channels", [1, 3])
def test_halves_with_a_box(pictures, channels):
    image = pictures(1, 32, 32, channels)[0]
    np.testing.assert_array_equal(
        center_square(image, 8), halved(halved(image))
    )


@pytest.mark.parametrize("shape", [(8, 14), (14, 8), (8, 13)])
def test_cuts_out_the_middle(pictures, shape):
    image = pictures(1, *shape)[0]
    top, left = ((pixels - 8) // 2 for pixels in shape)
    np.testing.assert_array_equal(
        center_square(image, 8), image[top : top + 8, left : left + 8]
    )


@pytest.mark.parametrize("size", [12, 30])
def test_keeps_a_ramp_a_ramp(size):
    # Cubic filters reproduce straight lines, away from the borders.
    ramp = 40.0 + 8 * np.arange(20)
    image = np.broadcast_to(ramp[:, None, None], (20, 20, 1)).astype("uint8")
    found = center_square(image, size)[..., 0].astype("float64")
    centers = (np.arange(size) + 0.5) * 20 / size - 0.5
    inner = slice(size // 4, -size // 4)
    np.testing.assert_allclose(
        found[inner].T, [(40 + 8 * centers)[inner]] * size, atol=1.01
    )


def test_fine_stripes_become_grey():
    # Without antialiasing, stripes of one pixel come out black or white.
    image = np.zeros((60, 60, 3), "uint8")
    image[:, ::2] = 255
    found = center_square(image, 16)[2:-2, 2:-2]
    assert np.abs(found - 127.5).max() < 40


@pytest.mark.parametrize("size", [0, 2**16, 8.0, True, "8", None])
def test_what_is_no_size_of_an_image(size):
    allowed = "an integer of at least 1"
    if size == 2**16:
        allowed += " and at most 65535"
    with pytest.raises(ValueError, match=f"`image_size` must be {allowed}"):
        check_image_size("image_size", size)
    assert check_image_size("image_size", np.int64(2**16 - 1)) == 2**16 - 1


def test_says_how_to_install_pillow(pictures, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(
        ImportError, match=r'pip install "keras-mscm\[images\]"'
    ):
        center_square(pictures(1, 8, 8)[0], 4)
