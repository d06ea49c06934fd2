"""Quality over the number of steps."""

import builtins

import keras
import numpy as np
import pytest

from keras_mscm import metrics


class Draws:
    """A model whose images tell the number of steps that they took."""

    def check_generate(self, *, num_images, num_steps, seed):
        self.checked = num_steps

    def generate(self, *, num_images, num_steps, seed):
        return np.full((num_images, 2, 2, 1), num_steps / 10, "float32")


@pytest.mark.once
def test_values_by_number_of_steps(tmp_path):
    metric = keras.metrics.Mean(name="brightness")
    values = metrics.quality_over_steps(
        Draws(), metric, (4, 1), num_images=3, path=tmp_path / "quality.png"
    )
    assert values == pytest.approx({1: 0.1, 4: 0.4})
    assert [*values] == [1, 4]
    assert float(metric.result()) == 0
    assert (tmp_path / "quality.png").stat().st_size > 1000


@pytest.mark.once
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"model": 3}, "`model` must be"),
        ({"metric": keras.metrics.Mean}, "`metric` must be"),
        ({"num_steps": ()}, "`num_steps` must be"),
        ({"num_steps": (1, 0)}, "`num_steps` must be"),
        ({"num_images": 0}, "`num_images` must be"),
        ({"path": 3}, "`path` must be"),
    ],
)
def test_bad_arguments(bad, message):
    good = {
        "model": Draws(),
        "metric": keras.metrics.Mean(),
        "num_images": 2,
    }
    with pytest.raises(ValueError, match=message):
        metrics.quality_over_steps(**{**good, **bad})


@pytest.mark.once
def test_without_matplotlib(monkeypatch, tmp_path):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"keras-mscm\[plots\]"):
        metrics.quality_over_steps(
            Draws(),
            keras.metrics.Mean(),
            num_images=1,
            path=tmp_path / "quality.png",
        )
