import ctypes
import gc
import os
import resource
from pathlib import Path

# Before PyTorch is imported: the tests' tensors are small, and its threads
# wait for each other where cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Before JAX is: what it compiled is kept for other tests, workers and runs.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(__file__).parents[1] / ".venv" / "jax_cache"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import keras
import numpy as np
import pytest

from keras_mscm import UViT

BACKEND = keras.backend.backend()

# Compiling is where most of the time goes, so it is done with little effort.
flags = "--xla_backend_optimization_level=0"
if BACKEND == "jax":
    import jax

    # An older way of JAX's to compile takes half as long; 0.12 has it no more.
    if jax.__version_info__ < (0, 11):
        flags += " --xla_cpu_use_fusion_emitters=false"
        # A program's parts are compiled at once otherwise, each with what is
        # spent on one, and the other workers have the cores.
        flags += " --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("XLA_FLAGS", flags)


# Collecting garbage needn't look through what was imported, each time anew.
gc.collect()
gc.freeze()


def forget():
    """Gives back the memory of all that was compiled."""
    if BACKEND == "jax":
        jax.clear_caches()
    gc.collect()
    # The C library, if it is GNU's, keeps what is free otherwise.
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)


@pytest.fixture(autouse=True, scope="module")
def forgotten_after_a_file():
    yield
    keras.utils.clear_session(free_memory=False)
    # What JAX compiled for one file, others need too, until it is much.
    if BACKEND != "jax":
        forget()


@pytest.fixture(autouse=True)
def forgotten_when_there_is_much():
    yield
    statm = Path("/proc/self/statm")  # Linux has it
    # Elsewhere little comes back: TensorFlow keeps graphs, whoever asks.
    if BACKEND == "jax" and statm.exists():
        pages = int(statm.read_text().split()[1])
        if pages * resource.getpagesize() > 2e9:
            forget()


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(0)


@pytest.fixture
def tiny_uvit():
    """A factory of UViTs of one transformer block on 8x8 images.

    A new UViT is zero everywhere. With `random_output`, its zero-initialised
    kernels are filled with (always the same) random numbers.
    """

    def make(*, random_output=True, **overrides):
        config = dict(
            image_shape=(8, 8, 1),
            widths=(32,),
            depths=(1,),
            attention=True,
            head_width=16,
            embedding_width=32,
            seed=1,
        )
        network = UViT(**{**config, **overrides})
        if random_output:
            rng = np.random.default_rng(1)
            for weight in network.trainable_variables:
                zero = not np.any(keras.ops.convert_to_numpy(weight))
                if zero and weight.name == "kernel":
                    scale = np.prod(weight.shape[:-1]) ** -0.5
                    weight.assign(scale * rng.standard_normal(weight.shape))
        return network

    return make
