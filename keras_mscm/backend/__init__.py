"""The one folder that knows which framework runs underneath Keras.

A file per matter in which they differ. All else is `keras.ops`, the same on
JAX, TensorFlow and PyTorch.
"""

from keras_mscm.backend.compiling import (
    compile_inference,
    compiling_for,
    fused,
)
from keras_mscm.backend.devices import (
    divided,
    draw,
    has_several_workers,
    integer,
    lies_on,
    process,
    replica,
    shares,
)
from keras_mscm.backend.forward_mode import jvp
from keras_mscm.backend.framework import (
    NAME,
    portable,
)
from keras_mscm.backend.kernels import (
    laid_out,
    normalized_attention,
    projected,
    unpooled,
)
from keras_mscm.backend.plain_scope import is_plain, plain, remat
from keras_mscm.backend.random_states import (
    host_random_states,
    random_state,
    rewound,
    seed_generator,
    set_host_random_states,
)
from keras_mscm.backend.steps import (
    move_towards,
    run_with_state,
    values_kept,
    waits_for,
)
from keras_mscm.backend.streams import (
    is_tf_dataset,
    lies_on_host,
    watched_tf_dataset,
)

__all__ = [
    "NAME",
    "compile_inference",
    "compiling_for",
    "divided",
    "draw",
    "fused",
    "has_several_workers",
    "host_random_states",
    "integer",
    "is_plain",
    "is_tf_dataset",
    "jvp",
    "laid_out",
    "lies_on",
    "lies_on_host",
    "move_towards",
    "normalized_attention",
    "plain",
    "portable",
    "process",
    "projected",
    "random_state",
    "remat",
    "replica",
    "rewound",
    "run_with_state",
    "seed_generator",
    "set_host_random_states",
    "shares",
    "unpooled",
    "values_kept",
    "waits_for",
    "watched_tf_dataset",
]
