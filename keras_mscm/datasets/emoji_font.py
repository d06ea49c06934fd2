"""Colour pictures with classes and captions: the emoji of a system font."""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from keras_mscm.checks import (
    check_boolean,
    check_integer,
    check_path,
    check_sequence,
    check_string,
    invalid,
)
from keras_mscm.datasets.resizing import center_square, check_image_size, pillow

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
        background: What is behind them: a colour's name as Pillow knows it,
            such as `"white"` or `"#80c0ff"`, or red, green and blue, 0..255.
        font: File of a bitmap font like NotoColorEmoji.ttf.
        emoji_test: Unicode's file emoji-test.txt.

    Returns:
        Images, labels, captions, characters and class names, in memory.

    Raises:
        ValueError: If an argument is out of its range, a file is of another
            kind, or the font has none of the emoji.
        FileNotFoundError: If a file is missing; says how to install it.
        ImportError: If Pillow is missing, or its text layout, Raqm.

    Example:

    >>> # pictures = emoji(image_size=32)
    >>> # dataset = from_arrays(pictures.images, pictures.labels, batch_size=64)
    >>> # model.fit(dataset, epochs=10)
    """
    image_size = check_image_size("image_size", image_size)
    sequences = check_boolean("sequences", sequences)
    font = check_path("font", font)
    emoji_test = check_path("emoji_test", emoji_test)
    Image = pillow()
    from PIL import ImageDraw, ImageFont, features

    colour = _colour(background)
    for name, path, package in (
        ("font", font, "fonts-noto-color-emoji"),
        ("emoji_test", emoji_test, "unicode-data"),
    ):
        if not path.is_file():
            raise FileNotFoundError(
                f"`{name}` must be a file. Received: {path}. On Debian: "
                f"apt-get install {package}"
            )
    if not features.check("raqm"):
        raise ImportError(
            "Emoji need Pillow with Raqm, as in the wheels of PyPI: "
            "pip install --force-reinstall pillow"
        )
    entries = _read_emoji_test(emoji_test)
    try:
        drawn = ImageFont.truetype(os.fspath(font), BITMAP_SIZE)
    except OSError as error:
        raise ValueError(
            "`font` must be a bitmap font like NotoColorEmoji.ttf. Received: "
            f"{str(font)!r} ({error})"
        ) from error
    cell = drawn.getbbox("\N{GRINNING FACE}")
    width, height = cell[2], cell[3]
    class_names = list(dict.fromkeys(group for _, group, _ in entries))
    images, kept = [], []
    for entry in entries:
        text = entry[0]
        single = len(text.replace("\N{VARIATION SELECTOR-16}", "")) == 1
        # The box is compared, because a picture that the font lacks has no
        # height, and a sequence that doesn't join is wide.
        if not (single or sequences) or drawn.getbbox(text) != cell:
            continue
        picture = Image.new("RGB", (width, width), colour)
        ImageDraw.Draw(picture).text(
            (0, (width - height) // 2), text, font=drawn, embedded_color=True
        )
        images.append(center_square(np.asarray(picture), image_size))
        kept.append(entry)
    if not kept:
        raise ValueError(
            "`font` must have pictures of the emoji that `emoji_test` lists. "
            f"Received: {str(font)!r} with none of {len(entries)}"
        )
    characters, groups, captions = zip(*kept)
    return EmojiImages(
        np.stack(images),
        np.array([class_names.index(group) for group in groups], "int32"),
        list(captions),
        list(characters),
        class_names,
    )


def _colour(background: Any) -> tuple[int, ...]:
    """Red, green and blue; raises unless `background` is a colour."""
    from PIL import ImageColor

    try:
        if isinstance(background, str):
            colour = ImageColor.getrgb(check_string("background", background))
        else:
            colour = check_sequence("background", background, "a colour")
        # A fourth number is refused, because it would be an opacity.
        if len(colour) == 3:
            return tuple(
                check_integer("background", number, 0, 255) for number in colour
            )
    except ValueError:  # which Pillow raises for names that it doesn't know
        pass
    allowed = "the name of a colour, or (red, green, blue), integers 0..255"
    raise invalid("background", allowed, background)


def _read_emoji_test(path: Path) -> list[tuple[str, str, str]]:
    """(characters, group, name) of each emoji in full, in Unicode's order."""
    group, entries = "", []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            "`emoji_test` must be Unicode's file emoji-test.txt. Received: "
            f"{str(path)!r} ({error})"
        ) from error
    for line in lines:
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
    if not entries:
        raise ValueError(
            "`emoji_test` must be Unicode's file emoji-test.txt. Received: "
            f"{str(path)!r} without any emoji"
        )
    return entries
