"""Networks and models that come with the package.

Each is a directory beside this file (see `keras_mscm.preset_files`), and is
loaded by its name, as with KerasHub: by `UViT.from_preset` and by `from_preset`
of the models. `python -m keras_mscm.presets` lists them, `--json` as data.
"""

from typing import Any

from keras_mscm import checks, preset_files


def _facts(name: str) -> dict[str, Any]:
    network = preset_files.read_config(name)["config"]
    model = preset_files.read(name, preset_files.TASK).get("registered_name")
    return {
        "image_shape": _image_shape(name, network.get("image_shape")),
        "model": str(model).split(">")[-1] if model else None,
        "weights": preset_files.has_weights(name),
        **preset_files.read(name, preset_files.METADATA),
    }


def _image_shape(name: str, shape: Any) -> tuple[int, ...]:
    try:
        axes = "height", "width", "channels"
        return checks.check_shape("image_shape", shape, axes)
    except ValueError as error:
        path = preset_files.find(name) / preset_files.CONFIG
        raise ValueError(f"{path}: {error}") from error


#: By name: shape of the images, the model's class (None where a network goes
#: with any), whether weights ship, a description, and what was measured.
PRESETS: dict[str, dict[str, Any]] = {
    name: facts
    for name in preset_files.names()
    if "replaced_by" not in (facts := _facts(name))  # but it still loads
}


def summary() -> list[dict[str, Any]]:
    """The facts of each preset, with the cost of its network.

    Returns:
        For each preset its `"name"`, what `PRESETS` says, the `"parameters"`
        and the `"flops"` of one forward pass for one image.

    Raises:
        ValueError: If a file of the package is damaged; it is named.

    Example:

    >>> for preset in summary():
    ...     if preset["name"] == "imagenet64_small":
    ...         print(f"{preset['parameters'] / 1e6:.0f} million")
    395 million
    """
    return [
        {"name": name, **facts, **preset_files.count(name)}
        for name, facts in PRESETS.items()
    ]


__all__ = ["PRESETS", "summary"]
