"""Pictures of samples during training."""

import io
import math
import os
import re
import socket
import time
import warnings
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_mscm import checks
from keras_mscm.atomic_file import write_atomically
from keras_mscm.callbacks import own_files
from keras_mscm.callbacks.sampling_callback import (
    Drawings,
    SamplingCallback,
)

NAMES = r"\d{8,}\.png"
#: The text within a PNG file by which a grid is recognised.
SOFTWARE = "keras_mscm.SampleGrid"


class SampleGrid(SamplingCallback):
    """For seeing how samples change during training.

    It draws a grid of samples every n iterations, to files and TensorBoard,
    from always the same noise. The files are `{directory}/{iteration:08d}.png`.

    A training that begins anew, or is resumed, replaces the grids that an
    earlier one has left at its iterations: give each training a directory of
    its own to keep them. A picture of such a name that is no grid of this
    callback is never replaced, but refused before training starts. If a grid
    can't be written (the disk being full, say), a warning is given, and
    training goes on.

    Args:
        directory: Where the files go.
        every: Iterations, which are optimizer updates, between grids; at least
            1.
        num_images: Images in the grid, at least 1.
        columns: Images in a row, at least 1; about as many as rows by default.
        labels: Their classes, `(num_images,)`; 0, 1, ... in turn by default.
        context: Sequence conditioning, `(num_images, length, context_width)`.
        context_mask: Which of it counts, `(num_images, length)`.
        batch_size: Images that are drawn at a time, at least 1.
        seed: Seed of the noise, an integer in 0..2**31 - 3.
        tensorboard: Log directory of TensorBoard, to which the grids go as
            well, as the image "samples"; none by default.
        **generate_with: Further arguments of the model's `generate`, such as
            `num_steps`, `sampler` or `guidance_scale`. Of several `num_steps`,
            `(1, 2, 4, 8)`, the grids stand below one another.

    Raises:
        ValueError: If an argument is out of its range; when training begins,
            if they don't suit the model, its images are not of 1, 3 or 4
            channels, nothing can be written into `directory` or `tensorboard`,
            or `directory` has another picture of a grid's name.
        ImportError: Without Pillow, or without TensorBoard if it is wanted.

    Example:

    >>> grid = SampleGrid("grids", every=1000, num_images=20, columns=10)
    >>> # model.fit(dataset, callbacks=[grid])
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        every: int,
        num_images: int = 64,
        columns: int | None = None,
        labels: Any = None,
        context: Any = None,
        context_mask: Any = None,
        batch_size: int = 128,
        seed: int = 0,
        tensorboard: str | os.PathLike | None = None,
        **generate_with: Any,
    ):
        super().__init__(
            every,
            num_images,
            labels,
            context,
            context_mask,
            batch_size,
            seed,
            generate_with,
        )
        if "decode" in generate_with:
            raise ValueError(
                "`decode` must not be given, because `SampleGrid` draws "
                "pictures. Received: decode="
                f"{checks.describe(generate_with['decode'])}"
            )
        if columns is None:
            columns = math.ceil(math.sqrt(self.num_images))
        self.columns = checks.check_positive_integer("columns", columns)
        self.directory = checks.check_path("directory", directory)
        if tensorboard is not None:
            tensorboard = checks.check_path("tensorboard", tensorboard)
        self.tensorboard = tensorboard
        self._writer: Any = None

    def on_train_begin(self, logs: Any = None) -> None:
        """Checks the model, and that the files can be written."""
        super().on_train_begin(logs)
        shape = self.model.space.image_shape
        if shape is None or shape[-1] not in (1, 3, 4):
            raise ValueError(
                "`SampleGrid` must be used with a model of images of 1, 3 or "
                f"4 channels. Received: image_shape={shape}, space "
                f"{type(self.model.space).__name__} of "
                f"{self.model.space.shape}"
            )
        try:
            import PIL  # noqa: F401, because Keras writes images with it
        except ImportError as error:
            raise ImportError(
                "`SampleGrid` needs Pillow: pip install 'keras-mscm[images]'"
            ) from error
        own_files.check_folder("directory", self.directory)
        for path in sorted(self.directory.iterdir()):
            if re.fullmatch(NAMES, path.name, re.ASCII) and not _is_grid(path):
                raise own_files.foreign("directory", path, "grids of samples")
        own_files.remove_leftovers(self.directory, NAMES)
        self.on_train_end()  # because a failed training hasn't called it
        if self.tensorboard is not None:
            own_files.check_folder("tensorboard", self.tensorboard)
            self._writer = _EventFile(self.tensorboard)

    def on_drawing(self, iteration: int, drawings: Drawings) -> None:
        """Writes the grid, or those of several numbers of steps in one."""
        grids = [
            grid_of(np.concatenate([*batches]), self.columns)
            for batches in drawings.values()
        ]
        images = below_one_another(grids)
        png = _png_of(images)
        path = self.directory / f"{iteration:08d}.png"
        try:
            if own_files.is_there(path) and not _is_grid(path):
                raise OSError("another picture lies there by now")
            write_atomically(path, lambda new: new.write_bytes(png), ".png")
            if self._writer is not None:
                self._writer.add_image("samples", png, images.shape, iteration)
        except OSError as error:
            warnings.warn(
                f"The grid {path} could not be written; training goes on: "
                f"{error}",
                stacklevel=2,
            )

    def on_train_end(self, logs: Any = None) -> None:
        """Closes TensorBoard's file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def grid_of(images: np.ndarray, columns: int) -> np.ndarray:
    """Images in rows, one pixel apart.

    Args:
        images: `(num, height, width, channels)`, in [-1, 1].
        columns: Images in a row.

    Returns:
        One image, integers from 0 to 255.
    """
    num, height, width, channels = images.shape
    columns = min(columns, num)
    rows = math.ceil(num / columns)
    cells = np.zeros((rows * columns, height + 1, width + 1, channels), "uint8")
    cells[:num, :-1, :-1] = np.rint((images + 1) * 127.5)
    grid = cells.reshape(rows, columns, height + 1, width + 1, channels)
    grid = grid.swapaxes(1, 2)
    shape = rows * (height + 1), columns * (width + 1), channels
    return grid.reshape(shape)[:-1, :-1]


