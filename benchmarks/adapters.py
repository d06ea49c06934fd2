"""How near foreign models' own samplers an adapted model comes; its memory.

Command:   KERAS_BACKEND=jax python -m benchmarks.adapters, and so on
Writes:    benchmarks/adapters/results.jsonl, the rows of that backend anew, and
           from the rows of all backends benchmarks/adapters/table.md and the
           guide's table

The models are those of tests/adapters: of the libraries' own classes, tiny and
with random weights, because none are downloaded.

- Agreement: the largest difference between what both samplers make of the same
  noise, over the deviation of the foreign one; float32, DDIM, 4 and 50 steps.
  The worst of the seeds (`--seeds`), each of which has other weights and noise.
- CD: a step of consistency distillation, of a guided teacher where the foreign
  model can be guided, changes the student, and nothing of the teacher.
- Memory: the weights that teacher and student hold together, each counted once,
  over the foreign network's. Optimizer and autoencoder come besides.
- Lines: of the guide, those that make the teacher and the student.
"""

import argparse
import ast
import importlib.metadata
import itertools
import json
import os
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import ops

from benchmarks.run import circumstances
from benchmarks.tables import markdown
from keras_mscm import (
    DiffusionModel,
    MultistepConsistencyModel,
    backend,
    spaces,
)
from keras_mscm.conditioning import standard

ROOT = Path(__file__).parent.parent
# By hand, because torch-fidelity installs a package of this name, too.
sys.modules["tests"] = types.ModuleType("tests")
sys.modules["tests"].__path__ = [str(ROOT / "tests")]

from tests.adapters.tiny import (  # noqa: E402
    check_student,
    difference,
    perturb,
    sampled,
)

FOLDER = ROOT / "benchmarks/adapters"
RESULTS = FOLDER / "results.jsonl"
GUIDE = ROOT / "guides/distil_a_pretrained_model.py"
BEGIN, END = "<!-- table -->", "<!-- end of the table -->"
BACKENDS = "jax", "tensorflow", "torch"
PACKAGES = (
    "keras",
    "jax",
    "tensorflow-cpu",
    "torch",
    "keras-hub",
    "keras-cv",
    "diffusers",
    "flax",
)
STEPS = 4, 50
SEEDS = 2
# How a student can hold its teacher; the last changes the teacher's network.
HOLDS = {
    "plain": {},
    "`copy=False`": {"copy": False},
    '`copy=False, ema="bfloat16"`': {"copy": False, "ema": "bfloat16"},
    "`copy=False, ema=None`": {"copy": False, "ema": None},
    "`lora_rank=1`": {"lora_rank": 1},
    "`lora_rank=1, copy=False`": {"lora_rank": 1, "copy": False},
}
# Those of them that the guide shows.
HELD = "plain", "`copy=False`", "`copy=False, ema=None`", "`lora_rank=1`"


@dataclass
class Case:
    """A foreign model, adapted, beside its own sampler.

    Attributes:
        model: The adapted model.
        conditioning: Of two examples, by our names.
        theirs: Function of noise and a number of steps: what the foreign
            sampler makes of it.
        schedule: Function of a number of steps that gives the foreign grid.
        guidance_scale: Scale of the guidance of both samplers.
    """

    model: DiffusionModel
    conditioning: dict[str, np.ndarray]
    theirs: Callable[[np.ndarray, int], Any] | None
    schedule: Callable[[int], Any] = lambda num_steps: None
    guidance_scale: float | None = None

    @property
    def guidable(self):
        return bool(self.model.conditioning) and self.model.guidable


def normal(seed, shape):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, *shape)).astype("float32")


def ddim(model, predict):
    """DDIM in float64, but for the network, as a function of `Case.theirs`.

    Args:
        model: Whose schedule and prediction type they are.
        predict: The foreign network as a function of `(z, logsnr)`.
    """

    def run(noise, num_steps):
        times = np.linspace(1, 0, num_steps + 1).astype("float32")
        levels = ops.convert_to_numpy(model.schedule(times)).astype("float64")
        signal, spread = (
            (1 / (1 + np.exp(sign * levels))) ** 0.5 for sign in (-1, 1)
        )
        z = noise.astype("float64")
        for i in range(num_steps):
            level = np.full(len(noise), levels[i], "float32")
            said = predict(z.astype("float32"), level).astype("float64")
            if model.prediction_type == "epsilon":
                x = (z - spread[i] * said) / signal[i]
            else:
                x = signal[i] * z - spread[i] * said
            epsilon = (z - signal[i] * x) / spread[i]
            z = signal[i + 1] * x + spread[i + 1] * epsilon
        return z

    return run


