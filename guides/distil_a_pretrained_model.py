"""
Title: Distil a pretrained diffusion model
Author: The authors of keras_mscm
Date created: 2026/11/28
Last modified: 2026/11/28
Description: Turn a diffusion model of another library into a 4-step generator.
Accelerator: GPU
"""

"""
## Introduction

A diffusion model takes 20 to 250 evaluations of its network for a sample. This
guide takes models that other libraries have trained, and makes students of them
that take 1 to 16: *multistep consistency distillation*. There are two steps,
whatever the model:

1. `from_...` of `keras_mscm.adapters` makes a `DiffusionModel` of it. That
   samples at once, on the noise levels that the model was trained on.
2. `MultistepConsistencyModel.from_teacher` makes a student, which begins with
   the same weights and learns to take the teacher's steps in one.

The models here are tiny and random, so that the guide runs anywhere in two
minutes and downloads nothing; beside each stands the line that loads a real
one. Pick a backend by `KERAS_BACKEND`: `jax`, `tensorflow` or `torch`.

```
pip install ".[jax,keras-hub]"        # from a checkout; or .[torch,diffusers],
                                      # .[jax,flax], .[jax,keras-cv]
```

## Setup
"""

# ruff: noqa: E402, E501
import importlib.util
import os
import tempfile

os.environ.setdefault("KERAS_BACKEND", "jax")

import keras
import numpy as np
from keras import layers, ops

from keras_mscm import (
    Condition,
    DiffusionModel,
    MultistepConsistencyModel,
    adapters,
    datasets,
    samplers,
    schedules,
    spaces,
)

keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)
folder = tempfile.mkdtemp()


def runs(library, *backends):
    """Whether a library is installed, and runs on this backend."""
    backend = keras.backend.backend()
    if backends and backend not in backends:
        print(f"{library} runs on {', '.join(backends)}: left out.")
        return False
    if importlib.util.find_spec(library) is None:
        print(f"{library} isn't installed: left out.")
        return False
    return True


def normal(*shape):
    return rng.standard_normal(shape).astype("float32")


"""
## A Keras network

Any Keras network can be a teacher as it is, if it takes a dictionary of `"z"`,
the noisy examples `alpha x + sigma epsilon` with `alpha^2 = sigmoid(logsnr)`,
and `"logsnr"`, and predicts `v`, `x` or `epsilon`. What else it takes is
declared: name, shape, dtype and *what says nothing* there, which guidance
needs. `space` says what `x` is: `Pixels` in [-1, 1], `Latents`, or a `Box`,
which is any array.
"""

z, logsnr = keras.Input((16, 2), name="z"), keras.Input((), name="logsnr")
style = keras.Input((4,), name="style")
embedded = layers.Concatenate()([layers.Reshape((1,))(logsnr / 8), style])
hidden = layers.Dense(16)(z) + layers.Reshape((1, 16))(
    layers.Dense(16)(embedded)
)
network = keras.Model(
    {"z": z, "logsnr": logsnr, "style": style},
    layers.Dense(2)(layers.Activation("swish")(hidden)),
)

teacher = DiffusionModel(
    network,
    conditioning={"style": Condition((4,), null=0.0)},
    space=spaces.Box((16, 2)),
    guidable=True,
)
signals = teacher.generate(
    3,
    num_steps=16,
    sampler=samplers.DPMSolverMultistep(),
    conditioning={"style": normal(3, 4)},
    guidance_scale=2.0,
)
print("16 evaluations of the teacher:", signals.shape)

"""
`guidable=True` says that it was trained to do without its conditioning. The
student is of the *guided* teacher: it takes one evaluation a step, where the
teacher takes two.
"""

student = MultistepConsistencyModel.from_teacher(
    teacher, student_steps=4, guidance_scale=2.0
)
student.compile(optimizer=keras.optimizers.Adam(1e-4))
student.fit(normal(8, 16, 2), {"style": normal(8, 4)}, batch_size=4, verbose=0)
signals = student.generate(3, conditioning={"style": normal(3, 4)})
print("4 evaluations of the student:", signals.shape)

