"""The UViT of *simple diffusion* (Hoogeboom et al., 2023; appendix A.1)."""

import os
from collections.abc import Sequence
from typing import Any, Self

import keras
from keras import ops

from keras_mscm import backend, checks, preset_files
from keras_mscm.conditioning import Condition, standard
from keras_mscm.functional.process import Tensor
from keras_mscm.networks import cost
from keras_mscm.networks.arguments import (
    MAX_CLASSES,
    MAX_RATIO,
    MAX_TIME_RATE,
    check_depths,
    check_even,
    check_heads,
    check_image_shape,
    check_inputs,
    check_optional,
    check_rates,
    check_size,
    check_switches,
    check_trainable,
    check_widths,
)
from keras_mscm.networks.context import ContextEmbedding
from keras_mscm.networks.dropout import seeds_apart
from keras_mscm.networks.end import embed_end
from keras_mscm.networks.layers import (
    NoiseLevelEmbedding,
    PositionEmbedding,
    ResNetBlock,
    TransformerBlock,
)
from keras_mscm.networks.patches import to_patches, to_pixels

ARGUMENTS = (
    *("image_shape", "widths", "depths", "attention", "num_classes"),
    *("context_width", "patch_size", "head_width", "mlp_ratio"),
    *("embedding_width", "dropout", "seed", "remat"),
)


