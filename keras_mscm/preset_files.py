"""What a preset is on disk, and how it is read and written.

A preset is a directory, in KerasHub's manner:

- `config.json`: the network, as Keras serialises it;
- `task.json`: the model around it. A class, or null for any, and its arguments
  but for the network;
- `metadata.json`: a description, and what was measured;
- `model.weights.h5`, if there are any: the network's weights, of a model their
  moving average.

Those that come with the package are known by name.
"""

import datetime
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import keras

BUILT_IN = Path(__file__).parent / "presets"
CONFIG, TASK, METADATA = "config.json", "task.json", "metadata.json"
WEIGHTS = "model.weights.h5"


def names() -> list[str]:
    """The presets that come with the package."""
    return sorted(path.parent.name for path in BUILT_IN.glob(f"*/{CONFIG}"))


def find(preset: str | os.PathLike) -> Path:
    """The directory of a preset, by name or path.

    Raises:
        ValueError: If there is none.
    """
    for folder in (BUILT_IN / preset, Path(preset)):
        if (folder / CONFIG).is_file():
            return folder
    raise ValueError(
        f"`preset` must be a directory with a {CONFIG} or one of {names()}. "
        f"Received: preset={os.fspath(preset)!r}"
    )


def read(preset: str | os.PathLike, file: str) -> dict[str, Any]:
    """One of a preset's JSON files; empty if it isn't there."""
    path = find(preset) / file
    return json.loads(path.read_text("utf-8")) if path.is_file() else {}


def has_weights(preset: str | os.PathLike) -> bool:
    """Whether a preset holds weights."""
    return (find(preset) / WEIGHTS).is_file()


def count(preset: str | os.PathLike) -> dict[str, int]:
    """Parameters and FLOPs of a preset's network, which takes no memory.

    Args:
        preset: Name or directory.

    Returns:
        `"parameters"`, and `"flops"` of one forward pass for one image.

    Example:

    >>> count("digits")["parameters"]
    1071440
    """
    config = read(preset, CONFIG)

    def count_shapes():
        with keras.StatelessScope(initialize_variables=False):
            network = keras.saving.deserialize_keras_object(config)
            return {
                "parameters": network.count_params(),
                "flops": network.flops(),
            }

    # In a thread of its own: Keras keeps a list per thread of variables that
    # are yet to get values, and the next scope would give these theirs.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(count_shapes).result()


def load_network(
    cls: type,
    preset: str | os.PathLike,
    load_weights: bool = True,
    **kwargs: Any,
) -> Any:
    """What `from_preset` of a network does.

    Args:
        cls: Class that the network must be of.
        preset: Name or directory.
        load_weights: Whether to load its weights; else they are random.
        **kwargs: Arguments of the network that are to differ.

    Returns:
        The network.

    Raises:
        ValueError: If there is no such preset, it holds no weights, or its
            network is of another class.
    """
    if load_weights:
        _check_weights(preset)
    config = read(preset, CONFIG)
    network = keras.saving.deserialize_keras_object(
        {**config, "config": {**config["config"], **kwargs}}
    )
    if not isinstance(network, cls):
        raise ValueError(
            f"`preset` must hold a {cls.__name__}. Received: preset="
            f"{os.fspath(preset)!r}, which holds a {type(network).__name__}"
        )
    if load_weights:
        keras.saving.load_weights(network, find(preset) / WEIGHTS)
    return network


def load_model(
    cls: type,
    preset: str | os.PathLike,
    load_weights: bool = True,
    **kwargs: Any,
) -> Any:
    """What `from_preset` of a model does.

    Args:
        cls: Class that the model must be of. Where the preset holds a subclass
            of it, that is what comes; where it says no more than a network and
            a schedule, a new model of `cls` is built from these.
        preset: Name or directory.
        load_weights: Whether to load its weights; else they are random.
        **kwargs: Arguments of the model that are to differ; `dtype` is the
            network's too. A `network` stands in for the preset's, and keeps
            its weights.

    Returns:
        The model, with the preset's weights in both its networks.

    Raises:
        ValueError: If there is no such preset, it holds no weights, or a model
            of another class.
    """
    task = read(preset, TASK)
    kind = _class_of_task(cls, preset, task.get("registered_name"))
    arguments = keras.saving.deserialize_keras_object(task.get("config", {}))
    network = kwargs.pop("network", None)
    if network is None:
        dtype = {"dtype": kwargs["dtype"]} if "dtype" in kwargs else {}
        network = load_network(keras.Layer, preset, load_weights, **dtype)
    # The model begins its moving average with the network's weights.
    return kind(network, **{**arguments, **kwargs})


