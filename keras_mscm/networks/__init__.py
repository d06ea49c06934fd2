"""Networks: Keras layers that know nothing of diffusion."""

from keras_mscm.networks.uvit import UViT

__all__ = ["UViT"]
