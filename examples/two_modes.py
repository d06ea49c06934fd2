"""The paper's figure 1: 1, 2, 4 and many steps between noise and two modes.

Command:   make figure   (or: KERAS_BACKEND=jax python examples/two_modes.py)
Time:      155 seconds
Hardware:  two CPU cores, shared with other work, 2026-11-23
Data:      draws from a mixture of two normals, an example being one number
Writes:    demo/two_modes/two_modes.png, demo/two_modes/two_modes.json
Result:    root mean square distance to the exact end point at most 0.036 for
           K = 1, 2 and 4, 0.026 for the teacher in 256 steps

In one dimension everything is known: the posterior mean `E[x | z_t]` in closed
form, and with it the probability flow, an ODE that SciPy solves. A diffusion
model is trained, students of 1, 2 and 4 steps are distilled from it, and all
are compared with that ODE from the same noise. The students' teacher is DDIM
(`eta=0`), which approximates this very ODE; aDDIM leaves it on purpose, to make
up for lost variance, so its end point would not be the one to compare with.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import matplotlib
import numpy as np
import scipy
from keras import ops
from scipy.integrate import solve_ivp
from scipy.special import expit, softmax
from scipy.stats import norm, wasserstein_distance

import keras_mscm
from keras_mscm import (
    DiffusionModel,
    MultistepConsistencyModel,
    samplers,
    spaces,
)
from keras_mscm import functional as F
from keras_mscm.callbacks import TeacherStepAnneal
from keras_mscm.schedules import CosineSchedule

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.legend_handler import HandlerTuple

MODES, STD = np.array([-0.5, 0.5]), 0.1  # of equal weight
SCHEDULE = CosineSchedule()
SPACE = spaces.Box((1,), low=-1.0, high=1.0)  # x is one number
STUDENT_STEPS = [1, 2, 4]
TEACHER_STEPS = 256  # as good as infinitely many
TIMES = np.linspace(1.0, 0.0, TEACHER_STEPS + 1)


def posterior_mean(z, logsnr):
    """`E[x | z_t]`: the modes' posterior means by their probabilities."""
    alpha, variance = np.sqrt(expit(logsnr)), expit(-logsnr)  # of the noise
    variance = variance + alpha**2 * STD**2  # of z_t around alpha times a mode
    distance = np.asarray(z)[..., None] - alpha * MODES
    means = MODES + alpha * STD**2 / variance * distance
    return (softmax(-(distance**2) / (2 * variance), -1) * means).sum(-1)


def probability_flow(noise, times):
    """Solves the ODE from `noise` at `times[0]`, `(times, noise)`.

    With log-SNR l for time it is `dz/dl = alpha (E[x | z] - alpha z) / 2`:
    DDIM (eq. 4) for a step of length dl.
    """

    def slope(logsnr, z):
        alpha = np.sqrt(expit(logsnr))
        return alpha * (posterior_mean(z, logsnr) - alpha * z) / 2

    logsnr = ops.convert_to_numpy(SCHEDULE(times)).astype("float64")
    solution = solve_ivp(
        slope,
        (logsnr[0], logsnr[-1]),
        noise,
        method="DOP853",
        t_eval=logsnr,
        rtol=1e-8,
        atol=1e-10,
    )
    return solution.y.T


def make_network():
    """A small MLP; what a network must be is in `DenoisingModel`.

    A multistep model's prediction jumps in time where a segment ends, and a
    one-step model's in z between the modes: waves let the MLP be so sharp.
    """
    z = keras.Input((1,), name="z")
    logsnr = keras.Input((), name="logsnr")
    t = 2 / np.pi * ops.arctan(ops.exp(-ops.reshape(logsnr, (-1, 1)) / 2))
    angles = [2 * np.pi * 2**i * t for i in range(6)]
    angles += [np.pi / 2 * 2**i * z for i in range(3)]
    waves = [wave(angle) for angle in angles for wave in (ops.sin, ops.cos)]
    hidden = ops.concatenate([t, z, *waves], axis=-1)
    for _ in range(3):
        hidden = keras.layers.Dense(128, activation="silu")(hidden)
    output = keras.layers.Dense(1)(hidden)
    return keras.Model({"z": z, "logsnr": logsnr}, output, name="mlp")


def draws(batch_size, seed):
    """Batches of draws from the mixture, for ever."""
    rng = np.random.default_rng(seed)
    while True:
        x = rng.choice(MODES, batch_size) + rng.normal(0, STD, batch_size)
        yield np.clip(x, -1, 1).astype("float32").reshape(-1, 1)


def train(model, learning_rate, iterations, callbacks=()):
    rate = keras.optimizers.schedules.CosineDecay(learning_rate, iterations)
    model.compile(optimizer=keras.optimizers.Adam(rate))
    model.fit(
        draws(512, model.seed),
        steps_per_epoch=iterations,
        shuffle=False,
        callbacks=[*callbacks],
    )


def trajectories(model, noise, num_steps):
    """The model's z at `TIMES`, on the way of each of its DDIM steps."""
    path, logsnr = [noise], SCHEDULE(TIMES)
    each = TEACHER_STEPS // num_steps
    for begin in range(0, TEACHER_STEPS, each):
        z, logsnr_t = path[begin], ops.repeat(logsnr[begin], len(noise))
        x = model({"z": z, "logsnr": logsnr_t})
        for i in range(begin + 1, begin + each + 1):
            logsnr_s = ops.repeat(logsnr[i], len(noise))
            path.append(F.ddim(x, z, logsnr_t, logsnr_s))
    return ops.convert_to_numpy(ops.stack(path))[..., 0]


