"""Attention of several heads, whose queries and keys are normalised."""

import math
from typing import Any

import keras
from keras import ops

from keras_mscm import backend
from keras_mscm.functional.process import Tensor
from keras_mscm.networks.arguments import check_head, check_size


def split_heads(
    tokens: Tensor, dense: keras.layers.Dense, parts: tuple[int, int, int]
) -> list[Tensor]:
    """A dense layer's output in parts, of several heads each.

    Each part is a matrix product of its own, because on TPUs slicing a larger
    product and transposing the slice take longer than the product.

    Args:
        tokens: `(batch, length, channels)`.
        dense: Dense layer with bias, without activation.
        parts: Number of parts, heads of each, and channels of a head.

    Returns:
        A list of `(batch, length, heads, channels of a head)`.
    """
    # The casts are explicit, because Keras casts inputs only when a layer is
    # called, and its autocast scope for weights isn't active when PyTorch
    # rematerialises a block.
    tokens, kernel, bias = (
        ops.cast(x, dense.compute_dtype)
        for x in (tokens, dense.kernel, dense.bias)
    )
    kernels = ops.reshape(kernel, (-1, *parts))
    biases = ops.reshape(bias, parts)
    return [
        backend.projected(tokens, kernels[:, i], biases[i])
        for i in range(parts[0])
    ]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    norm_query: keras.layers.RMSNormalization,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention of queries and keys that are normalised per head.

    Args:
        query: `(batch, places, heads, channels)`.
        key: `(batch, length, heads, channels)`.
        value: `(batch, length, heads, channels)`.
        norm_query: The queries' normalisation. The keys' has no weights.
        mask: True where a key counts, of a shape that broadcasts to `(batch,
            heads, places, length)`. None if all do.

    Returns:
        `(batch, places, heads, channels)`.

    Reference:
        Dehghani et al., *Scaling vision transformers to 22 billion
        parameters*, 2023.
    """
    return backend.normalized_attention(
        query,
        key,
        value,
        query_scale=norm_query.scale,
        epsilons=(norm_query.epsilon, keras.config.epsilon()),
        mask=mask,
    )


@keras.saving.register_keras_serializable(package="keras_mscm")
class CrossAttention(keras.layers.Layer):
    """Conditions an image on a sequence, such as the tokens of a caption.

    Each place of the image attends to the sequence. Queries and keys are
    normalised per head, as in `TransformerBlock`.

    Args:
        head_width: Width of an attention head; must divide the channels.
        **kwargs: As for any Keras layer.

    Call arguments:
        inputs: Places, `(batch, places, channels)`; tokens, `(batch, length,
            context_width)`; and their mask, `(batch, length)`, True for at
            least one token of each image.

    Call returns:
        What is to be added to the places.

    Raises:
        ValueError: If `head_width` isn't an integer in 1..65536 that divides
            the channels, which is known when the layer is built.
    """

    def __init__(self, head_width: int = 64, **kwargs: Any):
        super().__init__(**kwargs)
        self.head_width = check_size("head_width", head_width)

    def build(self, input_shape: tuple) -> None:
        places, tokens, _ = input_shape
        width, policy = places[-1], self.dtype_policy
        check_head(width, self.head_width)
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
        self.query.build(places)
        self.key_value.build(tokens)
        self.attention_output.build(places)

    def call(self, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        places, tokens, mask = inputs
        heads = (self.num_heads, self.head_width)
        (query,) = split_heads(places, self.query, (1, *heads))
        key, value = split_heads(tokens, self.key_value, (2, *heads))
        attended = attend(
            query, key, value, self.norm_query, mask[:, None, None]
        )
        attended = ops.reshape(attended, (-1, *places.shape[1:]))
        return self.attention_output(attended)

    def flops(self, height: int, width: int, length: int) -> int:
        """FLOPs for one image of `height` x `width` places, `length` tokens."""
        places, channels = height * width, self.query.kernel.shape[-1]
        products = 2 * places * channels**2  # query and output
        products += length * math.prod(self.key_value.kernel.shape)
        products += 2 * places * length * channels  # q k, then times v
        return 2 * products

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "head_width": self.head_width}
