"""The blocks of a UViT (Hoogeboom et al., 2023, appendix B)."""

import math
from typing import Any

import keras
from keras import ops

from keras_mscm import backend, checks
from keras_mscm.functional.process import Tensor
from keras_mscm.networks.arguments import (
    MAX_RATIO,
    MAX_TIME_RATE,
    check_even,
    check_head,
    check_rate,
    check_size,
    check_time_rate,
)
from keras_mscm.networks.attention import CrossAttention, attend, split_heads
from keras_mscm.networks.dropout import Dropout, dropped, first_example
from keras_mscm.networks.normalization import GroupNormalization


@keras.saving.register_keras_serializable(package="keras_mscm")
class NoiseLevelEmbedding(keras.layers.Layer):
    """For a network of your own that is to know the noise level.

    It embeds a log-SNR by sinusoids of its angle and a small MLP. The angle
    `2 / pi atan(exp(-logsnr / 2))` lies in (0, 1) and is the time of the plain
    cosine schedule, whatever schedule made the noise.

    Args:
        width: Length of the embedding, even and at least 4.
        begins_at_zero: Whether the embedding is zero until it is trained, so
            that a network it is added to predicts as before.
        time_rate: Rate of the fastest sinusoid, in radians over the whole of
            time, in [2, 1000]. A network of 1000 tells noise levels apart that
            are next to equal, but its derivative by time is mostly ripples.
        **kwargs: As for any Keras layer.

    Call arguments:
        logsnr: Log-SNR, `(batch,)`.

    Call returns:
        Embedding, `(batch, width)`.

    Raises:
        ValueError: If an argument isn't as above.
    """

    def __init__(
        self,
        width: int,
        begins_at_zero: bool = False,
        time_rate: float = MAX_TIME_RATE,
        **kwargs: Any,
    ):
        super().__init__(autocast=False, **kwargs)
        self.width = width = check_even("width", width)
        self.begins_at_zero = checks.check_boolean(
            "begins_at_zero", begins_at_zero
        )
        self.time_rate = check_time_rate("time_rate", time_rate)
        self.hidden = keras.layers.Dense(
            width, activation="swish", dtype=self.dtype_policy, name="hidden"
        )
        kernel = "zeros" if begins_at_zero else "glorot_uniform"
        self.projection = keras.layers.Dense(
            width,
            kernel_initializer=kernel,
            dtype=self.dtype_policy,
            name="projection",
        )

    def build(self, input_shape: tuple) -> None:
        self.hidden.build((None, self.width))
        self.projection.build((None, self.width))

    def call(self, logsnr: Tensor) -> Tensor:
        # The phases are float32 whatever the policy, because half precision
        # has no room for those of the fast sinusoids.
        logsnr = ops.cast(logsnr, "float32")
        time = ops.arctan(ops.exp(-logsnr / 2)) * (2 / math.pi)
        half = self.width // 2
        # Wavelengths from 2 pi to, by default, 2 pi / 1000 of all of time.
        rates = self.time_rate ** (
            ops.arange(half, dtype="float32") / (half - 1)
        )
        phase = time[:, None] * rates[None]
        waves = ops.concatenate([ops.sin(phase), ops.cos(phase)], axis=-1)
        return self.projection(self.hidden(waves))

    def flops(self) -> int:
        """FLOPs for one image."""
        return 4 * self.width**2

    def get_config(self) -> dict[str, Any]:
        config = {**super().get_config(), "width": self.width}
        if self.begins_at_zero:
            config["begins_at_zero"] = True
        if self.time_rate != MAX_TIME_RATE:
            config["time_rate"] = self.time_rate
        return config


