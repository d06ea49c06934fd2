"""Conditioning on a sequence, such as the tokens of a caption."""

import math
from typing import Any

import keras
from keras import ops

from keras_mscm import backend
from keras_mscm.functional.process import Tensor


@keras.saving.register_keras_serializable(package="keras_mscm")
class ContextEmbedding(keras.layers.Layer):
    """Readies a sequence for cross-attention, and pools it.

    A learned null token goes before the sequence and is never masked. So an
    image without any real token has something to attend to and to average: it
    is unconditional. What stands at masked places has no influence.

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

    Reference:
        Saharia et al., *Imagen*, 2022, section 2.4 and appendix B.1.
    """

    def __init__(self, width: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.width = width
        self.projection = keras.layers.Dense(
            width, dtype=self.dtype_policy, name="projection"
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
        # Chosen and not multiplied, as padding may be anything, NaN too.
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
        """Of one image."""
        return 2 * math.prod(self.projection.kernel.shape)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "width": self.width}


@keras.saving.register_keras_serializable(package="keras_mscm")
class CrossAttention(keras.layers.Layer):
    """Each place of the feature maps attends to a sequence.

    Queries and keys are normalised per head, as in `TransformerBlock`.

    Args:
        head_width: Width of an attention head; must divide the channels.
        **kwargs: As for any Keras layer.

    Call arguments:
        inputs: Feature maps, `(batch, height, width, channels)`; tokens,
            `(batch, length, context_width)`; and their mask, `(batch,
            length)`, True for at least one token of each image.

    Call returns:
        What is to be added to the feature maps.
    """

    def __init__(self, head_width: int = 64, **kwargs: Any):
        super().__init__(**kwargs)
        self.head_width = head_width

    def build(self, input_shape: tuple) -> None:
        maps, tokens, _ = input_shape
        width, policy = maps[-1], self.dtype_policy
        self.num_heads = width // self.head_width

        def dense(units, name, **kw):
            return keras.layers.Dense(units, dtype=policy, name=name, **kw)

        self.norm_query = keras.layers.RMSNormalization(
            dtype=policy, name="norm_query"
        )
        self.query = dense(width, "query")
        self.key_value = dense(2 * width, "key_value")
        self.attention_output = dense(
            width, "attention_output", kernel_initializer="zeros"
        )
        self.norm_query.build((None, None, self.num_heads, self.head_width))
        self.query.build(maps)
        self.key_value.build(tokens)
        self.attention_output.build(maps)

    def call(self, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        maps, tokens, mask = inputs
        _, height, width, channels = maps.shape
        heads = (self.num_heads, self.head_width)
        places = ops.reshape(maps, (-1, height * width, channels))
        (query,) = split_heads(places, self.query, (1, *heads))
        key, value = split_heads(tokens, self.key_value, (2, *heads))
        attended = backend.dot_product_attention(
            self.norm_query(query),
            ops.rms_normalization(key),
            value,
            query_scale=self.norm_query.scale,
            mask=mask[:, None, None],
        )
        attended = ops.reshape(attended, (-1, height, width, channels))
        return self.attention_output(attended)

    def flops(self, height: int, width: int, length: int) -> int:
        """Of one image, on `height` x `width` places and `length` tokens."""
        places, channels = height * width, self.query.kernel.shape[-1]
        products = 2 * places * channels**2  # query and output
        products += length * math.prod(self.key_value.kernel.shape)
        products += 2 * places * length * channels  # q k, then times v
        return 2 * products

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "head_width": self.head_width}


def split_heads(
    tokens: Tensor, dense: keras.layers.Dense, parts: tuple[int, int, int]
) -> list[Tensor]:
    """A dense layer's output in parts, of several heads each.

    Each part is a product of its own. On TPUs, to cut it out of a larger one,
    and to change the order of its axes, takes longer than the product.

    Args:
        tokens: `(batch, length, channels)`.
        dense: Dense layer with bias, without activation.
        parts: Number of parts, heads of each, and channels of a head.

    Returns:
        A list of `(batch, length, heads, channels of a head)`.
    """
    # Keras casts on the way into a layer; nor is its scope for weights there
    # when PyTorch computes a block again.
    tokens, kernel, bias = (
        ops.cast(x, dense.compute_dtype)
        for x in (tokens, dense.kernel, dense.bias)
    )
    kernels = ops.reshape(kernel, (-1, *parts))
    biases = ops.reshape(bias, parts)
    return [
        ops.einsum("blc,chd->blhd", tokens, kernels[:, i]) + biases[i]
        for i in range(parts[0])
    ]
