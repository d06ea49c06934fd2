"""LoRA: a student that trains small adapters of a network that stays as it is.

The layers and their adapters are Keras' own (`enable_lora` of `Dense` and
`EinsumDense`). Here is which layers of a network get them, how a file keeps
them apart from the frozen weights, and how a network is evaluated without.

Reference:
    Hu et al., *LoRA: low-rank adaptation of large language models*, 2021.
"""

import contextlib
import functools
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_mscm import checks
from keras_mscm.atomic_file import write_atomically
from keras_mscm.functional.process import Tensor

KINDS = (keras.layers.Dense, keras.layers.EinsumDense)
ADAPTERS = ("lora_kernel_a", "lora_kernel_b")
# What reading a file that isn't as it should be raises.
BAD_FILE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    MemoryError,
    RuntimeError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def enable(
    network: keras.Layer,
    rank: int,
    targets: Sequence[str] | None = None,
    alpha: float | None = None,
) -> list[keras.Layer]:
    """Gives a network's dense layers adapters, and freezes all else.

    The adapters begin with no effect. Layers that have some already keep them.

    Args:
        network: Network, built.
        rank: Rank of the adapters, at least 1.
        targets: Which layers, by what their paths contain, such as
            `["attention", "to_out"]`; all by default.
        alpha: The adapters count `alpha / rank`; `rank` by default.

    Returns:
        The layers that have adapters.

    Raises:
        ValueError: If an argument is out of its range, or no layer is meant.
    """
    rank = checks.check_positive_integer("lora_rank", rank)
    if alpha is not None:
        checks.check_positive_number("lora_alpha", alpha)
    parts = None
    if targets is not None:
        allowed = "a list of parts of layers' paths, or None for all"
        parts = checks.check_sequence("lora_targets", targets, allowed)
        for part in parts:
            checks.check_string("lora_targets", part)
    layers = [
        layer
        for layer in network._flatten_layers()
        if isinstance(layer, KINDS)
        and (parts is None or any(part in layer.path for part in parts))
        and not {id(w) for w in layer.weights} & {*map(id, _of_end(network))}
    ]
    if not layers:
        kind = "Dense or EinsumDense layer"
        raise ValueError(
            f"`lora_targets` must name a {kind} of the network, to which "
            "`lora_rank` adds. Received: "
            f"lora_targets={targets!r:.100}, and none has such a path"
        )
    widest = max(_full_rank(layer) for layer in layers)
    if rank > widest:
        raise checks.invalid(
            "lora_rank", f"at most {widest}, the largest of a kernel", rank
        )
    for layer in layers:
        if not layer.lora_enabled:
            layer.enable_lora(rank, lora_alpha=alpha)
    _settle(network)
    return adapted(network)


def _full_rank(layer: keras.Layer) -> int:
    """The rank that a layer's kernel has at most."""
    *rows, columns = layer._kernel.shape
    return min(math.prod(rows), columns)


def _settle(network: keras.Layer) -> None:
    """Freezes all but the adapters, which files then keep apart."""
    network.trainable = True  # as a layer, or nothing within were trained
    layers = adapted(network)
    own = {id(getattr(x, name)) for x in layers for name in ADAPTERS}
    own |= {*map(id, _of_end(network))}
    for weight in network.weights:
        weight.trainable = id(weight) in own
    for layer in layers:
        # Keras would write the kernel with its adapters folded in, and read
        # them as 0, from which no training moves them.
        layer.save_own_variables = functools.partial(_save, layer)
        layer.load_own_variables = functools.partial(_load, layer)


def _of_end(network: keras.Layer) -> list[keras.Variable]:
    """The weights that tell a network where its prediction is to lead.

    They are no part of what was trained before, so they are trained as whole.
    """
    embedding = getattr(network, "embed_end", None)
    return [] if embedding is None else embedding.weights


def adapted(network: keras.Layer) -> list[keras.Layer]:
    """The layers of a network that have adapters."""
    return [
        layer
        for layer in network._flatten_layers()
        if isinstance(layer, KINDS) and layer.lora_enabled
    ]


