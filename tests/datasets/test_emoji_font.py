"""Emoji as the system's font draws them; errors without that font."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest

from keras_mscm.datasets import emoji, emoji_font, from_arrays

LISTED = """\
# group: Smileys & Emotion
1F600               ; fully-qualified     # \U0001f600 E1.0 grinning face
263A FE0F           ; fully-qualified     # \u263a\ufe0f E0.6 smiling face
263A                ; unqualified         # \u263a E0.6 smiling face
# group: Objects
1F534               ; fully-qualified     # \U0001f534 E0.6 red circle
10FFFD              ; fully-qualified     # \U0010fffd E99 of tomorrow
# group: Flags
1F1FA 1F1F3         ; fully-qualified     # \U0001f1fa E2.0 flag: UN
1F600 200D 1F534    ; fully-qualified     # \U0001f600 E99 red face
"""
needs_font = pytest.mark.skipif(
    not Path(emoji_font.FONT).exists()
    or not Path(emoji_font.EMOJI_TEST).exists(),
    reason="needs Debian's fonts-noto-color-emoji and unicode-data",
)


@pytest.fixture
def listed(tmp_path):
    path = tmp_path / "emoji-test.txt"
    path.write_text(LISTED, encoding="utf-8")
    return path


@needs_font
def test_single_code_points(listed):
    found = emoji(32, emoji_test=listed)
    assert found.captions == ["grinning face", "smiling face", "red circle"]
    assert found.characters == ["\U0001f600", "\u263a\ufe0f", "\U0001f534"]
    assert found.class_names == ["Smileys & Emotion", "Objects", "Flags"]
    assert found.labels.tolist() == [0, 0, 1]
    assert found.images.shape == (3, 32, 32, 3)
    assert found.images.dtype == np.uint8


@needs_font
def test_sequences_that_the_font_has(listed):
    found = emoji(32, emoji_test=listed, sequences=True)
    assert found.captions[3:] == ["flag: UN"]
    assert found.labels.tolist() == [0, 0, 1, 2]


@needs_font
def test_colours(listed):
    white = emoji(64, emoji_test=listed).images[2]
    green = emoji(64, emoji_test=listed, background=(0, 255, 0)).images[2]
    red, *rest = white[32, 32].astype(int)
    assert red > 200 > 100 > max(rest)
    np.testing.assert_array_equal(white[0, 0], [255, 255, 255])
    np.testing.assert_array_equal(green[0, 0], [0, 255, 0])
    np.testing.assert_array_equal(green[32, 32], white[32, 32])
    # A circle is where its middle is, whichever way one looks.
    ink = (white < 250).any(-1)
    rows, columns = np.nonzero(ink)
    np.testing.assert_allclose([rows.mean(), columns.mean()], 31.5, atol=1.5)


@needs_font
def test_all_of_them_and_a_model_that_trains(train, check_batch):
    found = emoji(16)
    assert len(found.images) > 1300
    assert len(found.class_names) == 9
    assert len(set(found.captions)) == len(found.captions)
    # Unicode's two lists of names agree where both are plain.
    grapes = found.captions.index("grapes")
    assert unicodedata.name(found.characters[grapes]) == "GRAPES"
    assert found.class_names[found.labels[grapes]] == "Food & Drink"
    assert found.images.reshape(len(found.images), -1).std(axis=1).min() > 0
    dataset = from_arrays(found.images, found.labels, batch_size=32, flip=True)
    check_batch(dataset[0], (32, 16, 16, 3))
    train(dataset, (16, 16, 3), 9)


def test_says_what_to_install(listed):
    message = "`font` .* apt-get install fonts-noto-color-emoji"
    with pytest.raises(FileNotFoundError, match=message):
        emoji(font="nowhere.ttf")
    message = "`emoji_test` .* apt-get install unicode-data"
    with pytest.raises(FileNotFoundError, match=message):
        emoji(font=listed, emoji_test="nowhere.txt")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"image_size": 0}, "`image_size` must be an integer of at least 1"),
        ({"sequences": "no"}, "`sequences` must be True or False"),
        ({"background": "whitish"}, "`background` must be .*'whitish'"),
        ({"background": "#ffffff80"}, "`background` must be"),
        ({"background": ""}, "`background` must be"),
        ({"background": (300, 0, 0)}, "`background` must be .*300"),
        ({"background": (0.5, 0, 0)}, "`background` must be"),
        ({"background": (0, 0)}, "`background` must be"),
        ({"background": 5}, "`background` must be"),
        ({"font": None}, "`font` must be a path"),
        ({"emoji_test": b"list"}, "`emoji_test` must be a path"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        emoji(**kwargs)


def test_a_file_that_is_no_font(listed):
    with pytest.raises(ValueError, match=r"`font` must be .*emoji-test.txt'"):
        emoji(font=listed, emoji_test=listed)


@pytest.mark.parametrize("content", [b"", b"# group: A\n", b"\xff\xfe"])
def test_a_file_that_lists_no_emoji(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"`emoji_test` must be .*list.txt'"):
        emoji(font=tmp_path / "list.txt", emoji_test=tmp_path / "list.txt")


@needs_font
def test_a_font_without_the_emoji(tmp_path):
    line = "10FFFD ; fully-qualified # \U0010fffd E99 of tomorrow"
    (tmp_path / "list.txt").write_text(line, encoding="utf-8")
    with pytest.raises(ValueError, match=r"`font` must have .* none of 1"):
        emoji(emoji_test=tmp_path / "list.txt")
