"""Plans of foreign networks: Stable Diffusion 3, and LoRA students."""

import functools
import json
import resource

import keras
import numpy as np
import pytest

from keras_mscm import MultistepConsistencyModel, backend, plan
from keras_mscm.plan import __main__ as command
from keras_mscm.plan import compiler, foreign
from keras_mscm.plan.chips import Slice
from keras_mscm.plan.estimate import GIB
from keras_mscm.plan.steps import (
    bytes_of,
    gradient_bytes,
    pass_flops,
    state_parts,
    step_of,
)

pytest.importorskip("keras_hub")
on_jax = pytest.mark.skipif(
    backend.NAME != "jax", reason="plans are made on JAX"
)
NAME = "stable_diffusion_3_medium"
CLIP = {
    "vocabulary_size": 20,
    "num_layers": 2,
    "num_heads": 2,
    "intermediate_dim": 16,
    "intermediate_output_index": -2,
    "max_sequence_length": 6,
}
TINY = {
    "backbone": {
        **foreign.STABLE_DIFFUSION_3_MEDIUM["backbone"],
        "mmdit_hidden_dim": 16,
        "mmdit_num_layers": 2,
        "mmdit_num_heads": 2,
        "mmdit_position_size": 4,
        "image_shape": (64, 64, 3),
    },
    "vae": {
        "encoder_num_filters": [32] * 4,
        "encoder_num_blocks": [1] * 4,
        "decoder_num_filters": [32] * 4,
        "decoder_num_blocks": [1] * 4,
    },
    "clip_l": {**CLIP, "embedding_dim": 8, "hidden_dim": 8},
    "clip_g": {**CLIP, "embedding_dim": 12, "hidden_dim": 12},
    "context_length": 12,
}
SETTINGS = dict(
    student_steps=4,
    dtype="mixed_bfloat16",
    remat=False,
    gradient_accumulation_steps=None,
)
ARGUMENTS = dict(preset=NAME, topology="v5p:1x1x1", batch_size=1)


@pytest.fixture
def tiny(monkeypatch):
    """Of the same path, so small that it can be made in earnest."""

    def make(dtype, remat):
        return foreign.stable_diffusion_3(TINY, dtype, remat)

    monkeypatch.setitem(foreign.FOREIGN, "tiny", make)
    return make


def held(variables):
    return sum(np.asarray(variable.value).nbytes for variable in variables)


@on_jax
@pytest.mark.parametrize(
    ("dtype", "lora_rank"), [("mixed_bfloat16", 3), ("bfloat16", None)]
)
def test_counted_is_what_a_model_takes(tiny, dtype, lora_rank):
    step = step_of(
        "tiny",
        "distillation",
        2,
        **{**SETTINGS, "dtype": dtype},
        lora_rank=lora_rank,
        guidance_scale=7.0,
    )
    counted = state_parts(step)

    student = MultistepConsistencyModel.from_teacher(
        tiny(dtype, False),
        copy=False,
        student_steps=4,
        guidance_scale=7.0,
        lora_rank=lora_rank,
    )
    student.compile(optimizer=keras.optimizers.Adam())
    student.optimizer.build(student.trainable_variables)
    assert sum(counted.values()) == held(
        [
            *student.variables,
            *student.optimizer.variables,
            *student.metrics_variables,
        ]
    )
    trained = held(student.trainable_variables)
    assert gradient_bytes(step) == trained
    assert counted["network" if lora_rank is None else "adapters"] == trained
    assert counted["autoencoder"] == held(
        [*student.encoder.variables, *student.decoder.variables]
    )
    if lora_rank is None:
        assert counted["teacher"] == held(student.teacher.variables)
    else:
        # Held once, by the student and the teacher within.
        assert "teacher" not in counted
        assert counted["moving average"] == trained
        assert counted["frozen network"] == held(
            student.network.non_trainable_variables
        )


@on_jax
def test_stable_diffusion_3_medium_has_its_published_size():
    from keras_hub.models import StableDiffusion3Backbone

    core = compiler.without_values(
        lambda: foreign.stable_diffusion_3_backbone(
            foreign.STABLE_DIFFUSION_3_MEDIUM, "bfloat16"
        )
    )
    published = StableDiffusion3Backbone.presets[NAME]["metadata"]["params"]
    assert core.count_params() == published


