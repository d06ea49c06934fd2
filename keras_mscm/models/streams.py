"""Streams of batches, looked at before training and as they pass.

Of arrays everything is known beforehand. A stream's first batch is checked
before anything is compiled, and each one after it on its way to the step.
"""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import keras

from keras_mscm import backend


class Watch:
    """Checks the batches of a stream as they pass.

    What it finds wrong it remembers, because a framework may turn an error on
    its own threads into another one.

    Args:
        check: Function of a batch and its number from 0 within the epoch,
            which raises a `ValueError`.
    """

    def __init__(self, check: Callable[[Any, int], None]):
        self._check = check
        self._error: Exception | None = None

    def see(self, batch: Any, number: Any) -> Any:
        """Checks a batch and hands it on."""
        with self.remembering():
            self._check(batch, int(number))
        return batch

    @contextlib.contextmanager
    def remembering(self) -> Iterator[None]:
        """Remembers an error from within, such as one of reading a file."""
        try:
            yield
        except Exception as error:
            self._error = error
            raise

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Raises what was found wrong, whatever error has come of it."""
        try:
            yield
        except Exception as error:
            if self._error is None or self._error is error:
                raise
            raise self._error from None


def first_batch(name: str, x: Any) -> tuple[Any, Any]:
    """A stream's first batch.

    Args:
        name: What to call the stream in a message.
        x: A `tf.data.Dataset`, `keras.utils.PyDataset`, PyTorch `DataLoader`,
            Grain data set, or generator of batches.

    Returns:
        The batch, and the stream: of a generator one that still begins there.

    Raises:
        ValueError: If there is no batch.
    """
    if isinstance(x, keras.utils.PyDataset):
        batch = None if x.num_batches == 0 else x[0]
    elif isinstance(x, Iterator):
        batch = next(x, None)
        x = itertools.chain([batch], x)
    else:
        batch = next(iter(x), None)
    if batch is None:
        raise ValueError(f"`{name}` is empty. Received: no batch")
    return batch, x


def watched(x: Any, watch: Watch) -> Any:
    """The same stream, each of whose batches a watch sees.

    Args:
        x: As for `first_batch`.
        watch: What sees them.
    """
    if isinstance(x, keras.utils.PyDataset):
        return _WatchedDataset(x, watch)
    if isinstance(x, Iterator):
        # Keras wants tuples of generators, also where there are only images.
        return (as_tuple(batch) for batch in _seen(x, watch))
    if backend.is_tf_dataset(x):
        return backend.watched_tf_dataset(x, watch.see)
    if hasattr(x, "map_with_index"):  # Grain's data sets
        return x.map_with_index(lambda number, batch: watch.see(batch, number))

    # A loader, of PyTorch or Grain, which Keras knows by its class.
    class Watched(type(x)):  # type: ignore[misc]
        def __iter__(self):
            return _seen(super().__iter__(), watch)

    loader = copy.copy(x)
    loader.__class__ = Watched
    return loader


def _seen(batches: Iterator, watch: Watch) -> Iterator:
    """The same batches; what goes wrong in making them is remembered."""
    with watch.remembering():
        for number, batch in enumerate(batches):
            yield watch.see(batch, number)


def as_tuple(batch: Any) -> tuple:
    """A batch as the tuple that Keras makes of it."""
    return tuple(batch) if isinstance(batch, (list, tuple)) else (batch,)


class _WatchedDataset(keras.utils.PyDataset):
    """A `PyDataset` whose batches a watch sees; all else is the original's."""

    def __init__(self, dataset: keras.utils.PyDataset, watch: Watch):
        super().__init__(
            workers=dataset.workers,
            use_multiprocessing=dataset.use_multiprocessing,
            max_queue_size=dataset.max_queue_size,
        )
        self._dataset, self._watch = dataset, watch

    @property
    def num_batches(self) -> int | None:
        return self._dataset.num_batches

    def __getitem__(self, index: int) -> Any:
        with self._watch.remembering():
            batch = self._dataset[index]
        return self._watch.see(batch, index)

    def on_epoch_begin(self) -> None:
        self._dataset.on_epoch_begin()

    def on_epoch_end(self) -> None:
        self._dataset.on_epoch_end()
