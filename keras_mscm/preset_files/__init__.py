"""What a preset is on disk, and how it is read and written.

A preset is a directory, in KerasHub's manner:

- `config.json`: the network, as Keras serialises it;
- `task.json`: the model around it. A class, or null for any, and its arguments
  but for the network;
- `metadata.json`: a description, and what was measured;
- `model.weights.h5`, if there are any: the network's weights, of a model their
  moving average;
- `encoder.weights.h5`, `decoder.weights.h5`: a model's on latents.

Those that come with the package are known by name. Others may come from
anywhere: loading one runs no code but Keras' and that of registered classes,
and takes no more memory than there are weights in its file. Its files may be
symbolic links, which are read as what they lead to. Nothing is written through
one.
"""

import copy
import datetime
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras

from keras_mscm import checks
from keras_mscm.preset_files import untrusted, weights
from keras_mscm.preset_files.folder import (
    BUILT_IN,
    CONFIG,
    METADATA,
    TASK,
    WEIGHTS,
    WRITTEN,
    check_target,
    find,
    has_weights,
    names,
    read,
    read_config,
    replace_at_once,
    write_metadata,
)

__all__ = [
    "BUILT_IN",
    "CONFIG",
    "METADATA",
    "TASK",
    "WEIGHTS",
    "count",
    "find",
    "has_weights",
    "load_model",
    "load_network",
    "names",
    "read",
    "read_config",
    "save_to_preset",
    "write_metadata",
]


def count(preset: str | os.PathLike) -> dict[str, int]:
    """Parameters and FLOPs of a preset's network, which takes no memory.

    Args:
        preset: Name or directory.

    Returns:
        `"parameters"`, and `"flops"` of one forward pass for one image.

    Raises:
        ValueError: If there is no such preset, or its network can't be made
            or doesn't tell its FLOPs.

    Example:

    >>> count("digits")["parameters"]
    1071440
    """
    config = read_config(preset)

    def count_shapes():
        network = untrusted.deserialize(config)
        return {"parameters": network.count_params(), "flops": network.flops()}

    return _from_file(
        find(preset) / CONFIG,
        "a network with `count_params` and `flops`",
        lambda: untrusted.without_memory(count_shapes),
    )


