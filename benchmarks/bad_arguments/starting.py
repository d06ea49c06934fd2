"""What must not begin for arguments that are bad."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import keras
import tensorflow_datasets as tfds

from keras_mscm import backend


class Started(BaseException):
    """Compilation, training or a download would begin now."""


@contextlib.contextmanager
def nothing_starts() -> Iterator[None]:
    """Raises `Started` where it would compile, train or download."""

    def started(*args, **kwargs):
        raise Started

    with contextlib.ExitStack() as stack:
        for where, name in (
            (backend, "compile_inference"),
            (keras.Model, "make_train_function"),
            (keras.Model, "make_test_function"),
            (keras.Model, "make_predict_function"),
            (keras.applications, "InceptionV3"),
            (keras.datasets.mnist, "load_data"),
            (tfds, "load"),
        ):
            stack.enter_context(mock.patch.object(where, name, started))
        yield