@keras.saving.register_keras_serializable(package="keras_mscm")
class ResNetBlock(keras.layers.Layer):
    """A block for fine resolutions, where attention would cost too much.

    It has two 3x3 convolutions, scaled and shifted by the conditioning.

    Args:
        dropout: Dropout rate before the second convolution, in [0, 1).
        seed: Seed of the dropout, in 0..2**31 - 3. None draws one.
        remat: Whether training keeps only what goes into the block, and
            computes it once more for the gradient.
        **kwargs: As for any Keras layer.

    Call arguments:
        inputs: Feature maps, `(batch, height, width, channels)`, and the
            embedding, `(batch, embedding_width)`.
        training: Whether dropout is on.

    Call returns:
        Feature maps of the same shape.

    Raises:
        ValueError: If an argument isn't as above.
    """

    def __init__(
        self,
        dropout: float = 0.0,
        seed: int | None = None,
        remat: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.dropout_rate = check_rate("dropout", dropout)
        self.seed = checks.check_seed("seed", seed)
        self.remat = checks.check_boolean("remat", remat)

    def build(self, input_shape: tuple) -> None:
        maps, embedding = input_shape
        width, policy = maps[-1], self.dtype_policy

        def conv(name, **kw):
            return keras.layers.Conv2D(
                width,
                3,
                padding="same",
                data_format="channels_last",
                dtype=policy,
                name=name,
                **kw,
            )

        def norm(name):
            return GroupNormalization(
                math.gcd(32, width), axis=-1, dtype=policy, name=name
            )

        self.norm_1, self.norm_2 = norm("norm_1"), norm("norm_2")
        self.conv_1 = conv("conv_1")
        self.conv_2 = conv("conv_2", kernel_initializer="zeros")
        self.modulation = keras.layers.Dense(
            2 * width, dtype=policy, name="modulation"
        )
        self.dropout = Dropout(
            self.dropout_rate, seed=self.seed, dtype=policy, name="dropout"
        )
        for layer in (self.norm_1, self.conv_1, self.norm_2, self.dropout):
            layer.build(maps)
        self.conv_2.build(maps)
        self.modulation.build(embedding)

    def call(
        self, inputs: tuple[Tensor, Tensor], training: bool | None = None
    ) -> Tensor:
        # The state is drawn outside of the block, because rematerialisation
        # runs the block again, which must drop the same elements.
        state = self.dropout.draw() if training else None

        def block(x, embedding):
            h = self.conv_1(ops.silu(self.norm_1(x)))
            modulation = self.modulation(ops.silu(embedding))[:, None, None]
            scale, shift = ops.split(modulation, 2, axis=-1)
            h = ops.silu(self.norm_2(h) * (1 + scale) + shift)
            h = self.dropout(h, training=training, state=state)
            return x + self.conv_2(h)

        run = backend.remat(block) if self.remat and training else block
        maps, embedding = inputs
        return run(backend.laid_out(maps), embedding)

    def flops(self, height: int, width: int) -> int:
        """FLOPs for one image of `height` x `width` places.

        A convolution's products with the padding are not counted.
        """
        taps = (3 * height - 2) * (3 * width - 2)
        kernels = taps * math.prod(self.conv_1.kernel.shape[2:])
        modulation = math.prod(self.modulation.kernel.shape)
        return 2 * (2 * kernels + modulation)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "dropout": self.dropout_rate,
            "seed": self.seed,
            "remat": self.remat,
        }


_normalized = backend.fused(ops.rms_normalization)


@backend.fused
def _modulated(
    h: Tensor, scale: Tensor, shift: Tensor, *drop: Tensor, rate: float
) -> Tensor:
    """An MLP's hidden layer, scaled and shifted; with `drop`, dropped too."""
    h = ops.silu(h) * (1 + scale) + shift
    if not drop:
        return h
    state, first = drop
    return dropped(h, state, first, rate)