def below_one_another(grids: list[np.ndarray]) -> np.ndarray:
    """Grids of one size, four pixels apart, as one image.

    Args:
        grids: As `grid_of` makes them.
    """
    gap = np.zeros((4, *grids[0].shape[1:]), "uint8")
    parts = [part for grid in grids for part in (gap, grid)]
    return np.concatenate(parts[1:])


def _png_of(images: np.ndarray) -> bytes:
    """A PNG file that says what has made it."""
    from PIL.PngImagePlugin import PngInfo

    info, buffer = PngInfo(), io.BytesIO()
    info.add_text("Software", SOFTWARE)
    keras.utils.save_img(
        buffer,
        images,
        "channels_last",
        file_format="png",
        scale=False,
        pnginfo=info,
    )
    return buffer.getvalue()


def _is_grid(path: Path) -> bool:
    """Whether a file is what `_png_of` has made."""
    text = f"tEXtSoftware\0{SOFTWARE}".encode()
    try:
        with path.open("rb") as file:
            return text in file.read(200)
    except OSError:
        return False


class _EventFile:
    """An event file of TensorBoard.

    It is written by parts of `tensorboard` that don't import TensorFlow,
    because TensorBoard's own writer does wherever that is installed.
    """

    def __init__(self, directory: Path):
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise ImportError(
                "`tensorboard` needs TensorBoard: pip install "
                "'keras-mscm[tensorboard]'"
            ) from error
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        # TensorBoard looks for this prefix. The rest makes the name unique,
        # because every training has a file of its own.
        name = (
            f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}"
            f".{os.getpid()}.samples"
        )
        self._file = (directory / name).open("xb")
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")

    def _write(self, **content: Any) -> None:
        event = self._event(wall_time=time.time(), **content)
        self._records.write(event.SerializeToString())
        self._records.flush()

    def add_image(
        self, tag: str, png: bytes, shape: tuple[int, ...], step: int
    ) -> None:
        image = self._summary.Image(
            height=shape[0],
            width=shape[1],
            colorspace=shape[2],
            encoded_image_string=png,
        )
        value = self._summary.Value(tag=tag, image=image)
        self._write(step=step, summary=self._summary(value=[value]))

    def close(self) -> None:
        self._records.close()
