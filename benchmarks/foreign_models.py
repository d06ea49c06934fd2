"""The foreign models of `benchmarks.adapters`, each beside its own sampler."""

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_mscm import DiffusionModel, backend, spaces
from keras_mscm.conditioning import standard

ROOT = Path(__file__).parent.parent
# By hand, because torch-fidelity installs a package of this name, too.
sys.modules["tests"] = types.ModuleType("tests")
sys.modules["tests"].__path__ = [str(ROOT / "tests")]

from tests.adapters.tiny import perturb  # noqa: E402

BACKENDS = "jax", "tensorflow", "torch"


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
