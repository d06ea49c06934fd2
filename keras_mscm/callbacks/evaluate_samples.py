"""Evaluation of samples during training."""

import json
import math
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py

from keras_mscm import checks
from keras_mscm.atomic_file import write_atomically
from keras_mscm.callbacks import evaluations, own_files
from keras_mscm.callbacks.sampling_callback import (
    Drawings,
    SamplingCallback,
)

SUFFIX = ".weights.h5"
#: Names that an evaluation or an epoch's logs hold already.
TAKEN = ("iteration", "loss", "val_loss")
#: Bytes that HDF5 needs for each variable beside its numbers, and to spare.
SLACK = 8192


class EvaluateSamples(SamplingCallback):
    """For the weights with the best samples, which the loss doesn't tell.

    It evaluates samples every n iterations, and keeps the best weights. The
    samples are drawn from always the same noise with the moving average of
    the weights, as `generate` does. An epoch's logs hold the latest numbers
    under the metrics' names, for `History`, the progress bar and callbacks that
    come after this one; `history` holds each evaluation in full.

    A resumed training goes on where it was: it is told by the model's
    iteration, and the best number so far is read from a file beside the
    weights. Put this callback after `BackupAndRestore`, or before
    `ResumeTraining`. A training from iteration 0 begins anew and replaces the
    best weights that an earlier one has left; results it appends to what is
    there. (What a resumed training does again stands there twice.)

    Files that are not of this callback are never replaced or appended to, but
    refused before training starts. If a file can't be written (the disk being
    full, say), a warning is given, and training goes on.

    Args:
        metrics: Metrics such as those of `keras_mscm.metrics`: anything with a
            `name` (of its own, and not "iteration", "loss" or "val_loss"),
            `update_state(images)`, `result()` (a number, or a dictionary with
            `"value"`) and `reset_state()`; `min_samples`, if there is one,
            says how many images it takes.
        every: Iterations, which are optimizer updates, between evaluations; at
            least 1.
        num_images: Images per evaluation, at least 1. Compare only numbers of
            equally many.
        labels: Their classes, `(num_images,)`; 0, 1, ... in turn by default.
        context: Sequence conditioning, `(num_images, length, context_width)`.
        context_mask: Which of it counts, `(num_images, length)`.
        batch_size: Images that are drawn at a time, at least 1.
        seed: Seed of the noise, an integer in 0..2**31 - 3.
        best_weights: File to keep the best weights in, `*.weights.h5`, for
            `load_weights`; all of the model's, also those in training. What it
            scored stands beside it, in `*.weights.h5.json`. None keeps none.
        monitor: Name of the metric that says what is best; the first by
            default.
        mode: `"min"` or `"max"`: which numbers are better.
        results: File to append each evaluation to, one JSON object a line; none
            by default.
        **generate_with: Further arguments of the model's `generate`, such as
            `num_steps`, `sampler` or `guidance_scale`. Of several `num_steps`,
            `(1, 2, 4, 8)`, each has a number of its own: the metric "distance"
            becomes "distance_1_step", "distance_2_steps" and so on.

    Attributes:
        history: Of each evaluation the iteration and every metric's result.
        best: The best one, or None: of those whose weights could be kept, where
            these are to be.

    Raises:
        ValueError: If an argument is out of its range; when training begins,
            if they don't suit the model, or where files are to go nothing can
            be written, or something else lies; at the first evaluation, if a
            metric's result is no number.

    Example:

    >>> import keras
    >>> evaluate = EvaluateSamples(
    ...     [keras.metrics.Mean(name="brightness")], every=1000, num_images=64
    ... )
    >>> # model.fit(dataset, callbacks=[evaluate])
    """

    def __init__(
        self,
        metrics: Sequence[Any],
        *,
        every: int,
        num_images: int,
        labels: Any = None,
        context: Any = None,
        context_mask: Any = None,
        batch_size: int = 128,
        seed: int = 0,
        best_weights: str | os.PathLike | None = None,
        monitor: str | None = None,
        mode: str = "min",
        results: str | os.PathLike | None = None,
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
        self.metrics = _checked(metrics)
        names = tuple(
            self._name(metric, k)
            for metric in self.metrics
            for k in self.num_steps
        )
        for metric in self.metrics:
            least = getattr(metric, "min_samples", 1)
            if self.num_images < least:
                raise ValueError(
                    f"`num_images` must be at least {least} for the metric "
                    f"{metric.name!r}. Received: num_images={num_images}"
                )
        monitor = names[0] if monitor is None else monitor
        self.monitor = checks.check_choice("monitor", monitor, names)
        self.mode = checks.check_choice("mode", mode, ("min", "max"))
        if best_weights is not None:
            best_weights = checks.check_path("best_weights", best_weights)
            if not best_weights.name.endswith(SUFFIX):
                raise ValueError(
                    f"`best_weights` must end in {SUFFIX}. Received: "
                    f"best_weights={os.fspath(best_weights)!r}"
                )
        if results is not None:
            results = checks.check_path("results", results)
        self.best_weights, self.results = best_weights, results
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None

    def _name(self, metric: Any, num_steps: int | None) -> str:
        """What a metric's number is called, of a number of steps."""
        if len(self.num_steps) == 1:
            return metric.name
        return f"{metric.name}_{num_steps}_step{'s'[: num_steps != 1]}"

    @property
    def _record(self) -> Path:
        return Path(f"{self.best_weights}.json")

    def on_train_begin(self, logs: Any = None) -> None:
        """Checks the model, and that the files can be written."""
        super().on_train_begin(logs)
        self._check_comparable()
        if self.best_weights is not None:
            folder = self.best_weights.parent
            own_files.check_folder("best_weights", folder)
            self._read_record(self.best_weights)
            for path in (self.best_weights, self._record):
                own_files.remove_leftovers(folder, re.escape(path.name))
        if self.results is not None:
            own_files.check_folder("results", self.results.parent)
            evaluations.check_results(self.results)

    def _check_comparable(self) -> None:
        space, raw = self.model.space, self.generate_with.get("decode") is False
        drawn = space.shape if raw else space.image_shape
        for metric in self.metrics:
            reference: Any = getattr(metric, "reference", None)
            if getattr(reference, "image_shape", drawn) not in (drawn, None):
                raise checks.invalid(
                    "metrics", f"of images {drawn}", reference.image_shape
                )

    def _read_record(self, path: Path) -> dict[str, Any] | None:
        """What an earlier training has kept; raises if something else is."""
        record = None
        if own_files.is_there(self._record):
            record = evaluations.parsed(evaluations.text_of(self._record))
            if record is None or not self._is_comparable(record):
                what = "an earlier training's best number"
                raise own_files.foreign("best_weights", self._record, what)
        if own_files.is_there(path):
            # The weights' own mark goes first, because the record is older if
            # the process was killed between the two writes.
            record = evaluations.parsed(evaluations.mark_of(path)) or record
            if record is None or not path.is_file():
                what = "an earlier training's best weights"
                raise own_files.foreign("best_weights", path, what)
        return record

    def _is_comparable(self, record: dict[str, Any]) -> bool:
        """Whether it has a number to compare with, or is of other metrics."""
        if self.monitor not in record:
            return True
        return math.isfinite(
            evaluations.value(self.monitor, record[self.monitor])
        )

    def on_first_iteration(self, iteration: int) -> None:
        """Finds out what was best, if this training goes on with another."""
        self.history, self.best = [], None
        if iteration and self.best_weights is not None:
            self.best = self._read_record(self.best_weights)
            if self.best is not None and self.monitor not in self.best:
                raise ValueError(
                    f"`monitor` must be what {self._record} says of the "
                    "training that is resumed. Received: monitor="
                    f"{self.monitor!r}, there {sorted(self.best)}"
                )

    def on_drawing(self, iteration: int, drawings: Drawings) -> None:
        """Evaluates, and saves the weights if they are the best."""
        evaluation: dict[str, Any] = {"iteration": iteration}
        for num_steps, batches in drawings.items():
            for metric in self.metrics:
                metric.reset_state()
            for images in batches:
                for metric in self.metrics:
                    metric.update_state(images)
            for metric in self.metrics:
                name = self._name(metric, num_steps)
                evaluation[name] = evaluations.plain(metric.result())
                evaluations.value(name, evaluation[name])
                metric.reset_state()
        self.history.append(evaluation)
        try:
            if self.results is not None:
                evaluations.append(self.results, json.dumps(evaluation) + "\n")
            if self._is_better(evaluation):
                if self.best_weights is not None:
                    self._save(self.best_weights, evaluation)
                self.best = evaluation
        except OSError as error:
            warnings.warn(
                f"The evaluation of iteration {iteration}, or its weights, "
                f"could not be written; training goes on: {error}",
                stacklevel=2,
            )

    def _is_better(self, evaluation: dict[str, Any]) -> bool:
        value = evaluations.value(self.monitor, evaluation[self.monitor])
        if not math.isfinite(value):
            return False
        if self.best is None:
            return True
        best = evaluations.value(self.monitor, self.best[self.monitor])
        return value < best if self.mode == "min" else value > best

    def _save(self, path: Path, evaluation: dict[str, Any]) -> None:
        def write(file):
            own_files.check_space(file.parent, self.model, SLACK)
            self.model.save_weights(file)
            with h5py.File(file, "a") as opened:
                opened.attrs[evaluations.MARK] = json.dumps(evaluation)

        # The weights are written first, because a record without its weights
        # would be a lie, while weights better than the record are at worst
        # replaced too easily.
        write_atomically(path, write, SUFFIX)
        text = json.dumps(evaluation, indent=2) + "\n"
        write_atomically(
            self._record, lambda new: new.write_text(text, "utf-8"), ".json"
        )

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Puts the latest numbers into the epoch's logs."""
        super().on_epoch_end(epoch, logs)
        if self.history and logs is not None:
            for name, latest in self.history[-1].items():
                if name != "iteration":
                    logs[name] = evaluations.value(name, latest)


def _checked(metrics: Any) -> list:
    """The metrics, if they are some."""
    needed = ("name", "update_state", "result", "reset_state")
    if (
        not isinstance(metrics, (list, tuple))
        or not metrics
        or not all(
            hasattr(metric, name) and not isinstance(metric, type)
            for metric in metrics
            for name in needed
        )
    ):
        raise checks.invalid(
            "metrics", f"a list of objects with {needed}", metrics
        )
    names = [metric.name for metric in metrics]
    if (
        not all(isinstance(name, str) for name in names)
        or len(set(names)) < len(names)
        or set(names) & {*TAKEN}
    ):
        raise ValueError(
            "`metrics` must have names of their own, strings other than "
            f"{TAKEN}. Received: {names}"
        )
    return [*metrics]
