"""How a network is told where its prediction is to lead."""

from typing import Any

from keras_mscm.networks.layers import NoiseLevelEmbedding


def embed_end(network: Any, width: int, dtype: Any, rate: float) -> None:
    """Gives a network, built, its `embed_end`, unless it has it.

    Args:
        network: Keras model that adds the embedding to that of time wherever
            its inputs have `"logsnr_end"`.
        width: Length of the embedding, which begins at zero.
        dtype: Policy of the embedding.
        rate: Its `time_rate`.
    """
    if network.embed_end is not None:
        return
    # A built layer is locked, as Keras' own `enable_lora` finds it too.
    network._tracker.unlock()
    network.embed_end = NoiseLevelEmbedding(
        width,
        begins_at_zero=True,
        time_rate=rate,
        dtype=dtype,
        name="embed_end",
    )
    network._tracker.lock()
    network.embed_end.build((None,))
