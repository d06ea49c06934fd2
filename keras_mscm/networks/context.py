"""Conditioning on a sequence, such as the tokens of a caption."""

import math
from typing import Any

import keras
from keras import ops

from keras_mscm.functional.process import Tensor
from keras_mscm.networks.arguments import check_size


@keras.saving.register_keras_serializable(package="keras_mscm")
class ContextEmbedding(keras.layers.Layer):
    """Takes in a sequence that a network is to be conditioned on.

    It readies the sequence for cross-attention, and pools it. A learned null
    token goes before the sequence and is never masked, because an image
    without any real token needs something to attend to and to average: it is
    unconditional. What stands at masked places has no influence.

    Args:
        width: Length of the pooled embedding.
        **kwargs: As for any Keras layer.

    Call arguments:
        inputs: Sequence, `(batch, length, context_width)`, and mask, `(batch,
            length)`, True (or 1) at real tokens.

    Call returns:
        RMS-normalised tokens, `(batch, 1 + length, context_width)`; their
        mask, `(batch, 1 + length)`; and a projection of their mean, `(batch,
        width)`.

    Raises:
        ValueError: If `width` isn't an integer in 1..65536.

    Reference:
        Saharia et al., *Imagen*, 2022, section 2.4 and appendix B.1.
    """

    def __init__(self, width: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.width = check_size("width", width)
        self.projection = keras.layers.Dense(
            self.width, dtype=self.dtype_policy, name="projection"
        )

    def build(self, input_shape: tuple) -> None:
        sequence, _ = input_shape
        self.null_token = self.add_weight(
            shape=(sequence[-1],),
            initializer=keras.initializers.RandomNormal(stddev=1.0),
            name="null_token",
        )
        self.projection.build((None, sequence[-1]))

    def call(
        self, inputs: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        sequence, mask = inputs
        batch, width = ops.shape(sequence)[0], sequence.shape[-1]
        mask = ops.cast(mask, "bool")
        # `where` and not a product, because padding may be anything, even NaN.
        sequence = ops.where(mask[..., None], sequence, 0)
        null = ops.broadcast_to(
            ops.cast(self.null_token, sequence.dtype), (batch, 1, width)
        )
        tokens = ops.rms_normalization(
            ops.concatenate([null, sequence], axis=1)
        )
        mask = ops.concatenate([ops.ones((batch, 1), "bool"), mask], axis=1)
        share = ops.cast(mask, "float32")
        share = share / ops.sum(share, axis=1, keepdims=True)
        mean = ops.sum(ops.cast(tokens, "float32") * share[..., None], axis=1)
        return tokens, mask, self.projection(mean)

    def flops(self) -> int:
        """FLOPs for one image."""
        return 2 * math.prod(self.projection.kernel.shape)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "width": self.width}