def _class_of_task(cls: type, preset: Any, registered_name: str | None) -> type:
    if registered_name is None:
        return cls
    kind = keras.saving.get_registered_object(registered_name)
    if kind is None:
        raise ValueError(
            "The class of a preset's model must be known to Keras: import it, "
            "and decorate it with `@keras.saving.register_keras_serializable`. "
            f"Received: preset={os.fspath(preset)!r} of {registered_name}"
        )
    if issubclass(kind, cls):
        return kind
    if issubclass(cls, kind):
        return cls
    raise ValueError(
        f"`preset` must hold a {cls.__name__}. Received: preset="
        f"{os.fspath(preset)!r}, which holds a {kind.__name__}: ask "
        f"`{kind.__name__}.from_preset`, or that of the network's class for "
        "the network alone"
    )


def _check_weights(preset: str | os.PathLike) -> None:
    if not has_weights(preset):
        with_weights = [name for name in names() if has_weights(name)]
        raise ValueError(
            f"`load_weights` must be False for the preset "
            f"{os.fspath(preset)!r}, which comes without weights; the network "
            "is then built with random ones. Received: load_weights=True. "
            f"Presets with weights: {with_weights}"
        )


def save_to_preset(
    saved: Any,
    preset: str | os.PathLike,
    *,
    weights_dtype: str = "float32",
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Saves a network, or a model around one, in a directory.

    Of a model these are its arguments and the averaged weights; neither
    optimizer nor teacher: to go on with training, `save` the model. The
    directory appears as a whole or not at all.

    Args:
        saved: The network or model, whose class is registered with Keras.
        preset: Directory; a preset that is already there is replaced.
        weights_dtype: `"float32"` for weights as they are, `"float16"` for
            half the space. They are loaded into float32 either way.
        metadata: What else is to be known, such as `{"description": ...}`.

    Raises:
        ValueError: If `weights_dtype` is neither, or the directory holds
            something else.
    """
    if weights_dtype not in ("float32", "float16"):
        raise ValueError(
            "`weights_dtype` must be 'float32' or 'float16'. Received: "
            f"weights_dtype={weights_dtype!r}"
        )
    network = averaged = saved
    task = None
    if hasattr(saved, "ema_network"):
        network, averaged = saved.network, saved.ema_network
        task = keras.saving.serialize_keras_object(saved)
        # The network has a file of its own, and the model takes its dtype.
        for name in ("network", "dtype"):
            task["config"].pop(name, None)
    facts = {
        **(metadata or {}),
        "parameters": network.count_params(),
        "keras": keras.__version__,
        "date": datetime.date.today().isoformat(),
    }
    files = {
        CONFIG: keras.saving.serialize_keras_object(network),
        TASK: task,
        METADATA: facts,
    }

    def write(folder):
        for file, content in files.items():
            if content is not None:
                content = _without(content, "build_config", "compile_config")
                text = json.dumps(content, indent=2) + "\n"
                (folder / file).write_text(text, "utf-8")
        keras.saving.save_weights(averaged, folder / WEIGHTS)
        if weights_dtype == "float16":
            _halve(folder / WEIGHTS)

    _write_at_once(Path(preset), write)


def _without(content: Any, *keys: str) -> Any:
    """JSON without some keys, at whatever depth."""
    if isinstance(content, list):
        return [_without(part, *keys) for part in content]
    if not isinstance(content, dict):
        return content
    return {
        key: _without(part, *keys)
        for key, part in content.items()
        if key not in keys
    }


def _halve(path: Path) -> None:
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


def _write_at_once(target: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a directory, then puts it in the place of `target`."""
    is_preset = (target / CONFIG).is_file()
    if target.exists() and not is_preset and any(target.iterdir()):
        raise ValueError(
            "`preset` must be a new directory, an empty one or a preset, which "
            f"is then replaced. Received: preset={str(target)!r}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{target.name}.", dir=target.parent
    ) as beside:
        new, old = Path(beside, "new"), Path(beside, "old")
        new.mkdir()
        write(new)
        if target.exists():
            target.rename(old)
        new.rename(target)
