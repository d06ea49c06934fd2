"""Keras' training loop, for images; nothing starts before they are checked."""

import contextlib
import functools
from typing import Any

import keras
from keras import ops

from keras_mscm import backend, checks
from keras_mscm.models import data_checks, fit_arguments
from keras_mscm.models.finite_loss import FiniteLoss
from keras_mscm.preset_files import untrusted


class FittedModel(keras.Model):
    """`compile`, `fit`, `evaluate` and `predict` of a `DenoisingModel`.

    Its attributes are the arguments of `DenoisingModel`.
    """

    image_shape: tuple[int, ...]
    num_classes: int | None
    context_width: int | None

    def default_loss(self) -> keras.losses.Loss:
        """The loss that `compile` takes when none is given."""
        raise NotImplementedError

    def compile(
        self,
        optimizer: Any = "adam",
        loss: Any = None,
        **kwargs: Any,
    ) -> None:
        """Configures training, as `keras.Model.compile`.

        Args:
            optimizer: Keras optimizer, or its name.
            loss: Loss that gives one value per example (see
                `keras_mscm.losses`); the algorithm's own by default.
            **kwargs: As for `keras.Model.compile`.

        Raises:
            ValueError: If the loss is unknown, or not one value per example.
        """
        fit_arguments.check_compile(kwargs)
        optimizer = fit_arguments.as_optimizer(optimizer)
        loss = fit_arguments.as_loss(loss) or self.default_loss()
        fit_arguments.check_loss(loss, self.image_shape)
        super().compile(optimizer=optimizer, loss=loss, **kwargs)
        self._jit_compile_given = kwargs.get("jit_compile", "auto")
        # Built here, as Keras would do it by calling the model on raw images.
        self.optimizer.build(self.trainable_variables)
        images, weight = ops.zeros((2, *self.image_shape)), ops.ones((2,))
        self.compute_loss(None, images, images, weight)
        self.compute_metrics(None, images, images, weight)
        self.reset_metrics()

    def get_compile_config(self) -> dict[str, Any]:
        """What `compile` was given, for a file that any backend can load."""
        config = backend.portable(super().get_compile_config())
        if config:
            # Keras writes what "auto" came to. On PyTorch that is not to
            # compile, without which JAX crawls; on JAX it is to compile, which
            # takes PyTorch minutes.
            config["jit_compile"] = self._jit_compile_given
        return config

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles a loaded model as it was saved."""
        self.compile(**untrusted.deserialize(config))

    def _check_ready(self) -> None:
        """Raises if the model can't be trained or evaluated yet."""
        if not self.compiled:
            raise ValueError(
                "The model must be compiled before `fit` or `evaluate`: call "
                "`model.compile(optimizer=...)`. Received: a model that is not"
            )
        data_checks.check_distribution(self)

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        *args: Any,
        callbacks: Any = None,
        validation_data: Any = None,
        nonnegative: bool = False,
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """Trains the model, as `keras.Model.fit`.

        Args:
            x: Images `(num, height, width, channels)`, floats in [-1, 1]; or
                a `tf.data.Dataset`, `PyDataset`, `DataLoader` or generator of
                `images` or `(images, y)`.
            y: Labels, where `x` is an array: integers, `(num,)`. For a network
                with sequence conditioning, a dictionary of `"context"`, `(num,
                length, context_width)`, `"context_mask"`, `(num, length)`, and
                `"labels"`, if it has classes as well.
            *args: As for `keras.Model.fit`.
            callbacks: As for `keras.Model.fit`.
            validation_data: As for `keras.Model.fit`: `images`, `(images,
                labels)` or a stream of either.
            nonnegative: Whether it is meant that no image goes below 0. Else
                such images are taken for ones in [0, 1]: an error, or a warning
                where only the first batch is known.
            **kwargs: As for `keras.Model.fit`.

        Returns:
            Keras' `History`.

        Raises:
            ValueError: If the data are not of this model, or the model isn't
                ready to be trained. Arrays, and of a stream what is known of it
                and its first batch, are checked before anything is compiled;
                its other batches as they pass, on the host (not those that lie
                on an accelerator already).
            FloatingPointError: If the loss is no longer finite. The weights
                are then the moving average's last finite ones.
        """
        self._check_ready()
        self._check_trainable()
        _check_class_weight(y, kwargs.get("class_weight"))
        named = dict(zip(("batch_size", "epochs", "verbose"), args))
        fit_arguments.check_fit({"callbacks": callbacks, **named, **kwargs})
        data = functools.partial(self._watched, nonnegative=nonnegative)
        passing, watches = data("x", x, y, kwargs.get("sample_weight"))
        batch_size = args[0] if args else kwargs.get("batch_size")
        share = 1 - kwargs.get("validation_split", 0.0)
        shares = backend.shares(self)
        data_checks.check_shares("x", x, share, batch_size, shares)
        if isinstance(validation_data, (list, tuple)):
            if not 1 <= len(validation_data) <= 3:
                raise ValueError(
                    "`validation_data` must be images, (images, labels), "
                    "(images, labels, sample_weight) or a stream of these. "
                    f"Received: {len(validation_data)} parts"
                )
            data("validation_data", *validation_data)
        elif validation_data is not None:
            validation_data, more = data("validation_data", validation_data)
            watches += more
        finite_loss = FiniteLoss()
        callbacks = [finite_loss, *_as_list(callbacks)]
        with contextlib.ExitStack() as stack:
            for watch in watches:
                stack.enter_context(watch.reporting())
            stack.enter_context(backend.values_kept(self))
            # Keras tells a callback neither of the data nor of a failure.
            for callback in callbacks:
                if hasattr(callback, "during_fit"):
                    stack.enter_context(callback.during_fit(self, x))
            history = super().fit(
                passing,
                y,
                *args,
                callbacks=callbacks,
                validation_data=validation_data,
                **kwargs,
            )
        finite_loss.raise_if_diverged()
        return history

    def evaluate(
        self,
        x: Any = None,
        y: Any = None,
        *args: Any,
        nonnegative: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Evaluates the loss, as `keras.Model.evaluate`; data as for `fit`."""
        self._check_ready()
        watches: list = []
        if not kwargs.get("_use_cached_eval_dataset"):  # `fit` has checked it
            fit_arguments.check_fit(
                {**dict(zip(("batch_size",), args)), **kwargs}
            )
            batch_size = args[0] if args else kwargs.get("batch_size")
            weight = kwargs.get("sample_weight")
            data, watches = self._watched(
                "x", x, y, weight, nonnegative=nonnegative
            )
            shares = backend.shares(self)
            data_checks.check_shares("x", x, 1, batch_size, shares)
            x = data
        with contextlib.ExitStack() as stack:
            for watch in watches:
                stack.enter_context(watch.reporting())
            stack.enter_context(backend.values_kept(self))
            return super().evaluate(x, y, *args, **kwargs)

    def predict(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Predicts `x`, as `keras.Model.predict`; inputs as for `call`."""
        with backend.values_kept(self):
            return super().predict(x, *args, **kwargs)

    def make_train_function(self, force: bool = False) -> Any:
        """As Keras', for a model that is ready."""
        self._check_ready()
        return super().make_train_function(force)

    def make_test_function(self, force: bool = False) -> Any:
        """As Keras', for a model that is ready."""
        self._check_ready()
        return super().make_test_function(force)

    def _watched(
        self,
        name: str,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        nonnegative: bool = False,
    ) -> tuple[Any, list]:
        """Data that are checked, now and as they pass, and what watches."""
        expected = data_checks.Expected(
            self.image_shape,
            self.num_classes,
            self.context_width,
            checks.check_boolean("nonnegative", nonnegative),
            # TensorFlow divides a smaller last batch unevenly; JAX doesn't.
            backend.shares(self) if backend.NAME == "jax" else 1,
        )
        x, watch = data_checks.check_data(name, x, y, sample_weight, expected)
        return x, [] if watch is None else [watch]

    def _check_trainable(self) -> None:
        if not self.trainable_variables:
            raise ValueError(
                "`network` must have weights that are trained: none of its "
                "layers is trainable. Received: a network that is frozen as a "
                "whole"
            )


def _check_class_weight(y: Any, class_weight: Any) -> None:
    """Raises unless there are labels that classes can be weighted by."""
    if class_weight is not None and not hasattr(y, "shape"):
        raise ValueError(
            "`class_weight` must come with an array of labels as `y`; a stream "
            "gives `(images, labels, sample_weight)` instead. Received: y="
            f"{checks.describe(y)}"
        )


def _as_list(callbacks: Any) -> list:
    if callbacks is None:
        return []
    if isinstance(callbacks, keras.callbacks.CallbackList):
        return callbacks.callbacks
    return (
        list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]
    )