def like(network: keras.Layer, other: keras.Layer) -> None:
    """Gives a network of the same layers the same adapters, if there are any.

    Args:
        network: The one that is to have them.
        other: The one that has.
    """
    if not adapted(other):
        return
    for ours, theirs in zip(
        network._flatten_layers(), other._flatten_layers(), strict=True
    ):
        enabled = getattr(theirs, "lora_enabled", False)
        if enabled and not ours.lora_enabled:
            ours.enable_lora(theirs.lora_rank, lora_alpha=theirs.lora_alpha)
    _settle(network)


@contextlib.contextmanager
def disabled(layers: Sequence[keras.Layer]) -> Iterator[None]:
    """Evaluates layers without their adapters, as far as they are traced."""
    for layer in layers:
        layer.lora_enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.lora_enabled = True


class WithoutAdapters(keras.layers.Layer):
    """A network as it was before its adapters; it shares all weights.

    Args:
        network: The network.
        **kwargs: As for any Keras layer.

    Call arguments:
        inputs: As for the network.
        training: As for the network, though there is no dropout here.

    Call returns:
        As the network.
    """

    def __init__(self, network: keras.Layer, **kwargs: Any):
        super().__init__(autocast=False, **kwargs)
        # A function, because Keras would track and save the network twice.
        self._network = lambda: network
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Tensor:
        network = self._network()
        with disabled(adapted(network)):
            return network(inputs, training=False)

    @property
    def conditioning(self) -> Any:
        """What the network is conditioned on."""
        return getattr(self._network(), "conditioning", None)


def merged(
    network: keras.Layer, inputs: dict[str, keras.KerasTensor]
) -> keras.Layer:
    """A network of its own without adapters, whose kernels hold them.

    Args:
        network: Network with adapters; of a student its `ema_network` is
            usually meant: `student.merged_network()`.
        inputs: Its inputs, without values.

    Returns:
        A network of the same class, which predicts the same.
    """
    config = _without_lora(network.get_config())
    plain = type(network).from_config({**config, "trainable": True})
    if not plain.built:
        plain(inputs)
    for ours, theirs in zip(
        plain._flatten_layers(), network._flatten_layers(), strict=True
    ):
        skipped = set()
        if getattr(theirs, "lora_enabled", False):
            skipped = {id(getattr(theirs, name)) for name in ADAPTERS}
        values = [v for v in _own(theirs) if id(v) not in skipped]
        for mine, value in zip(_own(ours), values, strict=True):
            mine.assign(ops.copy(value.value))
        if skipped:
            ours.kernel.assign(ops.cast(theirs.kernel, ours.kernel.dtype))
    return plain