"""
In earnest, train for tens of thousands of iterations, with the callback
`TeacherStepAnneal()`: see `guides/distil_your_own_images.md`.

## KerasHub's Stable Diffusion 3

```python
sd3 = keras_hub.models.StableDiffusion3TextToImage.from_preset(
    "stable_diffusion_3_medium"
)
prompts = ["a tortoise", "a hare"]
```

Here it is the same class, of two thin layers, and without a tokenizer: its
prompts are tokens already.
"""

if runs("keras_hub"):
    import keras_hub
    from keras_hub.src.models.vae.vae_backbone import VAEBackbone

    def text_encoder(width, name):
        return keras_hub.models.CLIPTextEncoder(
            20, width, width, 2, 2, 2 * width, "quick_gelu", -2, 6, name=name
        )

    sd3 = keras_hub.models.StableDiffusion3Backbone(
        mmdit_patch_size=2,
        mmdit_hidden_dim=16,
        mmdit_num_layers=2,
        mmdit_num_heads=2,
        mmdit_position_size=4,
        mmdit_qk_norm=None,
        mmdit_dual_attention_indices=None,
        vae=VAEBackbone(
            [32] * 4, [1] * 4, [32] * 4, [1] * 4, sampler_method="mode"
        ),
        clip_l=text_encoder(8, "clip_l"),
        clip_g=text_encoder(12, "clip_g"),
        image_shape=(64, 64, 3),
    )
    prompts = {
        "clip_l": np.array([[1, 5, 2, 0, 0, 0], [1, 6, 2, 0, 0, 0]]),
        "clip_g": np.array([[1, 5, 2, 0, 0, 0], [1, 6, 2, 0, 0, 0]]),
    }
    # A model with a tokenizer needs no more: it knows its empty prompt.
    empty = {name: np.array([[1, 2, 0, 0, 0, 0]]) for name in prompts}
    empty = adapters.encode_prompts(sd3, empty)
    empty = {name: value[0] for name, value in empty.items()}

    teacher = adapters.from_keras_hub(sd3, null_conditioning=empty)
    text = adapters.encode_prompts(sd3, prompts)
    images = teacher.generate(
        num_steps=4, guidance_scale=5.0, conditioning=text, seed=0
    )
    print("Stable Diffusion 3:", images.shape)

"""
The network isn't copied: `teacher` works on the weights of `sd3`. The
autoencoder is the model's *space*, `spaces.Latents`: `generate` decodes, unless
told `decode=False`, and `fit` takes pictures, or latents, which is cheaper.
`datasets.cache_latents` encodes pictures once and keeps them on disk, float16;
an interrupted run goes on.
"""

if runs("keras_hub"):
    pictures = rng.uniform(-1, 1, (2, 64, 64, 3)).astype("float32")
    cached = datasets.cache_latents(
        pictures, teacher.space, f"{folder}/latents", batch_size=2
    )
    latents = np.concatenate([cached[i] for i in range(cached.num_batches)])
    print("Latents on disk:", latents.shape)

    student = MultistepConsistencyModel.from_teacher(
        teacher, student_steps=4, guidance_scale=5.0
    )
    student.compile(optimizer=keras.optimizers.Adam(1e-4))
    student.fit(latents, text, batch_size=2, verbose=0)

"""
## What a student holds

The student above holds the network four times: the teacher's own, a copy of it,
the student's and its moving average. That is safe, and for a large model too
much:

- `copy=False` takes the teacher's own network, which is then frozen.
- `ema="bfloat16"` keeps the average in half the space, `ema=None` keeps none.
- `lora_rank=64` trains adapters of the dense layers alone. The network without
  them is the teacher, so that there is one copy, and with `copy=False` that one
  is the foreign model's.
"""