@keras.saving.register_keras_serializable(package="keras_mscm")
class TransformerBlock(keras.layers.Layer):
    """A block for coarse resolutions, where each place is to see all others.

    It is self-attention, then an MLP whose hidden layer is scaled and shifted.
    Queries and keys are normalised per head (Dehghani et al., 2023). Given a
    context, the block attends to that in between.

    Keras picks a fused kernel for the attention where the backend has one:
    cuDNN's on NVIDIA's GPUs from Ampere on (JAX, in half precision), whichever
    PyTorch has for the device. There is none on TensorFlow, where it is written
    out in products. On TPUs it is written so that JAX's compiler fuses it
    (`backend.tpu_attention`).

    Args:
        head_width: Width of an attention head; must divide the channels.
        mlp_ratio: Width of the hidden layer over the channels.
        dropout: Dropout rate on the hidden layer, in [0, 1).
        seed: Seed of the dropout, in 0..2**31 - 3. None draws one.
        remat: As in `ResNetBlock`.
        **kwargs: As for any Keras layer.

    Call arguments:
        inputs: Feature maps, `(batch, height, width, channels)`, and the
            embedding, `(batch, embedding_width)`. Each place is a token. With
            a context also its tokens, `(batch, length, context_width)`, and
            their mask, `(batch, length)`, as of `ContextEmbedding`.
        training: Whether dropout is on.

    Call returns:
        Feature maps of the same shape.

    Raises:
        ValueError: If an argument isn't as above.
    """

    def __init__(
        self,
        head_width: int = 64,
        mlp_ratio: int = 4,
        dropout: float = 0.0,
        seed: int | None = None,
        remat: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.head_width = check_size("head_width", head_width)
        self.mlp_ratio = check_size("mlp_ratio", mlp_ratio, MAX_RATIO)
        self.dropout_rate = check_rate("dropout", dropout)
        self.seed = checks.check_seed("seed", seed)
        self.remat = checks.check_boolean("remat", remat)

    def build(self, input_shape: tuple) -> None:
        maps, embedding, *context = input_shape
        width, policy = maps[-1], self.dtype_policy
        hidden = self.mlp_ratio * width
        check_head(width, self.head_width)
        self.num_heads = width // self.head_width

        def dense(units, name, **kw):
            return keras.layers.Dense(units, dtype=policy, name=name, **kw)

        # The other normalisations have no scale, because another weight takes
        # its place: before a dense layer the layer's kernel, and of the keys
        # the queries' scale, since the logits see only the product of both.
        self.norm_query = keras.layers.RMSNormalization(
            dtype=policy, name="norm_query"
        )
        self.query_key_value = dense(3 * width, "query_key_value")
        self.attention_output = dense(
            width, "attention_output", kernel_initializer="zeros"
        )
        self.cross_attention = None
        if context:
            self.cross_attention = CrossAttention(
                self.head_width, dtype=policy, name="cross_attention"
            )
            self.cross_attention.build((maps, *context))
        self.mlp_hidden = dense(hidden, "mlp_hidden")
        self.modulation = dense(2 * hidden, "modulation")
        self.mlp_output = dense(width, "mlp_output", kernel_initializer="zeros")
        self.dropout = Dropout(
            self.dropout_rate, seed=self.seed, dtype=policy, name="dropout"
        )

        for layer in (
            self.query_key_value,
            self.attention_output,
            self.mlp_hidden,
        ):
            layer.build(maps)
        self.norm_query.build((None, None, self.num_heads, self.head_width))
        self.modulation.build(embedding)
        self.dropout.build((*maps[:-1], hidden))
        self.mlp_output.build((*maps[:-1], hidden))

    def _attention(self, places: Tensor) -> Tensor:
        query, key, value = split_heads(
            places, self.query_key_value, (3, self.num_heads, self.head_width)
        )
        attended = attend(query, key, value, self.norm_query)
        attended = ops.reshape(attended, (-1, *places.shape[1:]))
        return self.attention_output(attended)

    def call(
        self, inputs: tuple[Tensor, ...], training: bool | None = None
    ) -> Tensor:
        maps, embedding, *context = inputs
        # The state is drawn outside for the reason given in `ResNetBlock`. The
        # mask is no argument of the block because it has no gradient.
        state = self.dropout.draw() if training else None
        tokens, mask = context[:1], context[1:]

        def block(x, embedding, *tokens):
            x = x + self._attention(_normalized(x))
            if self.cross_attention:
                normed = _normalized(x)
                x = x + self.cross_attention((normed, *tokens, *mask))
            h = self.mlp_hidden(_normalized(x))
            modulation = self.modulation(ops.silu(embedding))[:, None]
            scale, shift = ops.split(modulation, 2, axis=-1)
            drop = () if state is None else (state, first_example(h))
            h = _modulated(h, scale, shift, *drop, rate=self.dropout.rate)
            return x + self.mlp_output(h)

        run = backend.remat(block) if self.remat and training else block
        _, height, width, channels = maps.shape
        places = ops.reshape(maps, (-1, height * width, channels))
        places = run(places, embedding, *tokens)
        return ops.reshape(places, (-1, height, width, channels))

    def flops(self, height: int, width: int, length: int = 0) -> int:
        """FLOPs for one image of `height` x `width` places, `length` tokens."""
        places = height * width
        channels, hidden = self.mlp_hidden.kernel.shape
        products = places * (4 * channels**2 + 2 * channels * hidden)
        products += 2 * places**2 * channels  # q k, then times v
        products += math.prod(self.modulation.kernel.shape)
        if not self.cross_attention:
            return 2 * products
        return 2 * products + self.cross_attention.flops(height, width, length)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "head_width": self.head_width,
            "mlp_ratio": self.mlp_ratio,
            "dropout": self.dropout_rate,
            "seed": self.seed,
            "remat": self.remat,
        }


@keras.saving.register_keras_serializable(package="keras_mscm")
class PositionEmbedding(keras.layers.Layer):
    """For blocks that attend, to which places are otherwise all alike.

    It adds a learned vector to each place of `(batch, height, width, c)`.
    """

    def build(self, input_shape: tuple) -> None:
        self.position = self.add_weight(
            shape=input_shape[1:],
            initializer=keras.initializers.RandomNormal(stddev=0.02),
            name="position",
        )

    def call(self, inputs: Tensor) -> Tensor:
        return inputs + self.position
