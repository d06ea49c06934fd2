"""What users would pick instead, on the same images and batches.

Rebuilt from their public parts, with the smallest widths that their code is
meant for, and a step that computes what ours does in consistency training: a
forward pass without gradient, and one with. FLOPs are counted by each
framework's own counter, products only.

- diffusers: UNet2DModel, sampled with CMStochasticIterativeScheduler.
- OpenAI's consistency models (Song et al., 2023): the network of Dhariwal &
  Nichol as diffusers hosts it (scale and shift, ResNet down- and upsampling),
  with their averaged target network and Karras' noise levels.
- denoising-diffusion-pytorch: the UViT of its simple_diffusion.py.
- KerasHub: the MMDiT of Stable Diffusion 3, on the backend that runs this.
"""

import copy
import importlib.util
import statistics
import time
from pathlib import Path

import keras
import numpy as np

from benchmarks.speed import timing
from benchmarks.speed.rows import emit, main

SIZES = {28: (1, 128), 64: (3, 32)}  # channels and batch
NUM_STEPS = 8


def unet(size, channels, adm=False):
    from diffusers import UNet2DModel

    widths = (32, 64) if size < 64 else (32, 64, 128)
    attends = [width == 128 for width in widths]
    down = ["AttnDownBlock2D" if a else "DownBlock2D" for a in attends]
    up = ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)]
    extra = {}
    if adm:
        down = [b.replace("DownBlock2D", "DownsampleBlock2D") for b in down]
        down = [
            "ResnetDownsampleBlock2D" if b == "DownsampleBlock2D" else b
            for b in down
        ]
        down = [b.replace("AttnDownsample", "AttnDown") for b in down]
        up = ["ResnetUpsampleBlock2D" if b == "UpBlock2D" else b for b in up]
        extra = dict(
            resnet_time_scale_shift="scale_shift",
            downsample_type="resnet",
            upsample_type="resnet",
        )
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=2,
        down_block_types=down,
        up_block_types=up,
        attention_head_dim=64,
        norm_num_groups=32,
        **extra,
    )


def simple_diffusion_uvit(size, channels):
    # By its file: the package itself imports torchvision.
    package = importlib.util.find_spec("denoising_diffusion_pytorch")
    path = Path(package.submodule_search_locations[0], "simple_diffusion.py")
    spec = importlib.util.spec_from_file_location("simple_diffusion", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.UViT(
        dim=32,
        dim_mults=(1, 2) if size < 64 else (1, 2, 4),
        channels=channels,
        vit_depth=2 if size < 64 else 6,
        vit_dropout=0.0,
        attn_dim_head=64,
    )


def torch_peers(size, compiled):
    """Times each network of PyTorch's; `compiled` with `torch.compile`."""
    import torch
    from diffusers import CMStochasticIterativeScheduler
    from torch.utils.flop_counter import FlopCounterMode

    channels, batch = SIZES[size]
    x = torch.rand(batch, channels, size, size) * 2 - 1

    def first(output):
        return getattr(output, "sample", output)

    def rate(name, network, averaged):
        t = torch.rand(batch)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(x, t)
        forward = counter.get_total_flops()
        target = copy.deepcopy(network) if averaged else network
        run, run_target = network, target
        if compiled:
            run = torch.compile(network)
            run_target = torch.compile(target) if averaged else run
        optimizer = torch.optim.Adam(network.parameters(), 1e-4, foreach=True)
        weights = [*network.parameters()]
        averages = [p.detach().clone() for p in weights]
        if averaged:
            averages = [*target.parameters()]

        def step():
            noise = torch.randn_like(x)
            sigma = torch.rand(batch, 1, 1, 1) * 79 + 1
            with torch.no_grad():
                known = first(run_target(x + 0.9 * sigma * noise, t))
            said = first(run(x + sigma * noise, t))
            loss = (said - known).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(averages, weights, 1e-4)

        scheduler = CMStochasticIterativeScheduler()

        def sample():
            scheduler.set_timesteps(NUM_STEPS)
            z = torch.randn_like(x) * scheduler.init_noise_sigma
            with torch.inference_mode():
                for level in scheduler.timesteps:
                    scaled = scheduler.scale_model_input(z, level)
                    said = first(run(scaled, level.float().expand(batch)))
                    z = scheduler.step(said, level, z).prev_sample
            return z

        report(name, size, batch, forward, step, sample)

    suffix = ", torch.compile" if compiled else ""
    networks = {
        "diffusers UNet2DModel": (unet(size, channels), False),
        "OpenAI's network and step": (unet(size, channels, adm=True), True),
        "denoising-diffusion-pytorch UViT": (
            simple_diffusion_uvit(size, channels),
            False,
        ),
    }
    for name, (network, averaged) in networks.items():
        rate(name + suffix, network, averaged)


def report(name, size, batch, forward, step, sample):
    """Times a training step and a sampling in 8 steps."""
    step()
    sample()
    seconds = statistics.median(timing.seconds(step) for _ in range(3))
    sampling = statistics.median(timing.seconds(sample) for _ in range(2))
    emit(
        part="alternatives",
        what=f"{name}, {size}x{size}, batch {batch}",
        network=name,
        size=size,
        gflop_per_image=forward / batch / 1e9,
        training_gflops=4 * forward / seconds / 1e9,
        training_images_per_second=batch / seconds,
        sampling_gflops=NUM_STEPS * forward / sampling / 1e9,
        sampling_images_per_second=batch / sampling,
    )


def kerashub(size):
    """KerasHub's MMDiT as a Keras model of the same job, by `fit`."""
    from keras_hub.src.models.stable_diffusion_3.mmdit import MMDiT

    channels, batch = SIZES[size]
    patch, width, depth = (4, 128, 3) if size < 64 else (8, 512, 4)
    network = MMDiT(
        patch_size=patch,
        hidden_dim=width,
        num_layers=depth,
        num_heads=width // 64,
        position_size=size // patch,
        latent_shape=(size, size, channels),
        context_shape=(1, 64),
        pooled_projection_shape=(64,),
    )
    x = np.random.default_rng(0).random(
        (batch, size, size, channels), "float32"
    )
    inputs = {
        "latent": x,
        "context": np.zeros((batch, 1, 64), "float32"),
        "pooled_projection": np.zeros((batch, 64), "float32"),
        "timestep": np.zeros((batch, 1), "float32"),
    }
    network.compile(optimizer=keras.optimizers.Adam(1e-4), loss="mse")
    # Tokens: those of the image and one of context, each with weights of its
    # own; 4 c^2 for attention, 8 c^2 for the MLP, 6 c^2 per image to modulate.
    tokens = (size // patch) ** 2
    forward = (
        2
        * batch
        * depth
        * (
            (tokens + 1) * 12 * width**2
            + 2 * (tokens + 1) ** 2 * width
            + 2 * 6 * width**2
        )
    )

    def step():
        network.predict_on_batch(inputs)
        network.train_on_batch(inputs, x)

    def sample():
        for _ in range(NUM_STEPS):
            network.predict_on_batch(inputs)

    report("KerasHub MMDiT", size, batch, forward, step, sample)


def measure(quick):
    begun = time.perf_counter()
    if keras.backend.backend() == "torch":
        for size in SIZES:
            torch_peers(size, compiled=False)
        if not quick:
            torch_peers(28, compiled=True)
    for size in SIZES:
        kerashub(size)
    emit(
        part="seconds", what="alternatives", seconds=time.perf_counter() - begun
    )


if __name__ == "__main__":
    main(measure)