@keras.saving.register_keras_serializable(package="keras_mscm")
class UViT(keras.Model):
    """The network for images, when you have none of your own.

    It is a U-Net whose stages are convolutional or, where they attend, ViT.
    Each stage but the middle one, the last, stands twice: on the way down,
    ending in an average pool, and on the way up, beginning with an upsampling.
    A block's output on the way down is added to the input of its mirror image
    on the way up. One stage alone is a plain ViT.

    Args:
        image_shape: Height, width and channels of the images.
        widths: Channels of each stage; the last one is the middle.
        depths: Blocks of each stage (per direction), at least 1.
        attention: For each stage, whether its blocks are transformers (else
            ResNet blocks); or one value for all.
        num_classes: Number of classes; None for a network without. The label
            `num_classes` says 'no class', for label dropout and guidance.
        context_width: Width of the tokens of a sequence that the network is
            conditioned on, a caption's for example; None for a network
            without. Every transformer block attends to them.
        patch_size: Pixels are gathered into square patches of this side, which
            become channels of the first stage.
        head_width: Width of an attention head.
        mlp_ratio: Width of a transformer's hidden layer over its channels.
        embedding_width: Width of the conditioning, even and at least 4.
        dropout: Dropout rate of each stage, in [0, 1); or one for all.
        seed: Seed of the dropout, in 0..2**31 - 3. None draws one, as
            `keras.utils.set_random_seed` says.
        remat: For each stage, whether training keeps only what goes into its
            blocks, and computes each once more for the gradient
            (rematerialisation, Chen et al., 2016): less memory, for up to a
            third more time; or one value for all. Weights are the same either
            way.
        end_embedding: Whether the network may be told, as `"logsnr_end"`, the
            log-SNR to which its prediction is to lead (`take_logsnr_end`).
        time_rate: The fastest wave by which it tells noise levels apart, in
            radians over all of time, in [2, 1000]. A forward-mode derivative
            (`MeanFlowModel`) wants about 20, in training the teacher already.
        **kwargs: As for any Keras model.

    Call arguments:
        inputs: Dictionary of `"z"`, noisy images `(batch, height, width,
            channels)`; `"logsnr"`, their log-SNR `(batch,)`; with classes,
            `"labels"`, integers 0..num_classes, `(batch,)`; and with a
            context, `"context"`, `(batch, length, context_width)`, and
            `"context_mask"`, `(batch, length)`, True (or 1) at real tokens.
            The length may differ from call to call. A mask that is all False
            says 'no context'. With an end embedding, optionally,
            `"logsnr_end"`, `(batch,)`.
        training: Whether dropout is on.

    Call returns:
        Prediction, of the shape of the images, in the compute dtype.

    Raises:
        ValueError: If an argument isn't as above, or too large (widths, sides
            and channels end at 65536, blocks of a stage at 1024); if stages
            disagree in number, images don't divide into patches and poolings,
            or channels into heads. In a call: if inputs are lacking, or in
            training, if weights are float16, which optimizers don't train.

    Example:

    >>> network = UViT(
    ...     image_shape=(28, 28, 1),
    ...     widths=(32, 64),
    ...     depths=(1, 2),
    ...     attention=(False, True),
    ...     num_classes=10,
    ...     head_width=32,
    ...     embedding_width=128,
    ... )
    >>> network.count_params()
    336673
    >>> network.flops()  # of one image
    115353600

    Reference:
        Hoogeboom et al., *simple diffusion*, 2023; Multistep Consistency
        Models, appendix A.1.
    """

    built: bool

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        widths: Sequence[int] = (256, 512, 1024),
        depths: Sequence[int] = (3, 3, 16),
        attention: bool | Sequence[bool] = (False, True, True),
        num_classes: int | None = None,
        context_width: int | None = None,
        patch_size: int = 1,
        head_width: int = 64,
        mlp_ratio: int = 4,
        embedding_width: int = 1024,
        dropout: float | Sequence[float] = 0.0,
        seed: int | None = None,
        remat: bool | Sequence[bool] = False,
        end_embedding: bool = False,
        time_rate: float = MAX_TIME_RATE,
        **kwargs: Any,
    ):
        # Each layer casts for itself, as log-SNR stays float32 until embedded.
        super().__init__(autocast=False, **kwargs)
        self.widths = check_widths("widths", widths)
        stages = len(self.widths)
        self.depths = check_depths("depths", depths, stages)
        self.attention = check_switches("attention", attention, stages)
        self.remat = check_switches("remat", remat, stages)
        self.dropout = check_rates("dropout", dropout, stages)
        self.num_classes = check_optional(
            "num_classes", num_classes, MAX_CLASSES
        )
        self.context_width = check_optional("context_width", context_width)
        self.patch_size = check_size("patch_size", patch_size)
        self.head_width = check_size("head_width", head_width)
        self.mlp_ratio = check_size("mlp_ratio", mlp_ratio, MAX_RATIO)
        self.embedding_width = check_even("embedding_width", embedding_width)
        self.seed = checks.check_seed("seed", seed)
        self.image_shape = check_image_shape(
            image_shape, self.patch_size * 2 ** (stages - 1)
        )
        check_heads(self.widths, self.attention, self.head_width)

        def dense(units, name, **kw):
            return keras.layers.Dense(
                units, dtype=self.dtype_policy, name=name, **kw
            )

        self.embed_noise = NoiseLevelEmbedding(
            self.embedding_width,
            time_rate=time_rate,
            dtype=self.dtype_policy,
            name="embed_noise",
        )
        self.embed_label = self.num_classes and keras.layers.Embedding(
            self.num_classes + 1,
            self.embedding_width,
            dtype=self.dtype_policy,
            name="embed_label",
        )
        self.embed_context = self.context_width and ContextEmbedding(
            self.embedding_width, dtype=self.dtype_policy, name="embed_context"
        )
        pixels = self.patch_size**2 * self.image_shape[-1]
        self.entry = dense(self.widths[0], "entry")
        self.exit_norm = keras.layers.RMSNormalization(
            dtype=self.dtype_policy, name="exit_norm"
        )
        self.exit = dense(pixels, "exit", kernel_initializer="zeros")

        drops, number = any(self.dropout), 2 * sum(self.depths)
        seeds = iter(seeds_apart(self.seed, number, drops))

        def blocks(stage, way):
            common = dict(
                dropout=self.dropout[stage],
                remat=self.remat[stage],
                dtype=self.dtype_policy,
            )
            for i in range(self.depths[stage]):
                common["seed"], name = next(seeds), f"{way}_{stage}_{i}"
                if self.attention[stage]:
                    yield TransformerBlock(
                        self.head_width, self.mlp_ratio, name=name, **common
                    )
                else:
                    yield ResNetBlock(name=name, **common)

        *outer, middle = range(stages)
        self.down = [list(blocks(stage, "down")) for stage in outer]
        self.middle = list(blocks(middle, "middle"))
        self.up = [list(blocks(stage, "up")) for stage in outer]
        finer, coarser = enumerate(self.widths[:-1]), enumerate(self.widths[1:])
        self.widen = [dense(w, f"widen_{i}") for i, w in coarser]
        self.narrow = [dense(w, f"narrow_{i}") for i, w in finer]
        self.positions = [
            PositionEmbedding(dtype=self.dtype_policy, name=f"position_{i}")
            if attends
            else None
            for i, attends in enumerate(self.attention)
        ]
        self.pool = keras.layers.AveragePooling2D(
            2, data_format="channels_last", dtype=self.dtype_policy, name="pool"
        )
        self.unpool = keras.layers.UpSampling2D(
            data_format="channels_last", dtype=self.dtype_policy, name="unpool"
        )
        self.embed_end: NoiseLevelEmbedding | None = None
        self.build()
        if checks.check_boolean("end_embedding", end_embedding):
            self.take_logsnr_end()

    def take_logsnr_end(self) -> None:
        """Lets the network be told where its prediction is to lead.

        You want it for one student of every number of steps. A second embedding
        is added to that of the noise level; it begins at zero, so that the
        network predicts as before until it is trained.
        """
        rate = self.embed_noise.time_rate
        embed_end(self, self.embedding_width, self.dtype_policy, rate)

    @property
    def takes_logsnr_end(self) -> bool:
        """Whether it may be told where its prediction is to lead."""
        return self.embed_end is not None

    def build(self, input_shape: Any = None) -> None:
        if self.built:
            return
        p, channels = self.patch_size, self.image_shape[-1]
        embedding = (None, self.embedding_width)
        maps = [(None, *sides, c) for sides, c in zip(self._sides, self.widths)]
        context: list[tuple] = []
        self.embed_noise.build((None,))
        if self.embed_label:
            self.embed_label.build((None,))
        if self.embed_context:
            context = [(None, None, self.context_width), (None, None)]
            self.embed_context.build(tuple(context))
        self.entry.build((*maps[0][:-1], p * p * channels))
        self.exit_norm.build(maps[0])
        self.exit.build(maps[0])
        self.pool.build(maps[0])
        self.unpool.build(maps[-1])
        for i in range(len(self.widths) - 1):
            self.widen[i].build((*maps[i + 1][:-1], self.widths[i]))
            self.narrow[i].build(maps[i + 1])
        for i, position in enumerate(self.positions):
            if position:
                position.build(maps[i])
        for stage, blocks in self._stages():
            attends = self.attention[stage]
            conditions = [embedding, *context] if attends else [embedding]
            for block in blocks:
                block.build((maps[stage], *conditions))
        self.built = True

    @property
    def conditioning(self) -> dict[str, Condition]:
        """What the network takes besides `z` and log-SNR, by name."""
        return standard(self.num_classes, self.context_width)

    @property
    def _sides(self) -> list[tuple[int, int]]:
        """Height and width of each stage's feature maps."""
        height, width, _ = self.image_shape
        scales = [self.patch_size * 2**i for i in range(len(self.widths))]
        return [(height // scale, width // scale) for scale in scales]

    def _stages(self) -> list[tuple[int, list]]:
        """Number and blocks of each stage, down, in the middle and up."""
        middle = len(self.down)
        return [
            *enumerate(self.down),
            (middle, self.middle),
            *enumerate(self.up),
        ]

    def call(
        self, inputs: dict[str, Tensor], training: bool | None = None
    ) -> Tensor:
        check_inputs(inputs, self.num_classes, self.context_width)
        if training:
            check_trainable(self.dtype_policy)
        embedding = self.embed_noise(inputs["logsnr"])
        if self.embed_end and inputs.get("logsnr_end") is not None:
            embedding = embedding + self.embed_end(inputs["logsnr_end"])
        if self.embed_label:
            embedding = embedding + self.embed_label(inputs["labels"])
        context: list[Tensor] = []
        if self.embed_context:
            *context, pooled = self.embed_context(
                (inputs["context"], inputs["context_mask"])
            )
            embedding = embedding + pooled
        conditions = [
            [embedding, *context] if attends else [embedding]
            for attends in self.attention
        ]
        maps = self.entry(to_patches(inputs["z"], self.patch_size))

        skips = []
        for stage, blocks in enumerate(self.down):
            maps = self._place(stage, maps)
            for block in blocks:
                maps = block((maps, *conditions[stage]), training=training)
                skips.append(maps)
            maps = self.widen[stage](self.pool(maps))

        maps = self._place(len(self.down), maps)
        for block in self.middle:
            maps = block((maps, *conditions[-1]), training=training)

        for stage in reversed(range(len(self.up))):
            # A dense layer acts on each place alone, so it runs before the
            # upsampling, where there are four times fewer places.
            maps = backend.unpooled(self.narrow[stage](maps), self.unpool)
            for block in self.up[stage]:
                maps = maps + skips.pop()
                maps = block((maps, *conditions[stage]), training=training)

        maps = self.exit(ops.silu(self.exit_norm(maps)))
        return to_pixels(maps, self.patch_size)

    def _place(self, stage: int, maps: Tensor) -> Tensor:
        position = self.positions[stage]
        return position(maps) if position else maps

    flops = cost.flops

    @classmethod
    def from_preset(
        cls,
        preset: str | os.PathLike,
        load_weights: bool = True,
        **kwargs: Any,
    ) -> Self:
        """A network from a preset, as with KerasHub.

        Args:
            preset: Name, one of `keras_mscm.presets.PRESETS`, or a directory
                that `save_to_preset` made.
            load_weights: Whether to load its weights; else they are random.
            **kwargs: The network's arguments that differ, such as `dtype`.

        Raises:
            ValueError: If there is no such preset, or no weights in it.

        Example:

        >>> network = UViT.from_preset("digits", load_weights=False)
        >>> network.image_shape
        (8, 8, 1)
        """
        return preset_files.load_network(cls, preset, load_weights, **kwargs)

    save_to_preset = preset_files.save_to_preset

    def get_config(self) -> dict[str, Any]:
        # What version 0.1 doesn't know is written where it is used.
        later: dict = {"end_embedding": True} if self.embed_end else {}
        if self.embed_noise.time_rate != MAX_TIME_RATE:
            later["time_rate"] = self.embed_noise.time_rate
        return {
            **super().get_config(),
            **later,
            **{name: getattr(self, name) for name in ARGUMENTS},
        }
