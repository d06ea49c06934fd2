"""Keras' training loop; nothing starts before it is checked.

The functions whose first argument is a model are methods of `DenoisingModel`.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import keras
from keras import ops

from keras_mscm import backend, checks
from keras_mscm.models import data_checks, fit_arguments
from keras_mscm.models.finite_loss import FiniteLoss
from keras_mscm.preset_files import untrusted


def compile_model(
    model: Any,
    optimizer: Any = "adam",
    loss: Any = None,
    **kwargs: Any,
) -> None:
    """Configures training, as `keras.Model.compile`.

    Args:
        optimizer: Keras optimizer, or its name.
        loss: Loss that gives one value per example (see `keras_mscm.losses`);
            the algorithm's own by default.
        **kwargs: As for `keras.Model.compile`.

    Raises:
        ValueError: If the loss is unknown, or not one value per example.
    """
    fit_arguments.check_compile(kwargs)
    optimizer = fit_arguments.as_optimizer(optimizer)
    loss = fit_arguments.as_loss(loss) or model.default_loss()
    shape = model.space.shape
    fit_arguments.check_loss(loss, shape)
    keras.Model.compile(model, optimizer=optimizer, loss=loss, **kwargs)
    model._jit_compile_given = kwargs.get("jit_compile", "auto")
    # Built here, because Keras would do it by calling the model on raw images.
    model.optimizer.build(model.trainable_variables)
    images, weight = ops.zeros((2, *shape)), ops.ones((2,))
    model.compute_loss(None, images, images, weight)
    model.compute_metrics(None, images, images, weight)
    model.reset_metrics()


def get_compile_config(model: Any) -> dict[str, Any]:
    """What `compile` was given, for a file that any backend can load."""
    config = backend.portable(keras.Model.get_compile_config(model))
    if config:
        # Keras writes what "auto" came to. On PyTorch that is not to compile,
        # without which JAX crawls; on JAX it is to compile, which takes PyTorch
        # minutes.
        config["jit_compile"] = model._jit_compile_given
    return config


def compile_from_config(model: Any, config: dict[str, Any]) -> None:
    """Compiles a loaded model as it was saved."""
    model.compile(**untrusted.deserialize(config))


def fit(
    model: Any,
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
        x: Images `(num, height, width, channels)`, floats in [-1, 1], or what
            else the model's space is; or a `tf.data.Dataset`, `PyDataset`,
            `DataLoader` or generator of `images` or `(images, y)`.
        y: What the network is conditioned on, where `x` is an array: labels,
            integers `(num,)`, or a dictionary by name, such as `{"context":
            ..., "context_mask": ..., "labels": ...}`.
        *args: As for `keras.Model.fit`.
        callbacks: As for `keras.Model.fit`.
        validation_data: As for `keras.Model.fit`: `images`, `(images,
            labels)` or a stream of either.
        nonnegative: Whether it is meant that no image goes below 0. Else such
            images are taken for ones in [0, 1]: an error, or a warning where
            only the first batch is known.
        **kwargs: As for `keras.Model.fit`.

    Returns:
        Keras' `History`.

    Raises:
        ValueError: If the data are not of this model, or the model isn't ready
            to be trained. Arrays, and of a stream what is known of it and its
            first batch, are checked before anything is compiled; its other
            batches as they pass, on the host (not those that lie on an
            accelerator already).
        FloatingPointError: If the loss is no longer finite. The weights are
            then the moving average's last finite ones.
    """
    run = check_fit(
        model, x, y, args, kwargs, callbacks, validation_data, nonnegative
    )
    with run.watching(model):
        history = keras.Model.fit(
            model,
            run.x,
            y,
            *args,
            callbacks=run.callbacks,
            validation_data=run.validation_data,
            **kwargs,
        )
    run.finite_loss.raise_if_diverged()
    return history


def evaluate(
    model: Any,
    x: Any = None,
    y: Any = None,
    *args: Any,
    nonnegative: bool = False,
    **kwargs: Any,
) -> Any:
    """Evaluates the loss, as `keras.Model.evaluate`; data as for `fit`."""
    run = check_evaluate(model, x, y, args, kwargs, nonnegative)
    with run.watching(model):
        return keras.Model.evaluate(model, run.x, y, *args, **kwargs)


