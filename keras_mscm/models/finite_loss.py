"""Stops training when the loss is no longer a number."""

import math
import threading
from typing import Any

import keras
from keras import ops

from keras_mscm.models import moving_average


class FiniteLoss(keras.callbacks.Callback):
    """Stops a `fit` whose loss is NaN or infinite; keeps the last good weights.

    The weights that made such a loss are gone with its update. What is left is
    their moving average, which takes no value that is not finite: the trained
    network gets it back, before any other callback can save the bad one.
    """

    # Keras may then call it from a thread, and need not wait for each step.
    async_safe = True

    def __init__(self):
        super().__init__()
        self.diverged: str | None = None
        self.restored = False

    def on_train_begin(self, logs: Any = None) -> None:
        self.diverged, self._thread = None, threading.get_ident()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if self.diverged is None and not math.isfinite(loss):
            self.diverged = f"batch {batch}, loss {loss}"
            # Not `self.model`, which on JAX moves state between steps.
            self._model.stop_training = True
            # A callback that saves at batches has Keras call all of them here
            # and now, from the thread of the training.
            if threading.get_ident() == self._thread:
                self._restore()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self.diverged is not None:
            self.diverged = f"epoch {epoch + 1}, {self.diverged}"
            self._restore()

    def _restore(self) -> None:
        model = self.model
        self.restored = model.ema_network is not model.network
        for average, weight in moving_average.pairs(
            model.ema_network, model.network
        ):
            weight.assign(ops.cast(ops.copy(average.value), weight.dtype))
        for state in model.optimizer.variables:
            if "float" in state.dtype:
                finite = ops.isfinite(state.value)
                state.assign(ops.where(finite, state.value, 0.0))

    def raise_if_diverged(self) -> None:
        """Raises `FloatingPointError` if training was stopped."""
        if self.diverged is not None:
            weights = (
                "The weights are the last finite ones of their moving average"
                if self.restored
                else "The weights are lost, because ema=None keeps no average"
            )
            raise FloatingPointError(
                "Training stopped: the loss is no longer finite "
                f"({self.diverged}). {weights}. Look for images that are not "
                "finite, or lower the learning rate."
            )
