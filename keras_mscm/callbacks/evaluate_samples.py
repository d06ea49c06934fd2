"""Evaluation of samples during training."""

import json
import math
import numbers
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keras_mscm import checks
from keras_mscm.callbacks.atomic_file import write_atomically
from keras_mscm.callbacks.sampling_callback import SamplingCallback

SUFFIX = ".weights.h5"


class EvaluateSamples(SamplingCallback):
    """Evaluates samples every n iterations, and keeps the best weights.

    The samples are drawn from always the same noise with the moving average of
    the weights, as `generate` does. An epoch's logs hold the latest numbers
    under the metrics' names, for `History`, the progress bar and callbacks that
    come after this one; `history` holds each evaluation in full.

    A resumed training goes on where it was: it is told by the model's
    iteration, and the best number so far is read from a file beside the
    weights. Put this callback after `BackupAndRestore`, or before
    `ResumeTraining`. A training from iteration 0 begins anew and replaces what
    is there.

    Args:
        metrics: Metrics such as those of `keras_mscm.metrics`: anything with a
            `name`, `update_state(images)`, `result()` (a number, or a
            dictionary with `"value"`) and `reset_state()`; `min_samples`, if
            there is one, says how many images it takes.
        every: Iterations, which are optimizer updates, between evaluations.
        num_images: Images per evaluation. Compare only numbers of equally many.
        labels: Their classes, `(num_images,)`; 0, 1, ... in turn by default.
        context: Sequence conditioning, `(num_images, length, context_width)`.
        context_mask: Which of it counts, `(num_images, length)`.
        batch_size: Images that are drawn at a time.
        seed: Seed of the noise.
        best_weights: File to keep the best weights in, `*.weights.h5`, for
            `load_weights`; all of the model's, also those in training. What it
            scored stands beside it, in `*.weights.h5.json`. None keeps none.
        monitor: Name of the metric that says what is best; the first by
            default.
        mode: `"min"` or `"max"`: which numbers are better.
        results: File to append each evaluation to, one JSON object a line; none
            by default.
        **generate_with: Further arguments of the model's `generate`, such as
            `num_steps`, `sampler` or `guidance_scale`.

    Attributes:
        history: Of each evaluation the iteration and every metric's result.
        best: The best one, or None.

    Raises:
        ValueError: If an argument is out of its range; when training begins,
            if they don't suit the model.

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
        needed = ("name", "update_state", "result", "reset_state")
        is_list = isinstance(metrics, (list, tuple)) and len(metrics) > 0
        if not is_list or not all(
            hasattr(metric, name) for metric in metrics for name in needed
        ):
            raise ValueError(
                f"`metrics` must be a list of objects with {needed}. Received: "
                f"metrics={metrics!r}"
            )
        names = tuple(metric.name for metric in metrics)
        if len(set(names)) < len(names):
            raise ValueError(
                f"`metrics` must have names of their own. Received: {names}"
            )
        for metric in metrics:
            least = getattr(metric, "min_samples", 1)
            if num_images < least:
                raise ValueError(
                    f"`num_images` must be at least {least} for the metric "
                    f"{metric.name!r}. Received: num_images={num_images}"
                )
        monitor = names[0] if monitor is None else monitor
        checks.check_choice("monitor", monitor, names)
        checks.check_choice("mode", mode, ("min", "max"))
        if best_weights is not None:
            best_weights = Path(best_weights)
            if not best_weights.name.endswith(SUFFIX):
                raise ValueError(
                    f"`best_weights` must end in {SUFFIX}. Received: "
                    f"best_weights={os.fspath(best_weights)!r}"
                )
        self.metrics, self.monitor, self.mode = list(metrics), monitor, mode
        self.best_weights = best_weights
        self.results = None if results is None else Path(results)
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None

    @property
    def _record(self) -> Path:
        return Path(f"{self.best_weights}.json")

    def on_first_iteration(self, iteration: int) -> None:
        """Finds out what was best, if this training goes on with another."""
        self.history, self.best = [], None
        if iteration and self.best_weights and self._record.is_file():
            self.best = json.loads(self._record.read_text("utf-8"))
            if self.monitor not in self.best:
                raise ValueError(
                    f"`monitor` must be what {self._record} says of the "
                    "training that is resumed. Received: monitor="
                    f"{self.monitor!r}, there {sorted(self.best)}"
                )

    def on_drawing(self, iteration: int, batches: Iterator[np.ndarray]) -> None:
        """Evaluates, and saves the weights if they are the best."""
        for metric in self.metrics:
            metric.reset_state()
        for images in batches:
            for metric in self.metrics:
                metric.update_state(images)
        evaluation: dict[str, Any] = {"iteration": iteration}
        for metric in self.metrics:
            evaluation[metric.name] = _plain(metric.result())
            metric.reset_state()
        self.history.append(evaluation)
        if self.results is not None:
            self.results.parent.mkdir(parents=True, exist_ok=True)
            with self.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(evaluation) + "\n")
        if self._is_better(_value(evaluation[self.monitor])):
            self.best = evaluation
            if self.best_weights is not None:
                self._save(self.best_weights)

    def _is_better(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if self.best is None:
            return True
        best = _value(self.best[self.monitor])
        return value < best if self.mode == "min" else value > best

    def _save(self, path: Path) -> None:
        # The weights first: a record without its weights would be a lie, while
        # weights better than the record are at worst replaced too easily.
        write_atomically(path, self.model.save_weights, SUFFIX)
        text = json.dumps(self.best, indent=2) + "\n"
        write_atomically(
            self._record, lambda new: new.write_text(text, "utf-8"), ".json"
        )

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Puts the latest numbers into the epoch's logs."""
        super().on_epoch_end(epoch, logs)
        if self.history and logs is not None:
            for metric in self.metrics:
                logs[metric.name] = _value(self.history[-1][metric.name])


def _plain(result: Any) -> Any:
    """A metric's result as JSON can hold it."""
    if isinstance(result, dict):
        return {key: _plain(value) for key, value in result.items()}
    if result is None or isinstance(result, (str, bool, int)):
        return result
    if isinstance(result, numbers.Number) or hasattr(result, "shape"):
        return float(result)
    return str(result)


def _value(result: Any) -> float:
    if isinstance(result, dict):
        if "value" not in result:
            raise ValueError(
                "`metrics` must return a number or a dictionary with 'value'. "
                f"Received: {sorted(result)}"
            )
        result = result["value"]
    return float(result)
