"""Which framework runs underneath Keras."""

from typing import Any

import keras

NAME = keras.backend.backend()

if NAME not in ("jax", "tensorflow", "torch"):
    raise ImportError(
        "keras_mscm runs on the Keras backends 'jax', 'tensorflow' and "
        f"'torch'. Received: KERAS_BACKEND={NAME}"
    )


def portable(config: Any) -> Any:
    """A serialised object without what only one backend has.

    On PyTorch Keras writes down its own subclasses of the optimizers, which
    load on the other backends, but fail in the first step.

    Args:
        config: What `keras.saving.serialize_keras_object` has returned.

    Returns:
        The same with Keras' public optimizers.
    """
    if isinstance(config, (list, tuple)):
        return [portable(item) for item in config]
    if not isinstance(config, dict):
        return config
    config = {name: portable(value) for name, value in config.items()}
    if str(config.get("module")).startswith("keras.src.backend.torch.optim"):
        config |= {"module": "keras.optimizers", "registered_name": None}
    return config