def compare(end_points, exact):
    """How far a model ends from the exact ODE, from the same noise."""
    distance = np.abs(end_points - exact)
    return {
        "rms_distance": float(np.sqrt(np.mean(distance**2))),
        "median_distance": float(np.median(distance)),
        "max_distance": float(distance.max()),
        "wasserstein_distance": float(wasserstein_distance(end_points, exact)),
    }


def plot(models, end_points, noise, path):
    """A panel per model: its trajectories over the exact ones."""
    figure, all_axes = plt.subplots(
        1, len(models), figsize=(13, 5.6), sharey=True, layout="constrained"
    )
    exact = probability_flow(noise.ravel(), TIMES)
    z = np.linspace(-2.9, 2.9, 1001)
    data = norm.pdf(z[:, None], MODES, STD).mean(axis=1)
    for axes, (k, model) in zip(all_axes, models.items(), strict=True):
        ours, each = trajectories(model, noise, k), TEACHER_STEPS // k
        left, right = np.split(ours, 2, axis=1)
        grey = axes.plot(exact, TIMES, color="0.6", linewidth=0.8)
        blue = axes.plot(left, TIMES, color="#0072B2", linewidth=1.3)
        orange = axes.plot(right, TIMES, color="#D55E00", linewidth=1.3)
        if each > 1:
            axes.plot(ours[::each], TIMES[::each], "k.", markersize=4)
        # The densities of data and noise; samples as an outline.
        axes.fill_between(z, -0.04, -0.04 - data / 12, color="0.8")
        density, edges = np.histogram(end_points[k], 50, (-1, 1), density=True)
        samples = axes.stairs(-0.04 - density / 12, edges, baseline=-0.04)
        samples.set_edgecolor("k")
        axes.fill_between(z, 1.04, 1.04 + norm.pdf(z) / 3, color="0.8")
        axes.set_title(f"K = {k}" if each > 1 else r"K = $\infty$ (diffusion)")
        axes.set_xlabel("$z_t$")
        axes.set_xlim(z[0], z[-1])
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].set_ylabel(r"noise  $\leftarrow$  time t  $\rightarrow$  data")
    all_axes[0].set_yticks([0, 0.25, 0.5, 0.75, 1])
    all_axes[0].set_ylim(1.2, -0.3)
    figure.legend(
        [(blue[0], orange[0]), grey[0], samples],
        ["the model's trajectories", "probability flow, exact", "its samples"],
        handler_map={tuple: HandlerTuple(ndivide=None)},
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(args):
    begun = time.perf_counter()
    keras.utils.set_random_seed(args.seed)
    quantiles = (np.arange(1000) + 0.5) / 1000
    noise = norm.ppf(quantiles).astype("float32").reshape(-1, 1)
    exact = probability_flow(noise.ravel(), TIMES[[0, -1]])[-1]

    print(f"\nTraining the teacher, {args.iterations // 2} iterations")
    teacher = DiffusionModel(
        make_network(), SCHEDULE, space=SPACE, seed=args.seed
    )
    train(teacher, 2e-3, args.iterations // 2)

    models, end_points = {}, {}
    for k in STUDENT_STEPS:
        print(
            f"\nDistilling a student of K = {k}, {args.iterations} iterations"
        )
        models[k] = MultistepConsistencyModel.from_teacher(
            teacher, student_steps=k, eta=0.0, seed=args.seed + 1000 * k
        )
        anneal = TeacherStepAnneal(8, 128, max(1, args.iterations * 4 // 5))
        train(models[k], 4e-3, args.iterations, [anneal])
        end_points[k] = models[k].generate(noise=noise).ravel()
    models[TEACHER_STEPS] = teacher
    end_points[TEACHER_STEPS] = teacher.generate(
        noise=noise, num_steps=TEACHER_STEPS, sampler=samplers.DDIM()
    ).ravel()

    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    few = norm.ppf((np.arange(28) + 0.5) / 28).astype("float32")
    few = few.reshape(-1, 1)
    plot(models, end_points, few, output / "two_modes.png")
    packages = (keras, keras_mscm, np, scipy)
    results = {
        "steps": {k: compare(z, exact) for k, z in end_points.items()},
        "settings": vars(args),
        "seconds": round(time.perf_counter() - begun, 1),
        "backend": keras.backend.backend(),
        "versions": {
            package.__name__: package.__version__ for package in packages
        },
    }
    (output / "two_modes.json").write_text(json.dumps(results, indent=2) + "\n")

    print("\nDistance to the exact ODE's end point, from the same noise")
    print("  steps     rms  median     max      W1")
    for k, entry in results["steps"].items():
        print(f"{k:7}" + "".join(f"{value:8.4f}" for value in entry.values()))
    print(f"Written to {output}/ after {results['seconds']:.0f} seconds")


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", default="demo/two_modes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=6000)
    parser.add_argument(
        "--quick",
        dest="iterations",
        action="store_const",
        const=20,
        help="a few iterations, to see that it runs",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse_arguments())
