"""Prompts, by the text encoders of foreign models."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_mscm import backend, checks


def encode_prompts(
    model: Any, prompts: Sequence[str] | Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """What a foreign model's text encoders make of prompts.

    You want it for `generate(conditioning=encode_prompts(model, prompts))`,
    and once over the captions of data, for `fit`. Models of this library hold
    no text encoders.

    Args:
        model: As for `from_keras_hub` (Stable Diffusion 3) or `from_keras_cv`.
        prompts: Strings; or, of Stable Diffusion 3, their tokens as its
            preprocessor makes them, `{"clip_l": (batch, length), "clip_g":
            ...}` and `"t5"` if there is one.

    Returns:
        `"context"`, and `"pooled"` of Stable Diffusion 3; float32.

    Raises:
        ValueError: If an argument isn't as above.
    """
    core = getattr(model, "backbone", model)
    if not isinstance(prompts, Mapping):
        checks.check_sequence("prompts", prompts, "a list of strings")
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise checks.invalid("prompts", "a list of strings", prompt)
    if hasattr(model, "encode_text"):
        if isinstance(prompts, Mapping):
            raise checks.invalid("prompts", "a list of strings", prompts)
        encoded = [ops.convert_to_numpy(model.encode_text(p)) for p in prompts]
        return {"context": np.concatenate(encoded).astype("float32")}
    if not hasattr(core, "encode_text_step") or not hasattr(core, "clip_l"):
        raise checks.invalid(
            "model",
            "Stable Diffusion 3 of KerasHub, or Stable Diffusion of keras-cv",
            model,
        )
    if isinstance(prompts, Mapping):
        return _encoded(core, prompts)
    if not has_preprocessor(model):
        raise ValueError(
            "`model` must have a preprocessor, or `prompts` be tokens. "
            f"Received: {checks.describe(model)}, and strings"
        )
    return _encoded(core, model.preprocessor.generate_preprocess([*prompts]))


def has_preprocessor(model: Any) -> bool:
    """Whether a task of KerasHub can turn strings into tokens."""
    return getattr(model, "preprocessor", None) is not None


def _encoded(core: Any, prompts: Mapping[str, Any]) -> dict[str, np.ndarray]:
    names = ["clip_l", "clip_g"] + (["t5"] if core.t5 is not None else [])
    if sorted(prompts) != sorted(names):
        raise checks.invalid("prompts", f"tokens for {names}", prompts)
    tokens = {
        name: ops.convert_to_tensor(prompts[name], "int32") for name in names
    }

    def encode(tokens):
        # The step always encodes two sets of prompts; the compiler sees that
        # they are the same.
        context, _, pooled, _ = core.encode_text_step(tokens, tokens)
        return context, pooled

    encoders = [getattr(core, name) for name in names]
    encoders += [core.clip_l_projection, core.clip_g_projection]
    variables = [v for layer in encoders for v in layer.variables]
    encoded = backend.compile_inference(encode, variables)(tokens)
    context, pooled = (
        ops.convert_to_numpy(ops.cast(value, "float32")) for value in encoded
    )
    return {"context": context, "pooled": pooled}
