"""Good arguments of the data sets."""

import dataclasses
from collections.abc import Iterator

from benchmarks.bad_arguments.public_api import Entry, entry_of
from benchmarks.bad_arguments.starting import Started
from benchmarks.bad_arguments.world import World, read
from keras_mscm import datasets
from keras_mscm.datasets import emoji_font


def _emoji(**arguments):
    try:
        return datasets.emoji(**arguments)
    except FileNotFoundError as error:
        if emoji_font.FONT in str(error):  # not every machine has it
            raise Started from error
        raise


def data(w: World) -> Iterator[Entry]:
    latents = w.latent_folder  # made now, because nothing starts later
    yield entry_of(
        "datasets.ImageBatches",
        datasets.ImageBatches,
        lambda: {"read": read, "num_images": 8, "batch_size": 4},
        lambda batches: batches[0],
    )
    yield entry_of(
        "datasets.from_arrays",
        datasets.from_arrays,
        lambda: {"images": w.images, "batch_size": 4},
        lambda batches: batches[0],
        [datasets.ImageBatches],
        without=("read", "num_images"),
    )
    yield entry_of(
        "datasets.from_folder",
        datasets.from_folder,
        lambda: {"directory": w.pictures, "image_size": 8, "batch_size": 1},
        lambda batches: batches[0],
        [datasets.ImageBatches],
        without=("read", "num_images"),
    )
    yield entry_of(
        "datasets.LatentBatches",
        datasets.LatentBatches,
        lambda: {"path": latents, "batch_size": 4},
        lambda batches: batches[0],
    )
    yield entry_of(
        "datasets.cache_latents",
        datasets.cache_latents,
        lambda: {"images": w.images, "space": w.latents, "path": latents},
        lambda batches: batches[0],
        [datasets.LatentBatches],
    )
    # Of sets that aren't there: nothing is to be downloaded for what is bad.
    yield entry_of(
        "datasets.from_keras",
        datasets.from_keras,
        lambda: {"name": "mnist", "batch_size": 1},
        None,
        [datasets.ImageBatches],
        without=("read", "num_images", "labels"),
    )
    yield entry_of(
        "datasets.from_tfds",
        datasets.from_tfds,
        lambda: {"name": "mnist", "batch_size": 1},
    )
    yield dataclasses.replace(
        entry_of("datasets.emoji", datasets.emoji, lambda: {"image_size": 8}),
        call=_emoji,
    )
