"""The moving average of the weights, against one in float64."""

import keras
import numpy as np
import pytest


def numpy_average(start, seen, ema_decay):
    """The moving average of the weights after each update."""
    average = [w.astype("float64") for w in start]
    for i, weights in enumerate(seen):
        decay = min(ema_decay, (1 + i) / (10 + i))
        average = [
            decay * a + (1 - decay) * w for a, w in zip(average, weights)
        ]
    return average


@pytest.mark.parametrize("accumulation", [None, 2])
def test_ema_is_the_numpy_average(
    accumulation, make_teacher, toy_images, weights_of, snapshots
):
    # 0.3 holds from the fourth update on, (1 + i) / (10 + i) before.
    optimizer = keras.optimizers.Adam(
        1e-2, gradient_accumulation_steps=accumulation
    )
    model = make_teacher(
        model_with={"ema_decay": 0.3}, compile_with={"optimizer": optimizer}
    )
    start = weights_of(model.ema_network)
    images = toy_images(12)
    for _ in range(2):
        model.fit(images, batch_size=2, verbose=0, callbacks=[snapshots])
    assert len(snapshots.seen) == 12
    seen = snapshots.seen[1::2] if accumulation else snapshots.seen
    assert int(model.iteration) == len(seen)
    expected = numpy_average(start, seen, 0.3)
    for average, reference, first, last in zip(
        weights_of(model.ema_network), expected, start, seen[-1]
    ):
        np.testing.assert_allclose(average, reference, rtol=1e-5, atol=1e-6)
        assert np.max(np.abs(average - first)) > 1e-3
        assert np.max(np.abs(average - last)) > 1e-4


@pytest.mark.parametrize(
    ("accumulation", "scaled"), [(None, False), (2, False), (2, True)]
)
def test_ema_half_life_counts_images(
    accumulation, scaled, make_teacher, toy_images, weights_of, snapshots
):
    # Batches of 4, 4 and 2; or of two at once, 8, also within an optimizer that
    # scales the loss.
    optimizer = keras.optimizers.Adam(
        1e-2, gradient_accumulation_steps=accumulation
    )
    if scaled:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model = make_teacher(
        model_with={"ema_half_life": 3.0, "ema_decay": 0.0},
        compile_with={"optimizer": optimizer},
    )
    average = [w.astype("float64") for w in weights_of(model.ema_network)]
    images = toy_images(8 if accumulation else 10)
    model.fit(images, batch_size=4, epochs=4, verbose=0, callbacks=[snapshots])
    seen = snapshots.seen[1::2] if accumulation else snapshots.seen
    sizes = [8] * 4 if accumulation else [4, 4, 2] * 4
    assert int(model.iteration) == len(seen) == len(sizes)
    halved = []
    for i, (size, weights) in enumerate(zip(sizes, seen, strict=True)):
        decay = 0.5 ** (size / 3.0)
        halved.append(decay < (1 + i) / (10 + i))
        decay = min(decay, (1 + i) / (10 + i))
        average = [
            decay * a + (1 - decay) * w for a, w in zip(average, weights)
        ]
    assert any(halved)
    for ours, expected, last in zip(
        weights_of(model.ema_network), average, seen[-1]
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
        assert np.max(np.abs(ours - last)) > 1e-4
