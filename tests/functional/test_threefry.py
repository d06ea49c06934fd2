"""Random numbers by Threefry, against what its authors published."""

import numpy as np
import pytest
from keras import ops
from scipy import stats

from keras_mscm import functional as F


def words(*numbers):
    return tuple(np.uint32(numbers).astype("int32"))


# From the file kat_vectors of Random123, the authors' own code: threefry2x32
# of 20 rounds; counter, key, result.
@pytest.mark.parametrize(
    ("counter", "key", "result"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        (
            (0xFFFFFFFF, 0xFFFFFFFF),
            (0xFFFFFFFF, 0xFFFFFFFF),
            (0x1CB996FC, 0xBB002BE7),
        ),
        (
            (0x243F6A88, 0x85A308D3),
            (0x13198A2E, 0x03707344),
            (0xC4923A9C, 0x483DF7A0),
        ),
    ],
)
def test_known_answers(counter, key, result):
    got = F.threefry_2x32(words(*key), words(*counter))
    got = [int(ops.convert_to_numpy(word)) % 2**32 for word in got]
    assert got == list(result)


def normal(seed, number, draw=0, shape=(5, 5, 3)):
    return ops.convert_to_numpy(F.normal(seed, number, draw, shape))


def test_the_numbers_are_normal():
    numbers = normal(7, np.arange(400), shape=(50, 25)).ravel()
    assert numbers.dtype == "float32"
    assert stats.kstest(numbers, "norm").pvalue > 0.01
    # Nor do neighbours, images or the two of a pair know of each other.
    images = numbers.reshape(400, -1)
    for one, other in (
        (images[:, 1:], images[:, :-1]),
        (images[1:], images[:-1]),
        (images[:, :625], images[:, 625:]),
        (images[:, :625] ** 2, images[:, 625:] ** 2),
    ):
        correlation = np.corrcoef(one.ravel(), other.ravel())[0, 1]
        assert abs(correlation) < 4 / np.sqrt(one.size)


def test_an_images_numbers_are_its_own():
    together = normal(3, np.arange(6))
    assert together.shape == (6, 5, 5, 3)
    np.testing.assert_array_equal(normal(3, np.int32([4, 1])), together[[4, 1]])
    # A smaller image of the same number has other places, none has another's.
    different = [*together, normal(3, [0], 1)[0], normal(4, [0])[0]]
    for i, one in enumerate(different):
        for other in different[:i]:
            assert np.abs(one - other).max() > 1


def test_odd_and_empty_shapes():
    assert normal(1, np.arange(2), shape=(3,)).shape == (2, 3)
    assert normal(1, np.arange(2), shape=()).shape == (2,)


@pytest.mark.parametrize("bad", [None, 4, "44", (4, 0), (4, 2.0), (True,)])
def test_what_is_no_shape_is_refused(bad):
    with pytest.raises(ValueError, match=r"`shape` must be .*Received: "):
        F.normal(1, ops.arange(2), 0, bad)