def predict(model: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Predicts `x`, as `keras.Model.predict`; inputs as for `call`."""
    with backend.values_kept(model):
        return keras.Model.predict(model, x, *args, **kwargs)


def make_train_function(model: Any, force: bool = False) -> Any:
    """As Keras', for a model that is ready."""
    check_ready(model)
    return keras.Model.make_train_function(model, force)


def make_test_function(model: Any, force: bool = False) -> Any:
    """As Keras', for a model that is ready."""
    check_ready(model)
    return keras.Model.make_test_function(model, force)


@dataclass
class Run:
    """A checked call of `fit` or `evaluate`, as Keras is to get it.

    Attributes:
        x: Data that are watched as they pass, if they are a stream.
        validation_data: Likewise.
        callbacks: Those that were given, and the guard of the loss.
        finite_loss: That guard.
    """

    x: Any
    given: Any
    watches: list
    validation_data: Any = None
    callbacks: list = field(default_factory=list)
    finite_loss: FiniteLoss = field(default_factory=FiniteLoss)

    @contextlib.contextmanager
    def watching(self, model: keras.Model) -> Iterator[None]:
        """Tells what was found wrong on the way, and keeps the weights."""
        with contextlib.ExitStack() as stack:
            for watch in self.watches:
                stack.enter_context(watch.reporting())
            stack.enter_context(backend.values_kept(model))
            # Keras tells a callback neither of the data nor of a failure.
            for callback in self.callbacks:
                if hasattr(callback, "during_fit"):
                    stack.enter_context(callback.during_fit(model, self.given))
            yield


def check_ready(model: Any) -> None:
    """Raises if the model can't be trained or evaluated yet."""
    if not model.compiled:
        raise ValueError(
            "The model must be compiled before `fit` or `evaluate`: call "
            "`model.compile(optimizer=...)`. Received: a model that is not"
        )
    data_checks.check_distribution(model)
    if model.needs_teacher and not model.teacher.attached:
        raise ValueError(
            "`teacher` must be attached before a student with "
            "method='distillation' is trained or evaluated; a file holds "
            "none. Call `student.attach_teacher(teacher)`. Received: None"
        )


def check_fit(
    model: Any,
    x: Any,
    y: Any,
    args: tuple,
    kwargs: dict[str, Any],
    callbacks: Any,
    validation_data: Any,
    nonnegative: Any,
) -> Run:
    """Checks what `fit` was given; the arguments are its own.

    Raises:
        ValueError: If the data are not of the model, an argument isn't one of
            Keras', or there is nothing to train.
    """
    check_ready(model)
    if not model.trainable_variables:
        raise ValueError(
            "`network` must have weights that are trained: none of its "
            "layers is trainable. Received: a network that is frozen as a "
            "whole"
        )
    _check_class_weight(y, kwargs.get("class_weight"))
    named = dict(zip(("batch_size", "epochs", "verbose"), args))
    fit_arguments.check_fit({"callbacks": callbacks, **named, **kwargs})
    passing, watches = watched(
        model, "x", x, y, kwargs.get("sample_weight"), nonnegative=nonnegative
    )
    batch_size = args[0] if args else kwargs.get("batch_size")
    share = 1 - kwargs.get("validation_split", 0.0)
    shares = backend.shares(model)
    data_checks.check_shares("x", x, share, batch_size, shares)
    if isinstance(validation_data, (list, tuple)):
        if not 1 <= len(validation_data) <= 3:
            raise ValueError(
                "`validation_data` must be images, (images, labels), "
                "(images, labels, sample_weight) or a stream of these. "
                f"Received: {len(validation_data)} parts"
            )
        watched(
            model, "validation_data", *validation_data, nonnegative=nonnegative
        )
    elif validation_data is not None:
        validation_data, more = watched(
            model, "validation_data", validation_data, nonnegative=nonnegative
        )
        watches += more
    run = Run(passing, x, watches, validation_data)
    run.callbacks = [run.finite_loss, *_as_list(callbacks)]
    return run


def check_evaluate(
    model: Any, x: Any, y: Any, args: tuple, kwargs: dict, nonnegative: Any
) -> Run:
    """Checks what `evaluate` was given; the arguments are its own."""
    check_ready(model)
    if kwargs.get("_use_cached_eval_dataset"):  # `fit` has checked it
        return Run(x, x, [])
    fit_arguments.check_fit({**dict(zip(("batch_size",), args)), **kwargs})
    batch_size = args[0] if args else kwargs.get("batch_size")
    weight = kwargs.get("sample_weight")
    data, watches = watched(model, "x", x, y, weight, nonnegative=nonnegative)
    data_checks.check_shares("x", x, 1, batch_size, backend.shares(model))
    return Run(data, x, watches)


def watched(
    model: Any,
    name: str,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    nonnegative: Any = False,
) -> tuple[Any, list]:
    """Data that are checked, now and as they pass, and what watches."""
    expected = data_checks.Expected(
        model.space,
        model.conditioning,
        checks.check_boolean("nonnegative", nonnegative),
        # TensorFlow divides a smaller last batch unevenly; JAX doesn't.
        backend.shares(model) if backend.NAME == "jax" else 1,
    )
    x, watch = data_checks.check_data(name, x, y, sample_weight, expected)
    return x, [] if watch is None else [watch]


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
