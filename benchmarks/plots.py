"""The plots of an experiment's results."""

import matplotlib
import numpy as np

from benchmarks import data
from benchmarks.run import MODELS
from benchmarks.tables import METHODS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SAMPLERS = {
    "ddim": "DDIM",
    "addim": "aDDIM",
    "addim_empirical": "aDDIM, measured variance",
    "noisy_ddim": "noisy DDIM",
    "ddpm": "DDPM",
    "heun": "Heun",
}


def plots(results, folder):
    """Draws what there are results for; the Markdown that shows it."""
    drawn = {
        "evaluations": (draw_evaluations, "Quality over evaluations"),
        "samplers": (draw_samplers, "Figures 3 and 5: the teacher's samplers"),
        "time": (draw_time, "Quality over time"),
        "neighbours": (draw_neighbours, "Samples and nearest training images"),
    }
    shown = []
    for name, (draw, title) in drawn.items():
        figure = draw(results)
        path = folder / "results" / f"{results.name}_{results.size}_{name}.png"
        if figure:
            figure.savefig(path, dpi=130)
            plt.close(figure)
        elif not path.is_file():  # of models that are elsewhere it stays
            continue
        shown += [f"![{title}]({path.relative_to(folder)})", ""]
    return shown


def draw_evaluations(results):
    """Teacher and students over evaluations per image."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for sampler in ("ddim", "addim"):
        _line(axes, results, f"teacher, {SAMPLERS[sampler]}", sampler=sampler)
    for method, name in METHODS.items():
        known = [
            (k, _mean(values), min(values.values()), max(values.values()))
            for k in (1, 2, 4, 8, 16)
            if (values := results.ratio(results.student(k, method)))
        ]
        if known:
            steps, means, least, most = zip(*known)
            (line,) = axes.plot(steps, means, "o-", label=name)
            spread = dict(color=line.get_color(), alpha=0.2)  # of the seeds
            axes.fill_between(steps, least, most, **spread)
    further = {}
    for (k, *_), values in results.further_students().items():
        ratio = _mean(results.ratio(values))
        further[k] = min(ratio, further.get(k, ratio))
    if further:
        label = "CD, best of further settings"
        axes.plot(further.keys(), further.values(), "k*", label=label)
    _finish(axes, results, "evaluations of the network per image")
    return figure


def draw_samplers(results):
    """Every sampler on the two grids."""
    if not results.values(kind="curve", grid="karras"):
        return None
    figure, panels = plt.subplots(
        1, 2, figsize=(10, 4.2), layout="constrained", sharey=True
    )
    for axes, grid in zip(panels, ("cosine", "karras")):
        for sampler, name in SAMPLERS.items():
            _line(axes, results, name, sampler=sampler, grid=grid)
        axes.set_title(f"{grid} grid")
        _finish(axes, results, "evaluations of the network per image")
    return figure


def draw_time(results):
    """What a user buys: time per image against quality."""
    seconds = {
        row["num_steps"]: row["seconds_per_image"]
        for row in results.rows
        if row["kind"] == "time"
    }
    if not seconds:
        return None
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    curves = [
        (f"teacher, {SAMPLERS[sampler]}", "s--", results.curve(sampler))
        for sampler in ("ddim", "addim")
    ]
    for method, name in METHODS.items():
        students = {
            k: results.ratio(results.student(k, method)) for k in seconds
        }
        curves.append((name, "o-", students))
    for name, style, ratios in curves:
        points = [
            (1000 * seconds[n], _mean(ratios[n]))
            for n in sorted(seconds)
            if ratios.get(n)
        ]
        if points:
            axes.plot(*zip(*points), style, label=name)
    _finish(axes, results, "milliseconds per image, batches of 250")
    return figure


def draw_neighbours(results, count=12):
    """Samples of the 8-step student over their nearest training images."""
    seed = results.rows[0]["seed"]
    stem = f"{results.name}_{results.size}"
    path = MODELS / f"{stem}_distillation_8_addim_0_{seed}_samples.npz"
    if not path.is_file():
        return None
    with np.load(path) as file:
        samples = next(iter(file.values()))[:count]
    images = data.load(results.settings["data"]).images
    training = data.as_floats(images).reshape(len(images), -1)
    flat = samples.reshape(count, -1)
    squares = np.square(training).sum(1)
    nearest = [np.argmin(squares - 2 * training @ x) for x in flat]
    shown = [samples, training[nearest].reshape(samples.shape)]
    figure, rows = plt.subplots(
        2, count, figsize=(count, 2.4), layout="constrained"
    )
    for line, images in zip(rows, shown):
        for axes, image in zip(line, images):
            axes.imshow(image.squeeze() / 2 + 0.5, cmap="gray", vmin=0, vmax=1)
            axes.set_axis_off()
    figure.suptitle("8 steps (CD), above; the nearest training images, below")
    return figure


def _mean(values):
    return np.mean(list(values.values()))


def _line(axes, results, label, sampler, grid="cosine"):
    curve = results.curve(sampler, grid)
    if curve:
        ratios = [_mean(values) for values in curve.values()]
        axes.plot(curve.keys(), ratios, "s--", label=label, alpha=0.8)


def _finish(axes, results, xlabel):
    axes.axhline(
        _mean(results.ratio(results.values(kind="real"))),
        color="grey",
        linestyle=":",
        label="real images, held out",
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(which="minor", labelsize=7)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("Fréchet distance over the teacher's best")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
