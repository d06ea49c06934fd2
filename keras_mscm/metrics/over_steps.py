"""Quality over the number of steps, as numbers and as a plot."""

import os
from collections.abc import Sequence
from typing import Any

from keras_mscm import checks


def quality_over_steps(
    model: Any,
    metric: Any,
    num_steps: Sequence[int] = (1, 2, 4, 8, 16),
    *,
    num_images: int,
    path: str | os.PathLike | None = None,
    seed: int = 0,
    **generate_with: Any,
) -> dict[int, float]:
    """Evaluates one model at several numbers of steps, and plots it.

    You want it for a student of several numbers of steps, or for a teacher, to
    see what each evaluation of the network brings. The noise is the same for
    all.

    Args:
        model: What draws: a `DenoisingModel`.
        metric: One of `keras_mscm.metrics`, or another with `name`,
            `update_state(images)`, `result()` (a number, or a dictionary with
            `"value"`) and `reset_state()`.
        num_steps: Numbers of steps, each at least 1.
        num_images: Images for each of them.
        path: File to plot to, such as `quality.png`; none by default.
        seed: Seed of the noise, an integer in 0..2**31 - 3.
        **generate_with: Further arguments of `generate`, such as `labels` or
            `batch_size`.

    Returns:
        The metric's value by the number of steps.

    Raises:
        ValueError: If an argument is out of its range.
        ImportError: Without matplotlib, if there is a `path`.

    Example:

    >>> import keras
    >>> from keras_mscm import DiffusionModel
    >>> model = DiffusionModel.from_preset("digits_teacher")
    >>> brightness = keras.metrics.Mean(name="brightness")
    >>> values = quality_over_steps(model, brightness, (1, 2), num_images=10)
    >>> [*values]
    [1, 2]
    """
    if not callable(getattr(model, "generate", None)):
        raise checks.invalid("model", "a `DenoisingModel`", model)
    for name in ("name", "update_state", "result", "reset_state"):
        if not hasattr(metric, name) or isinstance(metric, type):
            allowed = "one of `keras_mscm.metrics`, or an object like them"
            raise checks.invalid("metric", allowed, metric)
    checks.check_positive_integer("num_images", num_images)
    least = getattr(metric, "min_samples", 1)
    if num_images < least:
        raise checks.invalid("num_images", f"at least {least}", num_images)
    allowed = "a list of numbers of steps"
    steps = sorted(
        checks.check_positive_integer("num_steps", k)
        for k in checks.check_sequence("num_steps", num_steps, allowed)
    )
    common = {"num_images": num_images, "seed": seed, **generate_with}
    for k in steps:
        model.check_generate(num_steps=k, **common)
    pyplot: Any = None
    if path is not None:
        path = checks.check_path("path", path)
        pyplot = _pyplot()
    values = {}
    for k in steps:
        metric.reset_state()
        metric.update_state(model.generate(num_steps=k, **common))
        result = metric.result()
        value = result["value"] if isinstance(result, dict) else result
        values[k] = float(value)
        metric.reset_state()
    if path is not None:
        _plot(pyplot, values, metric.name, path)
    return values


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "`path` needs matplotlib: pip install 'keras-mscm[plots]'"
        ) from error
    return pyplot


def _plot(pyplot: Any, values: dict[int, float], name: str, path: Any) -> None:
    """Value over steps, logarithmic where the numbers allow it."""
    figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
    axes.plot([*values], [*values.values()], "o-")
    axes.set_xscale("log", base=2)
    axes.set_xticks([*values], [*values])
    axes.minorticks_off()
    if min(values.values()) > 0:
        axes.set_yscale("log")
    axes.set_xlabel("evaluations of the network per image")
    axes.set_ylabel(name.replace("_", " "))
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