@on_jax
def test_a_student_of_stable_diffusion_3_medium_is_counted():
    """KerasHub's diffuser has 2,084,951,104 weights."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    made = plan.make_plan(
        **ARGUMENTS,
        method="distillation",
        lora_rank=64,
        guidance_scale=7.0,
        memory_gb=80,
        compiled=False,
    )
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 1e6  # kB: an eighth of the weights
    state = made["state_gib"]
    assert state["frozen network"] == pytest.approx(
        4 * 2084951104 / GIB, rel=1e-3
    )
    for times, name in ((1, "moving average"), (2, "optimizer")):
        assert state[name] == pytest.approx(times * state["adapters"])
    assert made["gradients_gib"] == state["adapters"]
    assert made["memory_gib_per_chip"] == pytest.approx(10.10, abs=0.01)
    assert made["memory_capacity_gib"] == pytest.approx(74.5, abs=0.01)
    assert made["fits"] is None


@on_jax
def test_the_step_can_be_traced_and_remat_is_heard(tiny):
    import jax

    def text(remat):
        step = step_of(
            "tiny",
            "distillation",
            2,
            **{**SETTINGS, "remat": remat},
            lora_rank=3,
            guidance_scale=7.0,
        )
        assert step.passes == 6

        def shape(x):
            return jax.ShapeDtypeStruct(tuple(x.shape), x.dtype)

        inputs = keras.tree.map_structure(shape, (step.variables, step.batch))
        return str(jax.make_jaxpr(step.function)(*inputs))

    assert "remat" not in text(False)
    assert "remat" in text(True)


@on_jax
@pytest.mark.parametrize("method", ["training", "generate"])
def test_other_steps_of_foreign_networks(tiny, method):
    step = step_of("tiny", method, 2, **SETTINGS, lora_rank=3)
    parts = state_parts(step)
    assert "teacher" not in parts
    assert gradient_bytes(step) == (
        parts["adapters"] if method == "training" else 0
    )


@on_jax
def test_flops_of_a_foreign_pass(monkeypatch):
    """Each weight of a block meets every token, and queries all keys."""
    sizes = foreign.STABLE_DIFFUSION_3_MEDIUM
    two = {"backbone": {**sizes["backbone"], "mmdit_num_layers": 2}}
    sizes = {**TINY, **two, "context_length": 154}
    monkeypatch.setitem(
        foreign.FOREIGN,
        NAME,
        lambda *args: foreign.stable_diffusion_3(sizes, *args),
    )
    step = step_of(NAME, "training", 1, **SETTINGS)
    width, image, prompt = 1536, 64**2, 154
    dense = 12 * width**2 * (image + prompt)
    attention = 2 * width * (image + prompt) ** 2
    # The last block has less for the prompt.
    expected = 2 * 2 * (dense + attention)
    # But for embeddings, modulations, norms and softmax.
    assert pass_flops(step.model) == pytest.approx(expected, rel=0.08)


@on_jax
def test_lora_of_our_own_networks():
    step = step_of("digits", "distillation", 2, **SETTINGS, lora_rank=4)
    parts = state_parts(step)
    assert parts["moving average"] == parts["adapters"]
    assert parts["adapters"] < parts["frozen network"]
    assert sum(parts.values()) == sum(
        map(bytes_of, keras.tree.flatten(step.variables))
    )


@on_jax
def test_command(tiny, capsys, monkeypatch):
    # The plan of both is one.
    monkeypatch.setattr(
        command, "make_plan", functools.cache(command.make_plan)
    )
    arguments = ["--preset=tiny", "--topology=v5p:1x1x1", "--batch-size=1"]
    arguments += ["--method=distillation", "--lora-rank=3", "--no-compile"]
    arguments += ["--guidance-scale=7", "--memory-gb=80"]
    command.main([*arguments, "--json"])
    made = json.loads(capsys.readouterr().out)
    assert made["lora_rank"] == 3
    assert "libtpu" not in made["versions"]
    command.main(arguments)
    table = capsys.readouterr().out
    assert "LoRA of rank 3, guidance 7" in table
    assert "of 74.5058 GiB; arguments" in table
    assert "not compiled" in table


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lora_rank": 0}, "`lora_rank` must be"),
        ({"lora_rank": True}, "`lora_rank` must be"),
        ({"guidance_scale": -1.0}, "`guidance_scale` must be"),
        ({"guidance_scale": 7.0}, "`guidance_scale` must be not given for"),
        ({"memory_gb": 0}, "`memory_gb` must be"),
        ({"memory_gb": 200}, "`memory_gb` must be at most 102, the chip's"),
        ({"compiled": 1}, "`compiled` must be True or False"),
        ({"quick": "yes"}, "`quick` must be True or False"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        plan.make_plan(**{**ARGUMENTS, **kwargs})


@on_jax
@pytest.mark.slow
def test_the_tpu_compiler_takes_one_chip(tiny):
    pytest.importorskip("libtpu")
    made = plan.make_plan(
        **{**ARGUMENTS, "preset": "tiny"},
        method="distillation",
        lora_rank=3,
        guidance_scale=7.0,
        quick=True,
    )
    assert made["num_chips"] == Slice("v5p:1x1x1").num_chips == 1
    assert made["fits"]
    assert made["steps_per_second"] is None
    assert made["memory_gib"]["arguments"] >= sum(made["state_gib"].values())