def _own(layer: keras.Layer) -> list[keras.Variable]:
    """The variables of a layer itself, and not of those within."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def _without_lora(config: Any) -> Any:
    if isinstance(config, dict):
        return {
            key: _without_lora(value)
            for key, value in config.items()
            if not str(key).startswith("lora_")
        }
    if isinstance(config, (list, tuple)):
        return type(config)(_without_lora(value) for value in config)
    return config


def _save(layer: keras.Layer, store: Any) -> None:
    with disabled([layer]):
        type(layer).save_own_variables(layer, store)
    for name in ADAPTERS:
        store[name] = getattr(layer, name)


def _load(layer: keras.Layer, store: Any) -> None:
    before = ops.copy(layer.lora_kernel_a.value)
    type(layer).load_own_variables(layer, store)
    stored = {*store.keys()}
    # A file of the frozen weights alone has none: they have no effect then.
    a = store[ADAPTERS[0]] if ADAPTERS[0] in stored else before
    layer.lora_kernel_a.assign(a)
    if ADAPTERS[1] in stored:
        layer.lora_kernel_b.assign(store[ADAPTERS[1]])


def save_adapters(
    path: str | os.PathLike,
    network: keras.Layer,
    averages: dict[int, keras.Variable],
) -> None:
    """Writes a network's adapters into a file of their own, `.npz`.

    Args:
        path: The file; one that is there is replaced at once.
        network: Network with adapters.
        averages: The average of a weight by its `id`, which is written in its
            place.

    Raises:
        ValueError: If the network has no adapters, or `path` doesn't end in
            `.npz`.
    """
    path = _check_file(path)
    arrays = {}
    for number, layer in enumerate(_check_adapted(network)):
        for name in ADAPTERS:
            weight = getattr(layer, name)
            value = averages.get(id(weight), weight)
            arrays[f"{number}.{name}"] = ops.convert_to_numpy(
                ops.cast(value.value, "float32")
            )
        scale = layer.lora_alpha / layer.lora_rank
        arrays[f"{number}.scale"] = np.float32(scale)
    for number, weight in enumerate(_of_end(network)):
        value = averages.get(id(weight), weight)
        arrays[f"end.{number}"] = ops.convert_to_numpy(
            ops.cast(value.value, "float32")
        )
    write_atomically(path, lambda file: np.savez(file, **arrays), ".npz")


def load_adapters(path: str | os.PathLike, network: keras.Layer) -> None:
    """Reads what `save_adapters` wrote into a network with such adapters.

    Args:
        path: The file.
        network: Network with adapters of the same layers and ranks.

    Raises:
        ValueError: If the file is none of these, or of other adapters. Nothing
            is changed then.
    """
    path, layers = _check_file(path), _check_adapted(network)
    expected = {
        f"{number}.{name}": tuple(getattr(layer, name).shape)
        for number, layer in enumerate(layers)
        for name in ADAPTERS
    }
    expected |= {f"{number}.scale": () for number in range(len(layers))}
    of_end = {f"end.{i}": weight for i, weight in enumerate(_of_end(network))}
    expected |= {name: tuple(w.shape) for name, w in of_end.items()}
    try:
        found = _shapes(path)
    except BAD_FILE as error:
        raise _not_ours(path, error) from error
    if found != expected:
        wrong = sorted(
            name
            for name in {*found, *expected}
            if found.get(name) != expected.get(name)
        )
        raise ValueError(
            f"`path` must hold adapters of this network: {len(layers)} layers. "
            f"Received: {path}, which differs in {wrong[:3]}"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in expected}
    except BAD_FILE as error:
        raise _not_ours(path, error) from error
    for name, value in arrays.items():
        if not np.all(np.isfinite(value)):
            raise ValueError(
                f"`path` must hold finite numbers. Received: {path}, whose "
                f"{name} isn't"
            )
    for name, weight in of_end.items():
        weight.assign(arrays[name])
    for number, layer in enumerate(layers):
        a, b = (arrays[f"{number}.{name}"] for name in ADAPTERS)
        ours = layer.lora_alpha / layer.lora_rank
        layer.lora_kernel_a.assign(a)
        layer.lora_kernel_b.assign(b * (arrays[f"{number}.scale"] / ours))


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """What a file says of its arrays, before any of them takes memory."""
    shapes = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            with archive.open(info) as member:
                version = np.lib.format.read_magic(member)
                if version != (1, 0):
                    raise ValueError(f"{info.filename} is of another format")
                shape, _, dtype = np.lib.format.read_array_header_1_0(member)
            if dtype != np.float32:
                raise ValueError(f"{info.filename} is of dtype {dtype}")
            shapes[info.filename.removesuffix(".npy")] = shape
    return shapes


def _not_ours(path: Path, error: BaseException) -> ValueError:
    return ValueError(
        f"`path` must be a whole file of `save_lora`. Received: {path}, {error}"
    )


def _check_adapted(network: keras.Layer) -> list[keras.Layer]:
    layers = adapted(network)
    if not layers:
        raise ValueError(
            "`lora_rank` must have been given when the model was made: it has "
            "no adapters. Received: a network without"
        )
    return layers


def _check_file(path: Any) -> Path:
    path = checks.check_path("path", path)
    if not re.fullmatch(r".+\.npz", path.name):
        raise checks.invalid("path", "a file that ends in .npz", str(path))
    return path