if runs("keras_hub"):
    lean = MultistepConsistencyModel.from_teacher(
        teacher, student_steps=4, guidance_scale=5.0, copy=False, ema="bfloat16"
    )
    small = MultistepConsistencyModel.from_teacher(
        teacher,
        student_steps=4,
        guidance_scale=5.0,
        lora_rank=2,
        lora_targets=["attention"],
    )
    small.compile(optimizer=keras.optimizers.Adam(1e-4))
    small.fit(latents, text, batch_size=2, verbose=0)

    small.save_lora(f"{folder}/student.npz")
    small.load_lora(f"{folder}/student.npz")
    print("Adapters:", os.path.getsize(f"{folder}/student.npz"), "bytes")
    merged = small.merged_network()  # one of theirs again, without adapters
    print("Merged:", merged.network.count_params(), "parameters")

"""
## keras-cv's Stable Diffusion

```python
sd = keras_cv.models.StableDiffusion(512, 512)
```

keras-cv has ended, and lives on in KerasHub; its Stable Diffusion 1.4 and 2.1
still load. The stand-ins below take the places of what it would download.
"""

if runs("keras_cv"):
    import keras_cv

    latent, time = keras.Input((16, 16, 4)), keras.Input((320,))
    context = keras.Input((77, 8))
    tokens = keras.Input((77,), dtype="int32", name="tokens")
    positions = keras.Input((77,), dtype="int32", name="positions")
    seen = layers.Dense(4)(time) + layers.Dense(4)(context[:, 0])
    noise = layers.Conv2D(4, 3, padding="same")(latent)
    noise = noise + layers.Reshape((1, 1, 4))(seen)
    embedded = layers.Embedding(49408, 8)(tokens)
    embedded = embedded + layers.Embedding(77, 8)(positions)

    sd = keras_cv.models.StableDiffusion(128, 128, jit_compile=False)
    sd._diffusion_model = keras.Model([latent, time, context], noise)
    sd._text_encoder = keras.Model([tokens, positions], embedded)
    sd._decoder = keras.Sequential(
        [
            keras.Input((16, 16, 4)),
            layers.Rescaling(1 / 0.18215),
            layers.UpSampling2D(8),
            layers.Conv2D(3, 1),
        ]
    )

    teacher = adapters.from_keras_cv(sd)
    images = teacher.generate(
        num_steps=10,
        guidance_scale=7.5,
        schedule=adapters.stable_diffusion_grid(10),
        conditioning={"context": normal(2, 77, 8)},
    )
    print("Stable Diffusion of keras-cv:", images.shape)
    student = MultistepConsistencyModel.from_teacher(
        teacher, student_steps=4, guidance_scale=7.5
    )

"""
Prompts go through `adapters.encode_prompts(sd, ["a tortoise"])`. The schedule
of `teacher` has the noise levels of training; `stable_diffusion_grid(10)` is
the grid on which keras-cv itself takes 10 steps.

## A UNet of diffusers

```python
pipe = DiffusionPipeline.from_pretrained("stabilityai/stable-diffusion-xl...")
unet, scheduler, vae = pipe.unet, pipe.scheduler, pipe.vae
```

On the torch backend. UNets, DiT and the transformer of Stable Diffusion 3, and
any scheduler with a table of noise levels or of flow matching. The prompts'
embeddings are those that the pipeline makes (`pipe.encode_prompt`).
"""

if runs("diffusers", "torch"):
    import diffusers

    blocks = {"block_out_channels": (8, 16), "norm_num_groups": 4}
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=12,
        **blocks,
    )
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear")
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        **blocks,
    )
    empty = normal(5, 12)  # pipe.encode_prompt([""], ...)

    teacher = adapters.from_diffusers(
        unet, scheduler, vae=vae, null_conditioning={"context": empty}
    )
    text = {"context": normal(2, 5, 12)}
    images = teacher.generate(
        num_steps=4, guidance_scale=3.0, conditioning=text
    )
    print("Stable Diffusion of diffusers:", images.shape)
    student = MultistepConsistencyModel.from_teacher(
        teacher, student_steps=4, guidance_scale=3.0
    )
    student.compile(optimizer=keras.optimizers.Adam(1e-4))
    student.fit(normal(2, 8, 8, 4), text, batch_size=2, verbose=0)

"""
## A module of Flax

On the jax backend, `linen` or `nnx`. Say by `names` what its arguments are
called, and what it takes for time and returns, if that isn't log-SNR and `v`.
"""

