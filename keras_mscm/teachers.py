"""What a student learns from, within the student's model."""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_mscm import functional as F
from keras_mscm.conditioning import Conditioning, Declared, absent
from keras_mscm.functional.process import Tensor

Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]


class Teacher(keras.layers.Layer):
    """Predicts `x` from `(z, logsnr, conditioning)`: no gradients, frozen.

    A network with its parameterization, or a closed form. A network's
    variables are part of the model's state, so that a compiled step takes them
    as inputs, not as constants. They are not trained, and not saved unless
    `saved` is set: Keras finds what to save by `dir()`, and there the network
    is missing.

    Attributes:
        network: The network that it holds, or None.
        attached: Whether there is something to learn from.
        saved: Whether the network is in the model's file.
    """

    saved = False

    def __init__(self, **kwargs: Any):
        super().__init__(trainable=False, **kwargs)
        self.network: Any = None
        self._closed_form: Predict | None = None
        self.built = True

    @property
    def attached(self) -> bool:
        return self.network is not None or self._closed_form is not None

    def hold(
        self,
        network: keras.Layer | None,
        prediction_type: str = "v",
        conditioning: Declared | None = None,
        closed_form: Predict | None = None,
    ) -> None:
        """Takes a network, or a closed form, instead of the one before.

        Args:
            network: Network, which is frozen; None with a closed form.
            prediction_type: What it predicts: `"v"`, `"x"` or `"epsilon"`.
            conditioning: What says nothing, for guidance.
            closed_form: Function of `(z, logsnr, conditioning)` that gives
                `x`, in `keras.ops`.
        """
        if self.network is not None:
            self._tracker.untrack(self.network)
        if network is not None:
            network.trainable = False
        self.network, self._closed_form = network, closed_form
        self._prediction_type = prediction_type
        # A function, because Keras would track a dictionary.
        self._conditioning = lambda: conditioning or {}

    def predict(
        self, z: Tensor, logsnr: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """The prediction of `x`, float32.

        Args:
            z: Noisy examples, `(batch, ...)`.
            logsnr: Their log-SNR, `(batch,)`.
            conditioning: What the network takes besides.
        """
        if self._closed_form is not None:
            x = self._closed_form(z, logsnr, conditioning)
            return ops.cast(x, "float32")
        inputs = {"z": z, "logsnr": logsnr, **conditioning}
        output = ops.cast(self.network(inputs, training=False), "float32")
        return F.predict_x(output, z, logsnr, self._prediction_type)

    def teach(
        self,
        z: Tensor,
        logsnr: Tensor,
        conditioning: Conditioning,
        guidance_scale: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """The prediction of `x` with guidance, and the conditional one.

        Args:
            z: Noisy examples, `(batch, ...)`.
            logsnr: Their log-SNR, `(batch,)`.
            conditioning: What the network takes besides.
            guidance_scale: 1 for none; else both predictions come from one
                batched call.
        """
        if guidance_scale == 1:
            x = self.predict(z, logsnr, conditioning)
            return x, x
        without = absent(self._conditioning(), conditioning)
        return F.guided(
            self.predict, z, logsnr, conditioning, without, guidance_scale
        )

    def __dir__(self) -> list[str]:
        hidden = () if self.saved else ("network",)
        return [name for name in super().__dir__() if name not in hidden]


class FrozenNetwork(Teacher):
    """A teacher that is a part of its model, and of the model's file.

    Keras writes it by the name of its class, which is the one of version 0.1.
    """

    saved = True
