"""Files of weights: what is in them is looked at before it is loaded."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
from keras import ops

from keras_mscm.preset_files.folder import CODEC

# A compressed array is no less than a 1032nd of itself (that is DEFLATE's
# limit), so an array of which less is stored isn't there. Small ones may be.
_MOST, _SMALL = 1032, 2**26


def check_file(path: Path) -> int:
    """Raises unless a file holds arrays of numbers, and nothing else.

    No links, as they lead to other files or in circles, and no array that
    isn't stored: its shape would cost memory, whatever the file's size.

    Args:
        path: The file.

    Returns:
        How many numbers there are.

    Raises:
        ValueError: If it is something else, or can't be read to its end.
    """
    try:
        with h5py.File(path, "r") as file:
            arrays = [*_items(file, {_address(file)})]
            count = sum(map(_count, arrays))
            declared = sum(array.nbytes for array in arrays)
        if declared > max(_SMALL, _MOST * path.stat().st_size):
            raise ValueError(f"arrays of {declared:,} bytes, more than it is")
        return count
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} must be a whole file of weights, as `save_to_preset` "
            f"writes it. Received: {' '.join(str(error).split())}"
        ) from error


def _address(item: Any) -> int:
    return h5py.h5o.get_info(item.id).addr


def _items(group: h5py.Group, seen: set[int]) -> Iterator[h5py.Dataset]:
    groups = [group]
    while groups:
        group = groups.pop()
        for name in group:
            link = group.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                raise ValueError(f"a {type(link).__name__}, {name!r}")
            item = group[name]
            kinds = h5py.Dataset, h5py.Group
            if not isinstance(item, kinds) or _address(item) in seen:
                raise ValueError(f"{item} as {name!r}, or once more")
            seen.add(_address(item))
            if isinstance(item, h5py.Group):
                groups.append(item)
            else:
                yield item


def _count(array: h5py.Dataset) -> int:
    if array.external or array.is_virtual:
        raise ValueError(f"{array.name}, an array kept in another file")
    if array.shape is None or array.dtype.kind not in "biufV":
        raise ValueError(f"{array.name}, not an array of numbers")
    count = math.prod(array.shape)
    declared, stored = count * array.dtype.itemsize, array.id.get_storage_size()
    if declared > max(_SMALL, _MOST * stored):
        raise ValueError(
            f"{array.name} of shape {array.shape}, {declared:,} bytes, of "
            f"which {stored:,} are stored"
        )
    return count


def load(network: keras.Layer, path: Path) -> None:
    """Gives a network the weights of a file that is `check_file`d.

    Raises:
        ValueError: If they are of other shapes, or not finite.
    """
    try:
        keras.saving.load_weights(network, path)
    except Exception as error:
        raise ValueError(
            f"{path} must hold weights of the network that its preset "
            f"describes. Received: {' '.join(str(error).split())}"
        ) from error
    check_finite(str(path), network)


def save(layers: dict[str, keras.Layer], folder: Path, dtype: str) -> None:
    """Writes the weights of layers into files of a folder.

    Args:
        layers: Layers by the files' names.
        folder: The folder.
        dtype: `"float32"` or `"float16"`.
    """
    for file, layer in layers.items():
        keras.saving.save_weights(layer, folder / file)
        if dtype == "float16":
            halve(folder / file)


def codec_of(model: Any) -> dict[str, keras.Layer]:
    """The autoencoder of a model on latents, by the files of its weights."""
    layers = {file: getattr(model, k, None) for k, file in CODEC.items()}
    return {k: v for k, v in layers.items() if v is not None and v.weights}


def load_codec(model: Any, folder: Path) -> None:
    """Gives a model's autoencoder the weights that a preset has of it.

    Raises:
        ValueError: If it has none, or others.
    """
    for file, layer in codec_of(model).items():
        if not (folder / file).is_file():
            raise ValueError(
                f"{folder} must hold {file}, because the model's space has "
                "such weights. Received: a preset without"
            )
        check_file(folder / file)
        load(layer, folder / file)


def check_finite(where: str, network: keras.Layer, dtype: str = "") -> None:
    """Raises if a weight isn't finite.

    Args:
        where: What holds it, for the message.
        network: The network.
        dtype: What float32 becomes, where it is to be finite as well.

    Raises:
        ValueError: If one isn't.
    """
    for weight in network.weights:
        values = ops.convert_to_numpy(weight)
        if values.dtype.kind in "biu":
            continue
        bad = int(np.sum(~np.isfinite(values.astype("float32"))))
        if bad:
            raise ValueError(
                f"{where} must hold finite weights. Received: {bad} of "
                f"{values.size} not finite in {weight.path}"
            )
        if dtype and values.dtype == "float32" and values.size:
            largest = float(np.abs(values).max())
            with np.errstate(over="ignore"):
                if not np.isfinite(np.asarray(largest).astype(dtype)):
                    raise ValueError(
                        f"`weights_dtype` must be 'float32' for weights "
                        f"beyond {np.finfo(dtype).max:g}. Received: "
                        f"weights_dtype={dtype!r} with {largest:g} in "
                        f"{weight.path}"
                    )


def halve(path: Path) -> None:
    """Rewrites a file of weights in float16, compressed."""
    full = path.rename(path.with_name("full.h5"))
    # In the format of HDF5 1.10, which spends less on many small arrays.
    version = ("v110", "v110")
    with h5py.File(full) as old, h5py.File(path, "w", libver=version) as new:

        def copy(name, item):
            if isinstance(item, h5py.Dataset):
                data, small = item[()], {}
                if data.dtype == "float32":
                    data = data.astype("float16")
                if data.ndim:
                    small = {"compression": "gzip", "shuffle": True}
                new.create_dataset(name, data=data, **small)
            else:
                new.require_group(name)
            new[name].attrs.update(item.attrs)

        new.attrs.update(old.attrs)
        old.visititems(copy)
    full.unlink()
