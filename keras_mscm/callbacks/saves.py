"""The saves of `ResumeTraining`: their names, what is in them, whose they are.

A save is a model's file of Keras with one more file in it, the position. Which
training it belongs to is said there by an identity, drawn when it began: only
saves of the same training are ever replaced or removed.
"""

import hashlib
import json
import math
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_mscm import backend, checks
from keras_mscm.atomic_file import write_atomically
from keras_mscm.callbacks import own_files
from keras_mscm.models import DenoisingModel

NAMES = r"\d{8,}\.keras"
POSITION = "position.json"
COUNTS = ("epoch", "batch", "batches_before", "data_epoch")
NEEDED = (*COUNTS, "teacher", "metrics", "random", "random_of_epoch")
#: Arguments that say what the output of a network means.
MEANING = (
    "image_shape",
    "num_classes",
    "context_width",
    "prediction_type",
    "schedule",
    "student_steps",
)


def named_like_saves(folder: Path) -> list[Path]:
    """Whatever has the name of a save, the latest last."""
    found = [
        path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if re.fullmatch(NAMES, path.name, re.ASCII)
    ]
    # Of two saves of one iteration, the one with more zeros was written later.
    return sorted(found, key=lambda path: (int(path.stem), len(path.stem)))


def belongs_to(path: Path, training: str) -> bool:
    """Whether a file is a save of the training with that identity."""
    try:
        position = _position(path)
        return position.get("training") == training
    except Exception:  # because any file may have the name of a save
        return False


def place(folder: Path, iteration: int, training: str) -> Path:
    """Where a training's save of an iteration goes.

    What has that name and isn't the training's own stays, and the name gets one
    zero more.
    """
    digits = 8
    while True:
        path = folder / f"{iteration:0{digits}d}.keras"
        if not own_files.is_there(path) or belongs_to(path, training):
            return path
        digits = max(digits, len(str(iteration))) + 1


def write(path: Path, model: DenoisingModel, position: dict) -> None:
    """Writes a save, as a whole or not at all.

    Raises:
        OSError: If it can't be written.
    """

    def fill(file):
        own_files.check_space(file.parent, model)
        model.save(file)
        with zipfile.ZipFile(file, "a") as archive:
            archive.writestr(POSITION, json.dumps(position))

    write_atomically(path, fill, ".keras")


def read(path: Path, num_loss_variables: int) -> dict[str, Any]:
    """A save's position, if the whole file is as it was written.

    Args:
        path: The save.
        num_loss_variables: How many of the metrics' variables are the loss'.

    Raises:
        Exception: If anything is wrong with it.
    """
    position = _position(path, whole=True)
    missing = [name for name in NEEDED if name not in position]
    if missing:
        raise ValueError(f"its {POSITION} has no {', '.join(missing)}")
    for name in COUNTS:
        checks.check_integer(name, position[name], 0)
    epoch, first = position["epoch"], position.get("first_epoch")
    if first is None:  # saves of version 0.1 don't say
        checks.check_integer("epoch", epoch, 0, 10**7)
    else:
        # Each epoch has at least one batch.
        checks.check_integer("first_epoch", first, 0)
        most = first + position["batches_before"]
        checks.check_integer("epoch", epoch, 0, most)
    iteration = position.get("iteration", int(path.stem))
    if iteration != int(path.stem):
        raise ValueError(f"it is of iteration {iteration}")
    teacher = position["teacher"]
    if teacher is not None:
        checks.check_string("teacher", teacher)
    means = [_as_floats(value) for value in position["metrics"]]
    loss = means[:num_loss_variables]
    if not all(np.all(np.isfinite(value)) for value in loss):
        raise ValueError("the loss in it is not finite")
    _try_random_states(position["random"], position["random_of_epoch"])
    return position


def _position(path: Path, whole: bool = False) -> dict[str, Any]:
    if not own_files.is_plain(path):
        raise OSError("it is not a file of its own")
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip() if whole else None
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        if POSITION not in archive.namelist():
            raise ValueError(f"it has no {POSITION}, so it is not a save")
        position = json.loads(archive.read(POSITION))
    if not isinstance(position, dict):
        raise checks.invalid(POSITION, "a dictionary", position)
    return position