def of_keras_hub(seed, scale):
    from tests.adapters import test_keras_hub as tests

    core = tests.stable_diffusion_3()
    nulls = tests.encode_prompts(core, tests.EMPTY)
    model = tests.from_keras_hub(
        core, null_conditioning={k: v[0] for k, v in nulls.items()}
    )

    def theirs(noise, num_steps):
        tests.NOISE = noise
        return tests.theirs(core, num_steps, scale)

    return Case(
        model,
        tests.encode_prompts(core, tests.PROMPTS),
        theirs,
        lambda num_steps: tests.stable_diffusion_3_grid(core, num_steps),
        scale,
    )


def of_keras_cv(seed):
    from tests.adapters import test_keras_cv as tests

    foreign = tests.StableDiffusion()
    return Case(
        tests.from_keras_cv(foreign),
        {"context": tests.CONTEXT},
        lambda noise, n: foreign.latents(noise, tests.CONTEXT, n, 7.5),
        tests.stable_diffusion_grid,
        7.5,
    )


def of_diffusers(seed, case):
    from tests.adapters import test_diffusers as tests

    name, config, scheduler = tests.CASES[case]
    network = tests.network_of(name, **config)
    space = spaces.Box((8, 8, network.config.in_channels))

    def model(num_steps=None, **kwargs):
        return tests.from_diffusers(
            network,
            scheduler,
            num_steps=num_steps,
            ema=None,
            space=space,
            **kwargs,
        )

    given = tests.given(model())
    nulls = {k: normal(seed, v.shape[1:])[0] for k, v in given.items()}
    if "labels" in nulls:
        nulls["labels"] = 0
    return Case(
        model(null_conditioning=nulls),
        given,
        lambda noise, n: tests.diffusers_loop(
            network, scheduler, noise, given, n
        ),
        lambda num_steps: tests.scheduler_grid(scheduler, num_steps),
    )


def of_flax(seed, kind):
    from tests.adapters import test_flax as tests

    module, *variables = tests.foreign(kind)
    adapt = tests.from_flax_linen if kind == "linen" else tests.from_flax_nnx
    model = adapt(
        module,
        *variables,
        tests.SHAPE,
        output="epsilon",
        names={"z": "x", "logsnr": "t"},
        conditioning=standard(num_classes=3),
        space=spaces.Box(tests.SHAPE),
        ema=None,
    )
    labels = np.array([0, 2], "int32")

    def predict(z, logsnr):
        given = {"x": z, "t": logsnr, "labels": labels}
        if kind == "linen":
            return np.asarray(module.apply(*variables, **given))
        module.eval()
        return np.asarray(module(**given))

    return Case(model, {"labels": labels}, ddim(model, predict))


def of_edm(seed):
    from tests.adapters import test_edm as tests

    network = tests.foreign()
    model = tests.from_edm(
        network,
        tests.SHAPE,
        sigma_data=tests.SIGMA_DATA,
        conditioning=standard(num_classes=3),
    )

    def theirs(noise, num_steps):
        tests.NOISE = noise
        return tests.theirs(network, num_steps, second_order=False)

    return Case(model, {"labels": tests.LABELS}, theirs, tests.edm_grid)


def of_keras_io(seed):
    from tests.adapters import test_keras_io as tests

    network = tests.get_network()
    perturb(network)
    return Case(
        tests.from_keras_io_ddim(network),
        {},
        lambda noise, n: tests.reverse_diffusion(network, noise, n),
    )


def of_keras(seed):
    """A network that takes what ours do: nothing is adapted."""
    from tests.adapters import test_edm as tests

    z, logsnr = keras.Input(tests.SHAPE), keras.Input(())
    labels = keras.Input((), dtype="int32")
    v = tests.foreign()([z, logsnr / 8, labels])
    inputs = {"z": z, "logsnr": logsnr, "labels": labels}
    network = keras.Model(inputs, v)
    model = DiffusionModel(
        network,
        space=spaces.Box(tests.SHAPE),
        conditioning=standard(num_classes=3),
        guidable=True,
        ema=None,
    )
    said = backend.compile_inference(network, network.variables)

    def predict(z, logsnr):
        given = {"z": z, "logsnr": logsnr, "labels": tests.LABELS}
        given = {k: ops.convert_to_tensor(v) for k, v in given.items()}
        return ops.convert_to_numpy(said(given))

    return Case(model, {"labels": tests.LABELS}, ddim(model, predict))


@dataclass(frozen=True)
class Foreign:
    """A line of the table.

    Attributes:
        make: Function of a seed that gives the case.
        section: The guide's heading, under which it is made.
        backends: On which its framework runs.
        sampler: Whose sampler it is compared with.
    """

    make: Callable[[int], Case]
    section: str
    backends: tuple[str, ...]
    sampler: str


HUB = "KerasHub's Stable Diffusion 3"
CV = "keras-cv's Stable Diffusion"
HF = "A UNet of diffusers"
FLAX = "A module of Flax"


