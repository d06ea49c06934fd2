"""What callbacks hold on to over many trainings: nothing."""

import gc
import os
from pathlib import Path

import keras
import pytest

from keras_mscm.callbacks import EvaluateSamples, ResumeTraining, SampleGrid

EAGER = keras.backend.backend() == "torch"
WARM, FITS = 5, 20
STATM = Path("/proc/self/statm")


def resident():
    """Megabytes of memory that the process holds."""
    gc.collect()
    pages = int(STATM.read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_many_fits_compile_once_and_take_no_memory(
    make_model, images, tmp_path
):
    if not STATM.exists():
        reason = "the size of a process is read from Linux' /proc"
        print(reason)
        pytest.skip(reason)
    model, traces = make_model(), []
    denoise = model.denoise

    def counted(*args, **kw):
        traces.append(1)
        return denoise(*args, **kw)

    model.denoise = counted
    every = {"every": 3, "num_images": 4, "num_steps": 2}
    callbacks = [
        EvaluateSamples(
            [keras.metrics.Mean(name="mean")],
            best_weights=tmp_path / "best.weights.h5",
            results=tmp_path / "results.jsonl",
            **every,
        ),
        SampleGrid(tmp_path / "grids", **every),
        ResumeTraining(tmp_path / "saves", save_freq=2),
    ]
    for fits in range(1, FITS + 1):  # each goes on where the last one ended
        model.fit(
            images[:12],
            batch_size=4,
            epochs=fits,
            callbacks=callbacks,
            verbose=0,
            shuffle=False,
        )
        if fits == WARM:
            warm, size = len(traces), resident()
    assert int(model.iteration) == 3 * FITS
    grown = resident() - size
    assert grown < 8, f"{grown:.1f} MB in {FITS - WARM} fits"
    # PyTorch calls it in each step, the others but to compile.
    per_fit = warm // WARM if EAGER else 0
    assert len(traces) == warm + (FITS - WARM) * per_fit
