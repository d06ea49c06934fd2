"""Colour pictures with classes and captions: the emoji of a system font."""

import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keras_mscm.checks import check_positive_integer
from keras_mscm.datasets.resizing import center_square, pillow

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
EMOJI_TEST = "/usr/share/unicode/emoji/emoji-test.txt"
BITMAP_SIZE = 109  # the one size that the font's bitmaps, 136x128, have


class EmojiImages(NamedTuple):
    """What `emoji` returns; entry i of the first four belongs to picture i.

    Attributes:
        images: uint8, `(num, image_size, image_size, 3)`.
        labels: int32, `(num,)`, indices into `class_names`.
        captions: Unicode's short names, such as "grinning face".
        characters: The emoji themselves.
        class_names: Unicode's groups, such as "Food & Drink".
    """

    images: np.ndarray
    labels: np.ndarray
    captions: list[str]
    characters: list[str]
    class_names: list[str]


def emoji(
    image_size: int = 64,
    *,
    sequences: bool = False,
    background: str | tuple[int, int, int] = "white",
    font: str | os.PathLike = FONT,
    emoji_test: str | os.PathLike = EMOJI_TEST,
) -> EmojiImages:
    """Draws the emoji of Noto Color Emoji, with their groups and names.

    On Debian, `apt-get install fonts-noto-color-emoji unicode-data` gives the
    font (licence OFL) and Unicode's list of emoji, their groups and names.
    There are 1,377 pictures of single code points, or 3,655 with sequences
    (skin tones, families, flags), in nine groups; what the font lacks is left
    out (but of flags: it has a picture of an unknown one). They take about a
    second, or three.

    Args:
        image_size: Pixels of a side; the font's bitmaps have 136.
        sequences: Whether to draw sequences of code points as well.
        background: What is behind them, as Pillow names or counts colours.
        font: File of a bitmap font like NotoColorEmoji.ttf.
        emoji_test: Unicode's file emoji-test.txt.

    Returns:
        Images, labels, captions, characters and class names, in memory.

    Raises:
        ValueError: If `image_size` is out of its range.
        FileNotFoundError: If a file is missing; says how to install it.
        ImportError: If Pillow is missing, or its text layout, Raqm.

    Example:

    >>> # pictures = emoji(image_size=32)
    >>> # dataset = from_arrays(pictures.images, pictures.labels, batch_size=64)
    >>> # model.fit(dataset, epochs=10)
    """
    check_positive_integer("image_size", image_size)
    Image = pillow()
    from PIL import ImageDraw, ImageFont, features

    for name, path, package in (
        ("font", font, "fonts-noto-color-emoji"),
        ("emoji_test", emoji_test, "unicode-data"),
    ):
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"`{name}` must be a file. Received: {path}. On Debian: "
                f"apt-get install {package}"
            )
    if not features.check("raqm"):
        raise ImportError(
            "Emoji need Pillow with Raqm, as in the wheels of PyPI: "
            "pip install --force-reinstall pillow"
        )
    drawn = ImageFont.truetype(os.fspath(font), BITMAP_SIZE)
    cell = drawn.getbbox("\N{GRINNING FACE}")
    width, height = cell[2], cell[3]
    entries = _read_emoji_test(Path(emoji_test))
    class_names = list(dict.fromkeys(group for _, group, _ in entries))
    images, kept = [], []
    for entry in entries:
        text = entry[0]
        single = len(text.replace("\N{VARIATION SELECTOR-16}", "")) == 1
        # A missing one has no height; a sequence that doesn't join is wide.
        if not (single or sequences) or drawn.getbbox(text) != cell:
            continue
        picture = Image.new("RGB", (width, width), background)
        ImageDraw.Draw(picture).text(
            (0, (width - height) // 2), text, font=drawn, embedded_color=True
        )
        images.append(center_square(np.asarray(picture), image_size))
        kept.append(entry)
    characters, groups, captions = zip(*kept)
    return EmojiImages(
        np.stack(images),
        np.array([class_names.index(group) for group in groups], "int32"),
        list(captions),
        list(characters),
        class_names,
    )


def _read_emoji_test(path: Path) -> list[tuple[str, str, str]]:
    """(characters, group, name) of each emoji in full, in Unicode's order."""
    group, entries = "", []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        # 263A FE0F    ; fully-qualified     # <emoji> E0.6 smiling face
        found = re.match(
            r"([0-9A-F ]+); fully-qualified\s+# \S+ \S+ (.+)", line
        )
        if found:
            codes = found[1].split()
            text = "".join(chr(int(code, 16)) for code in codes)
            entries.append((text, group, found[2]))
    return entries