def hub(scale):
    sampler = "KerasHub's `denoise_step`"
    return Foreign(lambda s: of_keras_hub(s, scale), HUB, BACKENDS, sampler)


def hugging_face(case, sampler):
    return Foreign(lambda s: of_diffusers(s, case), HF, BACKENDS[2:], sampler)


def flax(kind):
    return Foreign(
        lambda s: of_flax(s, kind), FLAX, BACKENDS[:1], "DDIM in float64"
    )


FOREIGN = {
    "KerasHub: Stable Diffusion 3": hub(None),
    "KerasHub: Stable Diffusion 3, guided": hub(5.0),
    "keras-cv: Stable Diffusion, guided": Foreign(
        of_keras_cv, CV, BACKENDS, "keras-cv's `generate_image`"
    ),
    "diffusers: `UNet2DModel`": hugging_face("ddim", "`DDIMScheduler`"),
    "diffusers: `UNet2DModel` that predicts x": hugging_face(
        "x", "`DDIMScheduler`"
    ),
    "diffusers: `UNet2DModel`, v, zero terminal SNR": hugging_face(
        "zero", "`DDIMScheduler`"
    ),
    "diffusers: `UNet2DConditionModel`": hugging_face("sd", "`DDIMScheduler`"),
    "diffusers: `UNet2DConditionModel` of XL": hugging_face(
        "sdxl", "`EulerDiscreteScheduler`"
    ),
    "diffusers: `DiTTransformer2DModel`": hugging_face(
        "dit", "`DDIMScheduler`"
    ),
    "diffusers: `SD3Transformer2DModel`": hugging_face(
        "sd3", "`FlowMatchEulerDiscreteScheduler`"
    ),
    "Flax: linen": flax("linen"),
    "Flax: nnx": flax("nnx"),
    "EDM's preconditioning": Foreign(
        of_edm, "A network of EDM", BACKENDS, "algorithm 1 in float64"
    ),
    "keras.io's DDIM example": Foreign(
        of_keras_io, "keras.io's DDIM example", BACKENDS, "the example's"
    ),
    "a Keras network": Foreign(
        of_keras, "A Keras network", BACKENDS, "DDIM in float64"
    ),
}


def agreement(case, seed):
    """The difference from the foreign sampler, by number of steps."""
    noise = normal(seed, case.model.space.shape)
    found = {}
    for num_steps in STEPS:
        ours = sampled(
            case.model,
            noise,
            num_steps,
            case.schedule(num_steps),
            guidance_scale=case.guidance_scale,
            conditioning=case.conditioning,
        )
        found[num_steps] = difference(ours, case.theirs(noise, num_steps))
    return found


def student_of(case, **kwargs):
    if case.guidable:
        kwargs["guidance_scale"] = 3.0
    return MultistepConsistencyModel.from_teacher(
        case.model, student_steps=2, **kwargs
    )


def distils(case, seed):
    """Whether a step changes the student, and nothing of the teacher."""
    x = np.clip(normal(seed, case.model.space.shape), -1, 1)
    try:
        check_student(student_of(case), x, case.conditioning or None)
    except AssertionError:
        return False
    return True


def memory(case):
    """Weights held, over the foreign network's, by how they are held."""
    before = size([case.model.network])
    found = {}
    for name, kwargs in HOLDS.items():
        try:
            student = student_of(case, **kwargs)
        except ValueError as error:
            if "lora_targets" not in str(error):
                raise
            found[name] = None  # it has no dense layer of Keras
            continue
        parts = [case.model.network, student.network, student.ema_network]
        if student.teacher.network is not None:
            parts.append(student.teacher.network)
        found[name] = size(parts) / before
    return found


def size(layers):
    """Bytes of the weights of layers, each counted once."""
    weights = {id(w): w for layer in layers for w in layer.variables}
    return sum(
        int(np.prod(w.shape)) * (2 if w.dtype == "bfloat16" else 4)
        for w in weights.values()
    )


def measure(only, seeds):
    """A row per foreign model that runs on this backend."""
    for name, foreign in FOREIGN.items():
        if backend.NAME not in foreign.backends or only not in name:
            continue
        began = time.perf_counter()
        found: dict[int, list[float]] = {n: [] for n in STEPS}
        for seed in range(seeds):
            keras.utils.set_random_seed(seed)
            case = foreign.make(seed)
            for num_steps, error in agreement(case, seed).items():
                found[num_steps].append(float(error))
        row = {
            "backend": backend.NAME,
            "model": name,
            "seeds": seeds,
            "agreement": {n: max(errors) for n, errors in found.items()},
            "distils": distils(case, 0),
            "guided": case.guidable,
            "memory": memory(case),
            "seconds": round(time.perf_counter() - began),
        }
        print(json.dumps(row), flush=True)
        yield row


