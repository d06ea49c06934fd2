"""Thin loaders: batches of images in [-1, 1], as `fit` takes them.

Each returns a `keras.utils.PyDataset` or a `tf.data.Dataset` of `images` or
`(images, labels)`: images float32, `(batch, height, width, channels)`, in
[-1, 1]; labels int32, `(batch,)`. Both work on every backend.
"""

from keras_mscm.datasets.arrays import from_arrays
from keras_mscm.datasets.emoji_font import EmojiImages, emoji
from keras_mscm.datasets.folder import from_folder
from keras_mscm.datasets.image_batches import ImageBatches
from keras_mscm.datasets.keras_datasets import from_keras
from keras_mscm.datasets.latent_batches import LatentBatches
from keras_mscm.datasets.latent_cache import cache_latents
from keras_mscm.datasets.tfds import from_tfds

__all__ = [
    "EmojiImages",
    "ImageBatches",
    "LatentBatches",
    "cache_latents",
    "emoji",
    "from_arrays",
    "from_folder",
    "from_keras",
    "from_tfds",
]
