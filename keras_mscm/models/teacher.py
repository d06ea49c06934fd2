"""A network that is used in training but is not the model's own."""

from typing import Any

import keras


class FrozenNetwork(keras.layers.Layer):
    """Holds another model's network: no gradients, and nothing in the file.

    Its variables are part of the model's state, so that a compiled step takes
    them as inputs, not as constants. They are not trained and not saved:
    Keras finds what to save by `dir()`, and there the network is missing.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(trainable=False, **kwargs)
        self.network: keras.Layer | None = None
        self.built = True

    def hold(self, network: keras.Layer) -> None:
        """Takes a network, instead of the one before."""
        if self.network is not None:
            self._tracker.untrack(self.network)
        network.trainable = False
        self.network = network

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if name != "network"]
