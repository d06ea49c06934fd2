"""What a training step will cost on TPUs, without a TPU.

The true step is compiled with the TPU compiler for a slice that is only
described, on any Linux machine: `pip install 'keras-mscm[tpu]'`. It says
whether the step fits into memory, and its estimate of the time.

    python -m keras_mscm.plan --preset imagenet64_small --topology v5e:8x8 \
        --batch-size 2048 --method training
"""

from keras_mscm.plan.estimate import make_plan
from keras_mscm.plan.report import markdown

__all__ = ["make_plan", "markdown"]