if runs("flax", "jax"):
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    class Denoiser(nn.Module):
        @nn.compact
        def __call__(self, x, t, train=False):
            hidden = nn.Conv(8, (3, 3))(x) + nn.Dense(8)(t)
            hidden = nn.Dropout(0.1, deterministic=not train)(nn.swish(hidden))
            return nn.Conv(3, (3, 3))(hidden)

    module = Denoiser()
    params = module.init(
        jax.random.key(0), jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 1, 1, 1))
    )

    teacher = adapters.from_flax_linen(
        module,
        params,
        image_shape=(8, 8, 3),
        output="epsilon",
        time="noise_variance",
        time_axes=3,
        names={"z": "x", "logsnr": "t"},
    )
    print("Flax:", teacher.generate(2, num_steps=4).shape)
    student = MultistepConsistencyModel.from_teacher(teacher, student_steps=2)

"""
To save a whole model with such a network, give `builder=`, a function that
makes the module: a file holds no pickles. Weights alone need none.

## A network of EDM

For a network `F` that was trained within EDM's preconditioning.
"""

maps, time = keras.Input((8, 8, 3)), keras.Input(())
hidden = layers.Conv2D(8, 3, padding="same", activation="swish")(maps)
hidden = hidden + layers.Reshape((1, 1, 8))(
    layers.Dense(8)(layers.Reshape((1,))(time))
)
edm = keras.Model([maps, time], layers.Conv2D(3, 3, padding="same")(hidden))

teacher = adapters.from_edm(edm, (8, 8, 3), sigma_data=0.5)
images = teacher.generate(
    2, num_steps=18, sampler=samplers.Heun(), schedule=adapters.edm_grid(18)
)
print("EDM:", images.shape)
student = MultistepConsistencyModel.from_teacher(teacher, student_steps=2)

"""
## keras.io's DDIM example

What [that example](https://keras.io/examples/generative/ddim/) trains has an
`ema_network` and a `normalizer`. Here is a network of the same inputs:
"""

noisy, variance = keras.Input((8, 8, 3)), keras.Input((1, 1, 1))
spread = layers.UpSampling2D(8, interpolation="nearest")(variance)
hidden = layers.Concatenate()([layers.Conv2D(8, 1)(noisy), spread])
hidden = layers.Conv2D(8, 3, padding="same", activation="swish")(hidden)
ddim_unet = keras.Model([noisy, variance], layers.Conv2D(3, 1)(hidden))
normalizer = layers.Normalization()
normalizer.adapt(rng.uniform(0, 1, (16, 8, 8, 3)))

teacher = adapters.from_keras_io_ddim(ddim_unet, normalizer=normalizer)
print("keras.io:", teacher.generate(2, num_steps=20).shape)
student = MultistepConsistencyModel.from_teacher(teacher, student_steps=2)

"""
## Other networks

These functions are thin: `adapters.AdaptedNetwork` says of any network in which
coordinates it takes `z` (variance preserving or exploding, rectified flow,
EDM's), what it takes for time (log-SNR, sigma, flow time, a discrete step,
sinusoids of it) and what it returns. Here, rectified flow with time in 0..1000:
"""

flow = adapters.AdaptedNetwork(
    keras.Model([maps, time], layers.Conv2D(3, 3, padding="same")(maps)),
    (8, 8, 3),
    process="rectified_flow",
    time="flow_time",
    output="flow",
    time_scale=1000.0,
    names=["z", "logsnr"],
)
teacher = DiffusionModel(flow, schedules.RectifiedFlowSchedule(shift=3.0))
print("Rectified flow:", teacher.generate(2, num_steps=4).shape)

"""
## A formula

A teacher needn't be a network. Where the mean of `x` given `z` is known, that
is one: of data from a normal distribution with deviation 1/2, for instance.
Such a student has no weights to begin with, so its network is given.
"""


def mean(z, logsnr, conditioning):
    alpha, snr = ops.sqrt(ops.sigmoid(logsnr)), ops.exp(logsnr)
    weight = snr / (4.0 + snr) / alpha  # 4 is one over the data's variance
    return weight[:, None, None, None] * z