def lines_of_the_guide():
    """How many lines make teacher and student, by the guide's headings."""
    lines, heading = {}, None
    for node in ast.parse(GUIDE.read_text()).body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            for line in str(node.value.value).splitlines():
                if line.startswith("## "):
                    heading = line.removeprefix("## ")
                    lines[heading] = 0
        for part in ast.walk(node):
            names = {
                target.id
                for target in getattr(part, "targets", [])
                if isinstance(target, ast.Name)
            }
            if heading and names & {"teacher", "student"}:
                lines[heading] += part.end_lineno - part.lineno + 1
    return lines


def read():
    lines = RESULTS.read_text().splitlines() if RESULTS.is_file() else []
    return [json.loads(line) for line in lines]


def number(value):
    return "-" if value is None else f"{value:.1e}".replace("e-0", "e-")


def copies(value):
    return "-" if value is None else f"{value:.2f}"


def summaries(rows):
    """Of each model: name, lines, agreement, where CD ran, copies held."""
    lines = lines_of_the_guide()
    rows = sorted(rows, key=lambda row: [*FOREIGN].index(row["model"]))
    for name, group in itertools.groupby(rows, lambda row: row["model"]):
        found = list(group)
        errors = [
            max(row["agreement"][str(num_steps)] for row in found)
            for num_steps in STEPS
        ]
        ran = sorted(row["backend"] for row in found if row["distils"])
        guided = " (guided)" if found[0]["guided"] else ""
        held = [
            max((row["memory"][hold] or 0) for row in found) or None
            for hold in HOLDS
        ]
        counted = lines[FOREIGN[name].section]
        yield name, counted, *errors, ", ".join(ran) + guided, held


def short_table(rows):
    """The guide's table: models by library, and some ways to hold them."""
    header = ["foreign model", "lines", "4 steps", "50 steps", "CD", "copies"]
    shown = [[*HOLDS].index(name) for name in HELD]
    body = [
        [
            name,
            lines,
            *map(number, errors),
            ran,
            " / ".join(copies(held[place]) for place in shown),
        ]
        for name, lines, *errors, ran, held in summaries(rows)
    ]
    return markdown(header, body)


def table(rows):
    """Markdown, with what the numbers depend on."""
    told = max(rows, key=lambda row: row["date"])
    seeds = ", ".join(
        f"{b} {min(row['seeds'] for row in rows if row['backend'] == b)}"
        for b in sorted({row["backend"] for row in rows})
    )
    packages = ", ".join(f"{k} {v}" for k, v in told["versions"].items())
    text = [
        "# Foreign models: agreement, distillation, memory",
        "",
        "Written by `KERAS_BACKEND=... python -m benchmarks.adapters` on "
        f"{', '.join(BACKENDS)} ({told['date']}; {told['hardware']}, no "
        f"accelerator; {packages}; seeds from 0, how many: {seeds}).",
        "",
        "Agreement: the largest difference from the foreign sampler on the "
        "same noise, over the deviation of what that draws; float32, DDIM; the "
        "worst of the seeds and of the backends. CD: where a step of "
        "consistency distillation changed the student, and nothing of the "
        "teacher. Lines: those of the guide that make teacher and student.",
        "",
    ]
    body, holds = [], []
    for name, lines, *errors, ran, held in summaries(rows):
        sampler = FOREIGN[name].sampler
        body.append([name, lines, sampler, *map(number, errors), ran])
        holds.append([name, *map(copies, held)])
    header = [
        "foreign model",
        "lines",
        "its own sampler",
        *(f"{num_steps} steps" for num_steps in STEPS),
        "CD",
    ]
    text += [*markdown(header, body), "## Memory", ""]
    text += [
        "Weights that teacher and student hold together, in copies of the "
        "foreign network (without optimizer and autoencoder); the most of the "
        "backends. These networks are so small that an adapter of rank 1 is a "
        "large share of them; in an earnest one it is some thousandths.",
        "",
        *markdown(["foreign model", *HOLDS], holds),
    ]
    return "\n".join(text)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="part of a model's name")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many")
    parser.add_argument("--table", action="store_true", help="the table alone")
    args = parser.parse_args()
    told = {**circumstances(""), "versions": versions()}
    FOLDER.mkdir(exist_ok=True)
    for row in [] if args.table else measure(args.only, args.seeds):
        key = row["backend"], row["model"]
        rows = [r for r in read() if (r["backend"], r["model"]) != key]
        lines = [json.dumps(r) + "\n" for r in [*rows, {**row, **told}]]
        RESULTS.write_text("".join(lines))
    (FOLDER / "table.md").write_text(table(read()))
    before, _, rest = GUIDE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    text = "\n".join([BEGIN, "", *short_table(read()), END])
    GUIDE.write_text(before + text + after)


def versions():
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
