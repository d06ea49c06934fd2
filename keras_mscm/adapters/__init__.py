"""Adapters: other libraries' diffusion networks as teachers and students."""

from keras_mscm.adapters.network import AdaptedNetwork

__all__ = ["AdaptedNetwork"]