def _as_floats(value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "bif":
        raise checks.invalid("metrics", "arrays of numbers", value)
    return array


def _try_random_states(*states: Any) -> None:
    """Raises unless generators can be put into these states."""
    before = backend.host_random_states()
    try:
        for state in states:
            backend.set_host_random_states(state)
    except Exception as error:  # whatever a generator raises
        raise ValueError(
            f"the random states in it are no states: {error}"
        ) from error
    finally:
        backend.set_host_random_states(before)


# The model.


def description(model: DenoisingModel) -> dict[str, Any]:
    """What a model must have in common with one whose weights it is given."""
    network, optimizer = model.network, model.optimizer
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    weights = [(v.name, [*v.shape], v.dtype) for v in network.weights]
    slots = [[*variable.shape] for variable in optimizer.variables]
    config = model.get_config()
    found = {
        "class": type(model).__name__,
        "network": f"{len(weights)} weights of {network.count_params()} "
        f"numbers, {_digest(weights)}",
        "optimizer": f"{type(inner).__name__} of {len(slots)} variables, "
        f"{_digest(slots)}",
        **{name: config[name] for name in MEANING if name in config},
    }
    return json.loads(json.dumps(found, default=str))


def _digest(value: Any) -> str:
    text = json.dumps(value, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_description(path: Path, ours: dict, theirs: Any) -> None:
    """Raises unless a save is of such a model.

    Args:
        path: The save.
        ours: The model's description.
        theirs: The save's; None if it is of version 0.1, which has none.
    """
    if theirs is None:
        return
    theirs = theirs if isinstance(theirs, dict) else {}
    others = [name for name in ours if ours[name] != theirs.get(name)]
    if others:
        told = "; ".join(
            f"{name}: {ours[name]}, there {theirs.get(name)}" for name in others
        )
        raise ValueError(
            f"The model must be the one of the training in {path}, of the same "
            f"{', '.join(others)}. Received: {told}"
        )


def check_metrics(path: Path, model: DenoisingModel, means: list) -> None:
    """Raises unless the running means in a save are of the model's metrics."""
    ours = [tuple(v.shape) for v in model.metrics_variables]
    theirs = [np.shape(value) for value in means]
    if ours != theirs:
        raise ValueError(
            "`compile` must be given the metrics that the interrupted epoch in "
            f"{path} was begun with. Received: others, {len(ours)} variables "
            f"of them, there {len(theirs)}"
        )


def load(path: Path, model: DenoisingModel) -> None:
    """Gives a model what was saved.

    Raises:
        ValueError: If that doesn't fit into it.
    """
    try:
        with warnings.catch_warnings():
            # A warning is an error here, because Keras leaves what it skips,
            # such as an optimizer, as it was.
            warnings.filterwarnings("error", message="Skipping")
            model.load_weights(path)
    except (KeyError, ValueError, UserWarning) as error:
        raise ValueError(
            f"The model must be the one of the training in {path}. Received: "
            f"{type(model).__name__}, which its weights don't fit: {error}"
        ) from error


def is_finite(model: DenoisingModel) -> bool:
    """Whether the epoch's loss is, and all that was trained."""
    variables = [*model.trainable_variables, *model.optimizer.variables]
    return math.isfinite(model.get_metrics_result()["loss"]) and all(
        bool(ops.all(ops.isfinite(variable.value)))
        for variable in variables
        if "float" in variable.dtype
    )


def checksum(model: DenoisingModel) -> str | None:
    """SHA-256 of a teacher's weights, if they are not in the model's file."""
    teacher = getattr(model, "teacher", None)
    if teacher is None or teacher.network is None or teacher.saved:
        return None
    digest = hashlib.sha256()
    for weight in teacher.network.weights:
        digest.update(ops.convert_to_numpy(weight).tobytes())
    return digest.hexdigest()


def running_means(model: keras.Model) -> list:
    """The variables of the model's metrics, as JSON can hold them."""
    return [
        ops.convert_to_numpy(variable).tolist()
        for variable in model.metrics_variables
    ]