def _from_file(
    path: Path, what: str, make: Callable[[], Any], given: Sequence[str] = ()
) -> Any:
    """What is made from a file, or an error that names it.

    Args:
        path: The file.
        what: What it should make.
        make: Makes it.
        given: Names of the arguments that the caller gives besides.
    """
    try:
        return make()
    except Exception as error:
        besides = f", with {', '.join(given)} as given" if given else ""
        raise ValueError(
            f"{path} must describe {what}{besides}. Received: "
            f"{untrusted.summary(error)}"
        ) from error


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

    Raises:
        ValueError: If there is no such preset, it holds no weights, its
            network is of another class, or one of its files holds something
            else than it should, such as weights that are not finite.
    """
    checks.check_boolean("load_weights", load_weights)
    folder, config = find(preset), read_config(preset)
    new_name = read(preset, METADATA).get("replaced_by")
    if folder.parent == BUILT_IN and new_name:
        warnings.warn(
            f"The preset {folder.name!r} will go: take {new_name!r}",
            FutureWarning,
            stacklevel=3,
        )
    limit = None
    if load_weights:
        _check_weights(preset)
        stored = weights.check_file(folder / WEIGHTS)
        # More by some, as layers may keep weights out of files.
        limit = max(2.0**30, 4.0 * stored * untrusted.BYTES)
        limit = min(limit, untrusted.memory())

    def make():
        # A copy, as Keras takes a functional model's configuration apart.
        copied = copy.deepcopy(config)
        copied["config"].update(kwargs)
        return untrusted.deserialize(copied)

    def make_if_it_fits():
        # What comes with the package is as large as it says.
        if folder.parent != BUILT_IN:
            untrusted.check_size(make, limit)
        return make()

    network = _from_file(
        folder / CONFIG, "a network", make_if_it_fits, [*kwargs]
    )
    if not isinstance(network, cls) or not isinstance(network, keras.Layer):
        kind = getattr(network, "__name__", type(network).__name__)
        raise ValueError(
            f"`preset` must hold a {cls.__name__}. Received: preset="
            f"{os.fspath(preset)!r}, which holds a {kind}"
        )
    if load_weights:
        weights.load(network, folder / WEIGHTS)
    return network


def load_model(
    cls: type,
    preset: str | os.PathLike,
    load_weights: bool = True,
    **kwargs: Any,
) -> Any:
    """A model from a preset, as with KerasHub.

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
        ValueError: If there is no such preset, it holds no weights, a model
            of another class, or one of its files holds something else than it
            should.
        TypeError: If the model needs an argument more.
    """
    checks.check_boolean("load_weights", load_weights)
    task, path = read(preset, TASK), find(preset) / TASK
    kind = _class_of_task(cls, path, task.get("registered_name"))
    config = task.get("config", {})
    if not isinstance(config, dict) or "network" in config:
        raise ValueError(
            f"{path} must hold a model's arguments but for the network as its "
            f"config. Received: {checks.describe(config)}"
        )
    arguments = _from_file(
        path,
        "a model",
        lambda: {k: untrusted.deserialize(v) for k, v in config.items()},
    )
    network = kwargs.pop("network", None)
    if network is not None and not isinstance(network, keras.Layer):
        raise checks.invalid("network", "a Keras layer or model", network)
    if network is None:
        dtype = {"dtype": kwargs["dtype"]} if "dtype" in kwargs else {}
        network = load_network(keras.Layer, preset, load_weights, **dtype)
    # The model begins its moving average with the network's weights.
    # As from a file, so that it may be one of an older version.
    stored = {**copy.deepcopy(config), "network": network}
    try:
        if kwargs:
            model = kind(network, **{**arguments, **kwargs})
        else:
            model = kind.from_config(stored)
    except TypeError as error:
        named = any(f"'{name}'" in str(error) for name in kwargs)
        if named or task.get("registered_name") is None:
            raise  # what the caller gives, or should
        raise _unfit(path, kind, error) from error
    except ValueError as error:
        if kwargs or not config:
            raise
        raise _unfit(path, kind, error) from error
    if load_weights:
        weights.load_codec(model, find(preset))
    return model


def _unfit(path: Path, kind: type, error: Exception) -> ValueError:
    return ValueError(
        f"{path} must hold arguments of {kind.__name__} that go with the "
        f"network. Received: {untrusted.summary(error)}"
    )


def _class_of_task(cls: type, path: Path, registered_name: Any) -> Any:
    if registered_name is None:
        if not hasattr(cls, "default_weighting"):
            raise ValueError(
                "`preset` must hold a model for one of whatever class: "
                f"{cls.__name__} is none that can be trained. Received: {path}"
                ", which names no class: ask `DiffusionModel.from_preset`, or "
                "that of another algorithm"
            )
        return cls
    kind: Any = None
    if isinstance(registered_name, str):
        kind = keras.saving.get_registered_object(registered_name)
    if kind is None:
        raise ValueError(
            "The class of a preset's model must be known to Keras: import it, "
            "and decorate it with `@keras.saving.register_keras_serializable`. "
            f"Received: {path} of {checks.describe(registered_name)}"
        )
    if not isinstance(kind, type) or not issubclass(kind, keras.Model):
        raise ValueError(
            f"{path} must name the class of a model. Received: "
            f"{registered_name!r}, which is {checks.describe(kind)}"
        )
    if issubclass(kind, cls):
        return kind
    if issubclass(cls, kind):
        return cls
    raise ValueError(
        f"`preset` must hold a {cls.__name__}. Received: {path}, which is of a "
        f"{kind.__name__}: ask `{kind.__name__}.from_preset`, or that of the "
        "network's class for the network alone"
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
        preset: Directory; one that `save_to_preset` made is replaced, unless
            anything else is in it.
        weights_dtype: `"float32"` for weights as they are, `"float16"` for
            half the space. They are loaded into float32 either way.
        metadata: What else is to be known, such as `{"description": ...}`.

    Raises:
        ValueError: If an argument is out of its range, a weight is not finite
            or none in `weights_dtype`, or there is anything but a preset in
            the directory. Nothing is changed then.
    """
    if not isinstance(saved, keras.Layer):
        raise checks.invalid("saved", "a network or a model", saved)
    checks.check_choice("weights_dtype", weights_dtype, ("float32", "float16"))
    target, described = check_target(preset), _check_metadata(metadata)
    network = averaged = saved
    task = None
    if hasattr(saved, "ema_network"):
        network, averaged = saved.network, saved.ema_network
        if getattr(averaged, "as_network", None):  # adapters folded in
            averaged = saved.merged_network()
            network = network if saved.lora_rank is None else averaged
        task = keras.saving.serialize_keras_object(saved)
        # The network has a file of its own, and the model takes its dtype.
        for name in ("network", "dtype", "lora_rank", "lora_targets"):
            task["config"].pop(name, None)
    smaller = weights_dtype if weights_dtype != "float32" else ""
    codec = weights.codec_of(saved)
    for part in (averaged, *codec.values()):
        weights.check_finite("What is saved", part, smaller)
    facts = {
        "parameters": network.count_params(),
        "keras": keras.__version__,
        "date": datetime.date.today().isoformat(),
    }
    config = keras.saving.serialize_keras_object(network)
    files = {
        CONFIG: _without(config, "build_config", "compile_config"),
        TASK: _without(task, "build_config", "compile_config"),
        METADATA: {**described, **facts},
    }

    def write(folder):
        for file, content in files.items():
            if content is not None:
                text = json.dumps(content, indent=2) + "\n"
                (folder / file).write_text(text, "utf-8")
        weights.save({WEIGHTS: averaged, **codec}, folder, weights_dtype)

    replace_at_once(target, write)


def _check_metadata(metadata: Any) -> dict[str, Any]:
    """The metadata as they will be read again."""
    if metadata is None:
        return {}
    allowed = "a mapping of strings to what JSON can hold"
    if not isinstance(metadata, Mapping):
        raise checks.invalid("metadata", allowed, metadata)
    for key, value in metadata.items():
        if not isinstance(key, str):
            raise checks.invalid("metadata", allowed, key)
        if key in WRITTEN:
            raise ValueError(
                f"`metadata` must leave {', '.join(WRITTEN)} to "
                f"`save_to_preset`. Received: metadata with {key!r}"
            )
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"`metadata` must be {allowed}. Received: metadata[{key!r}]="
                f"{checks.describe(value)}: {error}"
            ) from error
    return dict(metadata)


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
