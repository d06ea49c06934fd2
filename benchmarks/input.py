"""How fast the loaders give images, beside how fast training takes them.

Command:   python -m benchmarks.input
Writes:    benchmarks/input.md

Made-up pictures, shuffled and mirrored: in memory at their final size, or as
JPEG files of twice that, which are decoded and made smaller. Training is a step
of consistency training on JAX with the preset of that size. Both are also told
in CPU time, which other work on the machine changes little.
"""

import itertools
import os
import tempfile
import time
from pathlib import Path

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import grain
import keras
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from benchmarks import tables
from benchmarks.speed.__main__ import circumstances
from benchmarks.speed.models import arrays, student
from benchmarks.speed.rows import emit
from keras_mscm import datasets

SIZES = {  # preset: side, channels, images per batch
    "digits": (8, 1, 128),
    "grey28": (28, 1, 128),
    "colour64": (64, 3, 32),
}
PICTURES, READ = 1024, 4096
COLUMNS = (
    "",
    "images per second",
    "times the step",
    "CPU, microseconds an image",
    "of the step",
)


class Pictures(tfds.core.GeneratorBasedBuilder):
    """The JPEG files of a folder, as a TFDS data set."""

    VERSION = tfds.core.Version("1.0.0")
    folder: Path
    channels: int

    def _info(self):
        image = tfds.features.Image(
            shape=(None, None, self.channels), encoding_format="jpeg"
        )
        label = tfds.features.ClassLabel(num_classes=2)
        features = tfds.features.FeaturesDict({"image": image, "label": label})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for path in sorted(self.folder.rglob("*.jpg")):
            label = int(path.parent.name)
            yield path.name, {"image": path, "label": label}


def draw(folder, side, channels):
    """Smooth random pictures, as arrays; as JPEGs of twice the size too."""
    rng = np.random.default_rng(0)
    mode, pictures = {1: "L", 3: "RGB"}[channels], []
    for i in range(PICTURES):
        coarse = rng.integers(0, 256, (4, 4, channels), "uint8").squeeze()
        picture = Image.fromarray(coarse, mode)
        path = folder / str(i % 2) / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.resize((2 * side, 2 * side), Image.BICUBIC).save(path)
        picture = picture.resize((side, side), Image.BICUBIC)
        pictures.append(np.asarray(picture).reshape(side, side, channels))
    return np.stack(pictures), np.arange(PICTURES) % 2


def read_ahead(batches):
    """The recipe of `ImageBatches`."""
    ahead = grain.MapDataset.range(10**6).map(batches.__getitem__)
    return ahead.to_iter_dataset(
        grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
    )


def loaders(folder, side, channels, batch_size):
    """Endless batches by what is said of them."""
    common = dict(batch_size=batch_size, flip=True, repeat=True, seed=0)
    files = folder / "files"
    in_memory = datasets.from_arrays(*draw(files, side, channels), **common)
    from_files = datasets.from_folder(
        files, image_size=side, channels=channels, **common
    )
    Pictures.folder, Pictures.channels = files, channels
    Pictures(data_dir=folder).download_and_prepare()

    def from_tfds(cache):
        return datasets.from_tfds(
            "pictures",
            data_dir=folder,
            image_size=side,
            cache=cache,
            try_gcs=False,
            **common,
        )

    def in_turn(batches):
        return map(batches.__getitem__, itertools.count())

    return {
        "from_arrays": in_turn(in_memory),
        "from_arrays, Grain": iter(read_ahead(in_memory)),
        "from_folder": in_turn(from_files),
        "from_folder, Grain": iter(read_ahead(from_files)),
        "from_tfds": iter(from_tfds(False)),
        "from_tfds, cache": iter(from_tfds(True)),
    }


def timed(run, images):
    """Images per second, and CPU time of each in microseconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"images_per_second": images / wall, "cpu_us": 1e6 * cpu / images}


def reading(batches, batch_size):
    """Of a stream that has begun: caches are full, threads at work."""
    images = max(READ, 32 * batch_size)

    def take(count):
        for _ in itertools.islice(batches, count // batch_size):
            pass

    take(2 * PICTURES)
    return timed(lambda: take(images), images)


def training(preset, batch_size, steps=4):
    model = student(preset, "training")
    model.compile(optimizer=keras.optimizers.Adam(1e-4))
    x, y = arrays(model, steps * batch_size)

    def fit():
        model.fit(x, y, batch_size=batch_size, verbose=0)

    fit()
    return timed(fit, len(x))


def measure():
    """A row per size: the step, and each loader."""
    for preset, (side, channels, batch_size) in SIZES.items():
        what = f"{preset}: {side}x{side}x{channels}, batches of {batch_size}"
        rows = {"the step": training(preset, batch_size)}
        with tempfile.TemporaryDirectory() as folder:
            streams = loaders(Path(folder), side, channels, batch_size)
            for name, batches in streams.items():
                rows[name] = reading(batches, batch_size)
        for name, row in rows.items():
            row = {"size": what, "what": name, **row}
            row["times_the_step"] = (
                row["images_per_second"] / rows["the step"]["images_per_second"]
            )
            row["cpu_share"] = row["cpu_us"] / rows["the step"]["cpu_us"]
            emit(**row)
            yield row


def table(rows):
    """Markdown, with what the numbers depend on."""
    told = circumstances()
    versions = ", ".join(
        f"{name} {told['versions'][name]}" for name in ("keras", "jax")
    )
    lines = [
        "# What the loaders give, and what training takes",
        "",
        f"From `python -m benchmarks.input`, at commit {told['commit']}. "
        f"{told['date']}; {told['hardware']}, no accelerator; Python "
        f"{told['python']}; {versions}, grain {grain.__version__}, "
        f"tensorflow-datasets {tfds.__version__}.",
        "",
        "The step is one of consistency training with the preset's network, on "
        "JAX. A loader that gives more than once the step's images keeps up; "
        "what it takes of the CPU it takes from the step, if that runs there.",
    ]
    for size, group in itertools.groupby(rows, lambda row: row["size"]):
        lines += ["", f"## {size}", ""]
        lines += tables.markdown(
            COLUMNS,
            [
                (
                    row["what"],
                    f"{row['images_per_second']:,.0f}",
                    f"{row['times_the_step']:,.4g}",
                    f"{row['cpu_us']:.0f}",
                    f"{row['cpu_share']:.2%}",
                )
                for row in group
            ],
        )[:-1]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    text = table([*measure()])
    Path(__file__).with_suffix(".md").write_text(text)
