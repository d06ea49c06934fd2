"""What good arguments are made of, each made once."""

import functools
from pathlib import Path

import keras
import numpy as np

from keras_mscm import (
    ContinuousConsistencyModel,
    DenoisingModel,
    DiffusionModel,
    GuidanceDistillationModel,
    MeanFlowModel,
    MultistepConsistencyModel,
    PeRFlowModel,
    ProgressiveDistillationModel,
    UViT,
    datasets,
    lora,
    losses,
    metrics,
    spaces,
)

TIMES = np.linspace(0, 1, 9, dtype="float32")
LEVELS = np.linspace(-15, 15, 4, dtype="float32")
IMAGES = np.linspace(-1, 1, 64, dtype="float32").reshape(4, 4, 4, 1)


class Plain(DenoisingModel):
    """The least that a training algorithm says of itself."""

    default_weighting = staticmethod(losses.uniform)

    def default_loss(self):
        return losses.SquaredL2()


class World:
    """Models, networks, images and files, in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._plain = self._told = None

    def network(self, num_classes=None, context_width=None):
        """A network of one dense layer, cheap to make."""
        layers, ops, shape = keras.layers, keras.ops, (4, 4, 1)
        inputs = {
            "z": keras.Input(shape, name="z"),
            "logsnr": keras.Input((), name="logsnr"),
        }
        level = layers.Reshape((1,))(inputs["logsnr"])
        parts = [layers.Flatten()(inputs["z"]), level]
        if num_classes:
            inputs["labels"] = keras.Input((), dtype="int32", name="labels")
            parts.append(layers.Embedding(num_classes + 1, 2)(inputs["labels"]))
        if context_width:
            context = keras.Input((None, context_width), name="context")
            mask = keras.Input((None,), dtype="bool", name="context_mask")
            inputs |= {"context": context, "context_mask": mask}
            counts = ops.expand_dims(ops.cast(mask, "float32"), -1)
            parts.append(ops.mean(context * counts, axis=1))
        outputs = layers.Dense(16)(layers.Concatenate()(parts))
        return keras.Model(inputs, layers.Reshape(shape)(outputs))

    @property
    def plain_network(self):
        """A network without adapters, which stay in one that had them."""
        if self._plain is None or lora.adapted(self._plain):
            self._plain = self.network()
        return self._plain

    def of_plain(self, **more):
        """Arguments of a model without conditioning."""
        return {"network": self.plain_network, "image_shape": (4, 4, 1), **more}

    @property
    def told_network(self):
        """A network that can be told where its step ends, without adapters."""
        if self._told is None or lora.adapted(self._told):
            self._told = UViT(**self.of_uvit())
        return self._told

    def of_told(self, **more):
        """Arguments of a model whose network is told where its step ends."""
        return {"network": self.told_network, **more}

    @functools.cached_property
    def told(self):
        """A diffusion model of such a network."""
        return DiffusionModel(UViT(**self.of_uvit()))

    @functools.cached_property
    def model(self):
        """A diffusion model with classes and a context."""
        model = DiffusionModel(
            self.network(3, 2),
            image_shape=(4, 4, 1),
            num_classes=3,
            context_width=2,
            label_dropout=0.1,
        )
        model.compile()
        return model

    @functools.cached_property
    def to_compile(self):
        """A model of its own, as what it is compiled with stays in it."""
        return DiffusionModel(**self.of_plain())

    def _taught(self, cls, **arguments):
        model = cls.from_teacher(self.model, **arguments)
        model.compile()
        return model

    @functools.cached_property
    def guided(self):
        return self._taught(GuidanceDistillationModel)

    @functools.cached_property
    def student(self):
        return self._taught(MultistepConsistencyModel, student_steps=2)

    @functools.cached_property
    def continuous(self):
        return self._taught(ContinuousConsistencyModel)

    @functools.cached_property
    def mean_flow(self):
        return MeanFlowModel.from_teacher(self.told)

    @functools.cached_property
    def perflow(self):
        return self._taught(PeRFlowModel)

    @functools.cached_property
    def progressive(self):
        return self._taught(
            ProgressiveDistillationModel, student_steps=2, teacher_steps=8
        )

    @functools.cached_property
    def with_lora(self):
        """A model with adapters."""
        return DiffusionModel(
            self.network(), image_shape=(4, 4, 1), lora_rank=2
        )

    @functools.cached_property
    def lora_file(self):
        self.with_lora.save_lora(self.folder / "lora.npz")
        return self.folder / "lora.npz"

    @staticmethod
    def of_uvit():
        """Arguments of a small network."""
        return {
            "image_shape": (4, 4, 1),
            "widths": (8,),
            "depths": (1,),
            "attention": (True,),
            "head_width": 8,
            "mlp_ratio": 1,
            "embedding_width": 8,
        }

    @functools.cached_property
    def uvit(self):
        return UViT(**self.of_uvit())

    @functools.cached_property
    def preset(self):
        folder = self.folder / "preset"
        DiffusionModel(self.uvit).save_to_preset(folder)
        return folder

    @functools.cached_property
    def images(self):
        rng = np.random.default_rng(0)
        return rng.uniform(-1, 1, (8, 4, 4, 1)).astype("float32")

    @staticmethod
    def noise():
        """Arguments of `generate`, which compiles nothing then."""
        return {"num_images": 3, "seed": 0}

    def data(self):
        """Arguments of `fit`."""
        y = {
            "labels": np.arange(8) % 3,
            "context": np.zeros((8, 2, 2), "float32"),
            "context_mask": np.ones((8, 2), "bool"),
        }
        return {"x": self.images, "y": y}

    @functools.cached_property
    def half(self):
        """An encoder: pictures of half the sides."""
        return keras.layers.AveragePooling2D(2, data_format="channels_last")

    @functools.cached_property
    def latents(self):
        """Latents of half the sides."""
        return spaces.Latents((2, 2, 1), self.half, image_shape=(4, 4, 1))

    @functools.cached_property
    def latent_folder(self):
        folder = self.folder / "latents"
        datasets.cache_latents(self.images, self.latents, folder)
        return folder

    @functools.cached_property
    def flatten(self):
        return keras.Sequential(
            [keras.Input((4, 4, 1)), keras.layers.Flatten()]
        )

    @functools.cached_property
    def reference(self):
        return metrics.Reference(self.images, means, name="images")

    @functools.cached_property
    def reference_file(self):
        self.reference.save(self.folder / "reference.npz")
        return self.folder / "reference.npz"

    @functools.cached_property
    def mesh(self):
        """One device of two axes."""
        return keras.distribution.DeviceMesh(
            (1, 1), ["batch", "model"], ["cpu:0"]
        )

    @functools.cached_property
    def pictures(self):
        for name in "ab":
            path = self.folder / "pictures" / name / "1.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            keras.utils.save_img(path, np.zeros((8, 8, 3)), scale=False)
        return self.folder / "pictures"


def means(images):
    """Features: the mean of each row."""
    return np.asarray(images).mean((2, 3))


def read(places):
    """Pixels of images, as `ImageBatches` reads them."""
    return np.zeros((len(places), 4, 4, 1), "uint8")
