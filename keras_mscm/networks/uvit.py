"""The UViT of *simple diffusion* (Hoogeboom et al., 2023; appendix A.1)."""

import math
import os
from collections.abc import Sequence
from typing import Any, Self

import keras
import numpy as np
from keras import ops

from keras_mscm import backend, preset_files
from keras_mscm.functional.process import Tensor
from keras_mscm.networks.context import ContextEmbedding
from keras_mscm.networks.layers import (
    NoiseLevelEmbedding,
    PositionEmbedding,
    ResNetBlock,
    TransformerBlock,
)


def _per_stage(name: str, values: Any, stages: int) -> tuple:
    if not isinstance(values, (list, tuple)):
        values = (values,) * stages
    if len(values) != stages:
        raise ValueError(
            f"`{name}` must have one entry per stage, as `widths` has. "
            f"Received: {name}={values} for {stages} stages"
        )
    return tuple(values)


@keras.saving.register_keras_serializable(package="keras_mscm")
class UViT(keras.Model):
    """A U-Net whose stages are convolutional or, where they attend, ViT.

    Stages run from the finest resolution to the middle one. Each but the last
    stands twice, on the way down (ending in an average pool) and on the way up
    (beginning with a nearest-neighbour upsampling); every block's output on
    the way down is added to the input of its mirror image on the way up. One
    stage alone is a plain ViT.

    Args:
        image_shape: Height, width and channels of the images.
        widths: Channels of each stage; the last one is the middle.
        depths: Blocks of each stage (per direction).
        attention: For each stage, whether its blocks are transformers (else
            ResNet blocks); or one value for all.
        num_classes: Number of classes; None for a network without. There is
            one more label than classes: `num_classes` says 'no class', for
            label dropout and classifier-free guidance.
        context_width: Width of the tokens of a sequence that the network is
            conditioned on, a caption's for example; None for a network
            without. Every transformer block attends to them.
        patch_size: Pixels are gathered into square patches of this side, which
            become channels of the first stage.
        head_width: Width of an attention head.
        mlp_ratio: Width of a transformer's hidden layer over its channels.
        embedding_width: Width of the conditioning.
        dropout: Dropout rate of each stage, in [0, 1); or one for all.
        seed: Seed of the dropout. None draws one.
        remat: For each stage, whether training keeps only what goes into its
            blocks, and computes each once more for the gradient
            (rematerialisation, Chen et al., 2016): less memory, for up to a
            third more time; or one value for all. Weights are the same either
            way.
        **kwargs: As for any Keras model.

    Call arguments:
        inputs: Dictionary of `"z"`, noisy images `(batch, height, width,
            channels)`; `"logsnr"`, their log-SNR `(batch,)`; with classes,
            `"labels"`, integers 0..num_classes, `(batch,)`; and with a
            context, `"context"`, `(batch, length, context_width)`, and
            `"context_mask"`, `(batch, length)`, True (or 1) at real tokens.
            The length may differ from call to call. A mask that is all False
            says 'no context'.
        training: Whether dropout is on.

    Call returns:
        Prediction, of the shape of the images, in the compute dtype.

    Raises:
        ValueError: If stages disagree in number, or the images don't divide
            into patches and poolings, or channels into heads.

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
        **kwargs: Any,
    ):
        # Each layer casts for itself: the log-SNR stays float32 until it is
        # embedded.
        super().__init__(autocast=False, **kwargs)
        stages = len(widths)
        self.image_shape = tuple(image_shape)
        self.widths, self.depths = tuple(widths), tuple(depths)
        _per_stage("depths", self.depths, stages)
        self.attention = _per_stage("attention", attention, stages)
        self.dropout = _per_stage("dropout", dropout, stages)
        self.remat = _per_stage("remat", remat, stages)
        self.num_classes, self.patch_size = num_classes, patch_size
        self.context_width = context_width
        self.head_width, self.mlp_ratio = head_width, mlp_ratio
        self.embedding_width, self.seed = embedding_width, seed
        self._check_shapes()

        def dense(units, name, **kw):
            return keras.layers.Dense(
                units, dtype=self.dtype_policy, name=name, **kw
            )

        self.embed_noise = NoiseLevelEmbedding(
            embedding_width, dtype=self.dtype_policy, name="embed_noise"
        )
        self.embed_label = num_classes and keras.layers.Embedding(
            num_classes + 1,
            embedding_width,
            dtype=self.dtype_policy,
            name="embed_label",
        )
        self.embed_context = context_width and ContextEmbedding(
            embedding_width, dtype=self.dtype_policy, name="embed_context"
        )
        pixels = patch_size**2 * self.image_shape[-1]
        self.entry = dense(self.widths[0], "entry")
        self.exit_norm = keras.layers.RMSNormalization(
            dtype=self.dtype_policy, name="exit_norm"
        )
        self.exit = dense(pixels, "exit", kernel_initializer="zeros")

        # Far apart, as a backend may take seed + counter for its state, and of
        # 31 bits, as PyTorch's seed states are int32.
        seeds = iter(
            np.random.SeedSequence(seed).generate_state(2 * sum(depths)) >> 1
        )

        def blocks(stage, way):
            common = dict(
                dropout=self.dropout[stage],
                remat=self.remat[stage],
                dtype=self.dtype_policy,
            )
            for i in range(self.depths[stage]):
                common["seed"], name = int(next(seeds)), f"{way}_{stage}_{i}"
                if self.attention[stage]:
                    yield TransformerBlock(
                        head_width, mlp_ratio, name=name, **common
                    )
                else:
                    yield ResNetBlock(name=name, **common)

        *outer, middle = range(stages)
        self.down = [list(blocks(stage, "down")) for stage in outer]
        self.middle = list(blocks(middle, "middle"))
        self.up = [list(blocks(stage, "up")) for stage in outer]
        self.widen = [dense(w, f"widen_{i}") for i, w in enumerate(widths[1:])]
        self.narrow = [
            dense(w, f"narrow_{i}") for i, w in enumerate(widths[:-1])
        ]
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
        self.build()

    def _check_shapes(self) -> None:
        if len(self.image_shape) != 3:
            raise ValueError(
                "`image_shape` must be (height, width, channels). Received: "
                f"image_shape={self.image_shape}"
            )
        multiple = self.patch_size * 2 ** (len(self.widths) - 1)
        if any(side % multiple for side in self.image_shape[:2]):
            raise ValueError(
                f"The sides of `image_shape` must be multiples of {multiple} "
                "(`patch_size` times 2 per pooling). Received: "
                f"image_shape={self.image_shape}"
            )
        if not all(isinstance(remat, bool) for remat in self.remat):
            raise ValueError(
                "`remat` must be True or False, or one of these per stage. "
                f"Received: remat={self.remat}"
            )
        for width, attends in zip(self.widths, self.attention):
            if attends and width % self.head_width:
                raise ValueError(
                    "`widths` of stages with attention must be multiples of "
                    f"`head_width`={self.head_width}. Received: {width}"
                )

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
        embedding = self.embed_noise(inputs["logsnr"])
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
        maps = self.entry(_to_patches(inputs["z"], self.patch_size))

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
            # As after unpooling, to each place the same: for a quarter of them.
            maps = backend.unpooled(self.narrow[stage](maps), self.unpool)
            for block in self.up[stage]:
                maps = maps + skips.pop()
                maps = block((maps, *conditions[stage]), training=training)

        maps = self.exit(ops.silu(self.exit_norm(maps)))
        return _to_pixels(maps, self.patch_size)

    def _place(self, stage: int, maps: Tensor) -> Tensor:
        position = self.positions[stage]
        return position(maps) if position else maps

    def flops(self, context_length: int = 128) -> int:
        """FLOPs of one forward pass for one image.

        A multiplication with its addition counts as two. Counted are dense
        layers, convolutions and attention, which is nearly all; what belongs
        to the conditioning once per image.

        Args:
            context_length: Tokens of the context, where there is one.

        Returns:
            Number of floating-point operations.
        """
        pixels = math.prod(self.image_shape) * self.widths[0]
        flops = self.embed_noise.flops() + 4 * pixels  # entry and exit
        length = 0
        if self.embed_context:
            flops += self.embed_context.flops()
            length = context_length + 1  # the null token
        for stage, blocks in self._stages():
            sides = self._sides[stage]
            extra = [length] if self.attention[stage] else []
            flops += sum(block.flops(*sides, *extra) for block in blocks)
        for i, (widen, narrow) in enumerate(zip(self.widen, self.narrow)):
            for dense in (widen, narrow):
                flops += 2 * math.prod(self._sides[i + 1] + dense.kernel.shape)
        return flops

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
            **kwargs: Arguments of the network that are to differ, such as
                `dtype`.

        Returns:
            The network.

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
        return {
            **super().get_config(),
            "image_shape": self.image_shape,
            "widths": self.widths,
            "depths": self.depths,
            "attention": self.attention,
            "num_classes": self.num_classes,
            "context_width": self.context_width,
            "patch_size": self.patch_size,
            "head_width": self.head_width,
            "mlp_ratio": self.mlp_ratio,
            "embedding_width": self.embedding_width,
            "dropout": self.dropout,
            "seed": self.seed,
            "remat": self.remat,
        }


def _to_patches(images: Tensor, p: int) -> Tensor:
    """`(b, h, w, c)` to `(b, h / p, w / p, p p c)`."""
    if p == 1:
        return images
    _, h, w, c = images.shape
    x = ops.reshape(images, (-1, h // p, p, w // p, p, c))
    x = ops.transpose(x, (0, 1, 3, 2, 4, 5))
    return ops.reshape(x, (-1, h // p, w // p, p * p * c))


def _to_pixels(patches: Tensor, p: int) -> Tensor:
    """The inverse of `_to_patches`."""
    if p == 1:
        return patches
    _, h, w, c = patches.shape
    x = ops.reshape(patches, (-1, h, w, p, p, c // p**2))
    x = ops.transpose(x, (0, 1, 3, 2, 4, 5))
    return ops.reshape(x, (-1, h * p, w * p, c // p**2))
