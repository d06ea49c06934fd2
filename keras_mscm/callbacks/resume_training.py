"""Training that goes on where it was interrupted."""

import contextlib
import itertools
import math
import os
import signal
import threading
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras

from keras_mscm import backend, checks
from keras_mscm.callbacks import own_files, saves
from keras_mscm.models import DenoisingModel

KEPT = 2


class ResumeTraining(keras.callbacks.Callback):
    """For training that may be interrupted: saves it, and resumes it.

    Run the same script again, with the same arguments, after whatever has ended
    it: training goes on after the last save, and its weights are, bit for bit
    on a CPU, those of a training that was never interrupted. One that was
    finished is restored and not trained any further, unless `epochs` has grown.

    A save is a file of Keras, `{iteration:08d}.keras`, as `model.save` writes
    it and `keras.saving.load_model` reads it: the trained network, its moving
    average, the optimizer, the iteration, the annealing and the model's random
    states. Within is one more file, `position.json`: epoch and batch, the
    running means of the metrics, the random states of Python, NumPy and
    PyTorch, which training and what model it is of, and a checksum of the
    teacher, whose weights are not in the file. The last two saves are kept.

    Nothing is removed or replaced but this training's own saves. Other files
    may lie in the directory: what isn't named like a save is left alone, and
    what is, but can't be read or is none, is reported and stays. (A save that
    would have its name gets one zero more.)

    - A process that is killed, even while it saves, loses what it did after the
      last save. A save that can't be read any more is reported, and the one
      before it is taken.
    - On SIGTERM, which clusters send before they kill, the step is finished,
      the training saved, and `SystemExit(0)` raised. (A validation that is
      running comes to its end first.) A second SIGTERM does what it did before.
    - Where a save fails, the disk being full, say, the saves before it stay,
      a warning is given, and training goes on.
    - A state that is no longer finite, in its loss or a weight, is not saved.

    An interrupted epoch's batches are read again up to where it was, and passed
    over. That they are the same ones again is certain of

    - what `keras_mscm.datasets` makes with a `seed`, but by `from_tfds`. (Not
      of a finite one with `steps_per_epoch`: use `repeat=True` there.) Whole
      epochs are skipped, and cost nothing;
    - arrays; on TensorFlow with `shuffle=False`, as `tf.data` draws the order;
    - on PyTorch a `DataLoader`, shuffled by PyTorch's own generator;
    - a `tf.data.Dataset` or generator that is the same in each epoch. One
      without an end begins anew whenever training is resumed.

    Keras' `BackupAndRestore` begins an interrupted epoch again, on weights that
    have seen a part of it already. Keras' `OrbaxCheckpoint` saves weights that
    are spread over several machines, which this callback doesn't.

    Put it last: what other callbacks do at an iteration is then done before
    that iteration is saved.

    Args:
        directory: Where the saves go. One for each training.
        save_freq: `"epoch"`, or the number of batches between saves, at least
            1.

    Raises:
        ValueError: If `directory` is no path, or `save_freq` neither; when
            training begins, if nothing can be written into `directory`, or the
            model is no `DenoisingModel`, or not what was saved (of another
            class, network, schedule, prediction or optimizer), or its teacher
            is another one.
        OSError: When training begins, if there are saves, but none that can be
            read.

    Example:

    >>> resume = ResumeTraining("runs/student", save_freq=1000)
    >>> # model.fit(dataset, callbacks=[TeacherStepAnneal(), resume])
    """

    def __init__(
        self, directory: str | os.PathLike, save_freq: int | str = "epoch"
    ):
        super().__init__()
        if not isinstance(save_freq, str) or save_freq != "epoch":
            try:
                save_freq = checks.check_positive_integer(
                    "save_freq", save_freq
                )
            except ValueError:
                allowed = '"epoch" or an integer of at least 1'
                raise checks.invalid("save_freq", allowed, save_freq) from None
        self.directory = checks.check_path("directory", directory)
        self.save_freq = save_freq

    @property
    def saves(self) -> list[Path]:
        """What is named like a save, the latest last."""
        return saves.named_like_saves(self.directory)

    @contextlib.contextmanager
    def during_fit(self, model: Any, data: Any) -> Iterator[None]:
        """Entered by the model's `fit`, and left however that ends.

        Args:
            model: The model.
            data: What it is trained on.
        """
        self._data, self._terminated = data, False
        self._train_function: Any = None
        first_batch = getattr(data, "first_batch", None)
        try:
            with self._sigterm_noted():
                yield
            if self._terminated:  # which came after the last save
                raise SystemExit(0)
        finally:
            self._data = None
            # Keras would begin the next `fit` there too, so it is reset.
            model._initial_epoch = None
            if self._train_function is not None:
                model.train_function = self._train_function
            if first_batch is not None:
                data.first_batch = first_batch

    @contextlib.contextmanager
    def _sigterm_noted(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # because Python hands signals to the main thread only
            return
        previous = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL

        def note(number, frame):
            self._terminated = True
            signal.signal(number, previous)

        signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    # Keras calls these. Batches are counted as they begin, because Keras would
    # wait for the loss of each batch if a callback asked for their ends.

    def on_train_begin(self, logs: Any = None) -> None:
        """Restores the latest save."""
        model = self.model
        if not isinstance(model, DenoisingModel):
            raise ValueError(
                "`ResumeTraining` must be used with a DenoisingModel. "
                f"Received: {type(model).__name__}"
            )
        own_files.check_folder("directory", self.directory)
        own_files.remove_leftovers(self.directory, saves.NAMES)
        self._steps_per_execution = model.steps_per_execution
        self._teacher = saves.checksum(model)
        self._model_saved = saves.description(model)
        self._restored = position = self._restore()
        self._passed_over, self._warned = 0, False
        self._first_epoch: int | None = None
        self._training = uuid.uuid4().hex
        if position is None:
            self._batches_before = self._last_save = 0
            self._data_epoch = getattr(self._data, "epoch", 0)
            return
        self._first_epoch = position.get("first_epoch", position["epoch"])
        self._training = position.get("training", self._training)
        self._batches_before = position["batches_before"]
        self._last_save = self._batches_before + position["batch"]
        self._data_epoch = position["data_epoch"]
        model._initial_epoch = position["epoch"]  # as `BackupAndRestore` does
        if hasattr(self._data, "first_batch"):
            if self._data.num_batches is None:
                self._data.first_batch = self._batches_before
            else:
                self._data.epoch = self._data_epoch
        if not position["batch"]:
            backend.set_host_random_states(position["random"])

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Begins an epoch; an interrupted one as it was begun before."""
        self._epoch, self._batch = epoch, 0
        if self._first_epoch is None:
            self._first_epoch = epoch
        position, self._restored = self._restored, None
        if position is None or not position["batch"]:
            self._random_of_epoch = backend.host_random_states()
            return
        # They are set, because Keras draws the epoch's order from them.
        self._random_of_epoch = position["random_of_epoch"]
        backend.set_host_random_states(self._random_of_epoch)
        self._random_after = position["random"]
        self._passed_over = position["batch"]
        model = self.model
        means = position["metrics"]
        for variable, value in zip(model.metrics_variables, means):
            variable.assign(value)
        self._logs = model.get_metrics_result()
        self._train_function = model.train_function
        model.train_function = self._pass_over

    def _pass_over(self, *args: Any) -> Any:
        """Keras' train function for batches that were trained on before."""
        *state, data = args  # Keras on JAX: (state, data); else: (data,)
        for _ in itertools.islice(data, self._steps_per_execution):
            pass
        return (self._logs, *state) if state else self._logs

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Saves the batches before this one, if it is time to."""
        self._batch = batch
        if batch < self._passed_over:
            if self._terminated:  # because there is nothing new to save
                raise SystemExit(0)
        elif batch:
            self._train_again()
            if self._terminated or self._is_due():
                self._save(self._position(self._epoch, batch))
        self._batch += self._steps_per_execution

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Saves the epoch, if it is time to."""
        self._train_again()
        steps = self.params.get("steps") or math.inf
        if self.model.stop_training and self._batch < steps:
            # The epoch isn't over, because training was stopped at a batch.
            self._save(self._position(epoch, self._batch))
            return
        self._batches_before += self._batch
        self._batch = 0
        self._data_epoch += 1
        due = self.save_freq == "epoch" or self._is_due()
        last = self.model.stop_training or epoch + 1 == self.params["epochs"]
        if due or last or self._terminated:
            self._save(self._position(epoch + 1, 0))

    def _train_again(self) -> None:
        if self._train_function is not None:
            self.model.train_function = self._train_function
            self._train_function, self._passed_over = None, 0
            backend.set_host_random_states(self._random_after)

    def _is_due(self) -> bool:
        if isinstance(self.save_freq, str):
            return False
        batches = self._batches_before + self._batch
        return batches // self.save_freq > self._last_save // self.save_freq

    # Files.

    def _position(self, epoch: int, batch: int) -> dict[str, Any]:
        """Where training is: `batch` batches of `epoch` are done."""
        random = backend.host_random_states()
        return {
            "training": self._training,
            "model": self._model_saved,
            "iteration": backend.integer(self.model.iteration),
            "epoch": epoch,
            "batch": batch,
            "first_epoch": self._first_epoch,
            "batches_before": self._batches_before,
            "data_epoch": self._data_epoch,
            "teacher": self._teacher,
            "metrics": saves.running_means(self.model),
            "random": random,
            "random_of_epoch": self._random_of_epoch if batch else random,
        }

    def _save(self, position: dict[str, Any]) -> None:
        self._last_save = position["batches_before"] + position["batch"]
        if saves.is_finite(self.model):
            self._write(position)
        elif not self._warned:
            self._warned = True
            warnings.warn(
                f"Iteration {position['iteration']} is not saved in "
                f"{self.directory}, because its loss, a weight or the "
                "optimizer is not finite",
                stacklevel=2,
            )
        if self._terminated:
            mine = self._own_saves()
            print(
                f"SIGTERM: training can be resumed from {self.directory}"
                if mine
                else f"SIGTERM: nothing of this training is in {self.directory}"
            )
            raise SystemExit(0)

    def _write(self, position: dict[str, Any]) -> None:
        path = saves.place(
            self.directory, position["iteration"], self._training
        )
        try:
            saves.write(path, self.model, position)
            for old in self._own_saves()[:-KEPT]:
                old.unlink(missing_ok=True)
        except OSError as error:
            warnings.warn(
                f"{path} could not be saved; training goes on, and saves "
                f"before it are as they were: {error}",
                stacklevel=2,
            )

    def _own_saves(self) -> list[Path]:
        return [
            path
            for path in self.saves
            if saves.belongs_to(path, self._training)
        ]

    def _restore(self) -> dict[str, Any] | None:
        """Restores the latest save that can be read; None if there is none."""
        model, found = self.model, self.saves
        num_loss_variables = len(model.metrics[0].variables)
        for path in reversed(found):
            try:
                position = saves.read(path, num_loss_variables)
            except Exception as error:  # because a file may hold anything
                warnings.warn(
                    f"{path} can't be read, so the save before it is taken, "
                    f"and it stays as it is: {error}",
                    stacklevel=2,
                )
                continue
            saves.check_description(
                path, self._model_saved, position.get("model")
            )
            if position["teacher"] != self._teacher:
                raise ValueError(
                    f"`teacher` must be the one of the training in {path}. "
                    "Received: a teacher of other weights, or none"
                )
            if position["batch"]:
                saves.check_metrics(path, model, position["metrics"])
            saves.load(path, model)
            return position
        if found:
            raise OSError(
                f"None of the saves in {self.directory} can be read. To begin "
                "anew, remove them"
            )
        return None