student = MultistepConsistencyModel(
    flow.clone(),
    student_steps=1,
    space=spaces.Box((8, 8, 3), variance=0.25),
    teacher=mean,
)
student.compile(optimizer=keras.optimizers.Adam(1e-4))
student.fit(0.5 * normal(4, 8, 8, 3), batch_size=4, verbose=0)
print("A formula's student:", student.generate(2).shape)

"""
## Save

A student's file holds no teacher. Files with `save_to_preset` hold the averaged
weights alone.
"""

student.save(f"{folder}/student.keras")
student = keras.saving.load_model(f"{folder}/student.keras")
student.attach_teacher(mean)  # to train on

"""
## How near, and how much

Each adapted model beside its own library's sampler, on the same noise: the
largest difference over the deviation of the samples, in float32. CD: where a
step of consistency distillation ran. Copies: of the foreign network's weights
that teacher and student hold together, plainly, with `copy=False`, with
`ema=None` besides, and with `lora_rank=1` (of networks so small that adapters
are a large share; by `copy=False` it is one less). Lines: those above that make
teacher and student.

<!-- table -->

| foreign model | lines | 4 steps | 50 steps | CD | copies |
| --- | --- | --- | --- | --- | --- |
| KerasHub: Stable Diffusion 3 | 4 | 4.5e-5 | 4.4e-6 | jax, tensorflow, torch (guided) | 4.00 / 3.00 / 2.00 / 2.08 |
| KerasHub: Stable Diffusion 3, guided | 4 | 7.0e-5 | 8.6e-6 | jax, tensorflow, torch (guided) | 4.00 / 3.00 / 2.00 / 2.08 |
| keras-cv: Stable Diffusion, guided | 4 | 2.4e-5 | 9.0e-6 | jax, tensorflow, torch (guided) | 4.00 / 3.00 / 2.00 / 2.05 |
| diffusers: `UNet2DModel` | 6 | 8.5e-7 | 3.3e-6 | torch | 4.00 / 3.00 / 2.00 / - |
| diffusers: `UNet2DModel` that predicts x | 6 | 1.2e-4 | 8.6e-5 | torch | 4.00 / 3.00 / 2.00 / - |
| diffusers: `UNet2DModel`, v, zero terminal SNR | 6 | 1.1e-6 | 2.2e-6 | torch | 4.00 / 3.00 / 2.00 / - |
| diffusers: `UNet2DConditionModel` | 6 | 6.3e-7 | 2.3e-6 | torch (guided) | 4.00 / 3.00 / 2.00 / - |
| diffusers: `UNet2DConditionModel` of XL | 6 | 1.0e-6 | 2.1e-6 | torch (guided) | 4.00 / 3.00 / 2.00 / - |
| diffusers: `DiTTransformer2DModel` | 6 | 4.8e-7 | 2.6e-6 | torch (guided) | 4.00 / 3.00 / 2.00 / - |
| diffusers: `SD3Transformer2DModel` | 6 | 1.2e-5 | 1.7e-6 | torch (guided) | 4.00 / 3.00 / 2.00 / - |
| Flax: linen | 10 | 2.8e-7 | 1.5e-6 | jax (guided) | 4.00 / 3.00 / 2.00 / - |
| Flax: nnx | 10 | 3.4e-7 | 1.2e-6 | jax (guided) | 4.00 / 3.00 / 2.00 / - |
| EDM's preconditioning | 2 | 1.9e-6 | 2.4e-6 | jax, tensorflow, torch (guided) | 4.00 / 3.00 / 2.00 / 2.04 |
| keras.io's DDIM example | 2 | 1.7e-5 | 7.2e-5 | jax, tensorflow, torch | 4.00 / 3.00 / 2.00 / - |
| a Keras network | 9 | 7.4e-7 | 1.3e-6 | jax, tensorflow, torch (guided) | 4.00 / 3.00 / 2.00 / 2.04 |

<!-- end of the table -->

From `python -m benchmarks.adapters` on each backend; versions, hardware and
seeds are in `benchmarks/adapters/table.md`. The models are tiny and random:
nothing was distilled here from trained weights, and the table says nothing of
the quality of students.
"""
