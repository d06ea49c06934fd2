"""Plans: what is read from a compiled program, and what follows from it."""

import json
import resource

import keras
import numpy as np
import pytest

from keras_mscm import backend, plan, preset_files
from keras_mscm.plan import __main__ as command
from keras_mscm.plan import compiler, estimate, operations
from keras_mscm.plan.chips import Slice
from keras_mscm.plan.steps import step_of

on_jax = pytest.mark.skipif(
    backend.NAME != "jax", reason="plans are made on JAX; see the refusal"
)
SETTINGS = dict(
    student_steps=2,
    dtype="mixed_bfloat16",
    remat=False,
    gradient_accumulation_steps=None,
)

# Of the digits' training step on v5e:2x2, shortened; and a loop.
PROGRAM = """HloModule jit_train_step, is_scheduled=true, num_partitions=4

%fused_computation.1 (param_0: f32[64]) -> f32[64] {
  ROOT %convert.3 = f32[64]{0:T(128)S(1)} convert(%param_0)
}

%body.2 (param.1: (s32[], bf16[8,8])) -> (s32[], bf16[8,8]) {
  %fusion.9 = bf16[8,8]{1,0:T(8,128)(2,1)} fusion(%param.1), kind=kOutput, \
calls=%fused_computation.1, metadata={op_name="jit(run)/while/body/u_vi_t_ema/\
middle_0_1/mlp_output/dot_general"}, backend_config={"estimated_cycles":"100"}
}

ENTRY %main.118_spmd (param.21: f32[64,64], param.22: f32[64]) -> f32[64] {
  %fusion.1 = f32[64]{0:T(128)S(1)} fusion(%param.22), kind=kLoop, \
calls=%fused_computation.1, metadata={op_name="jit(train_step)/jvp(u_vi_t)/\
middle_0_0/norm_query/convert_element_type" stack_frame_id=751}, \
backend_config={"window_config":{"estimated_cycles":"1825"}}
  %fusion.2 = f32[64]{0:T(128)S(1)} fusion(%param.22), kind=kLoop, \
calls=%fused_computation.1, metadata={op_name="jit(train_step)/jvp(u_vi_t)/\
middle_0_1/norm_query/convert_element_type" stack_frame_id=751}, \
backend_config={"window_config":{"estimated_cycles":"1175"}}
  %fusion.3 = (f32[64]{0:T(128)S(1)}, bf16[2,64]{1,0:T(8,128)(2,1)}) \
fusion(%param.22), kind=kOutput, calls=%fused_computation.1, \
metadata={op_name="jit(train_step)/transpose(jvp(u_vi_t))/up_1_2/mlp_hidden/\
dot_general" stack_frame_id=751}, backend_config={"estimated_cycles":"5000"}
  %all-reduce.56 = (f32[]{:T(128)}, f32[11,64]{1,0:T(8,128)S(1)}, \
bf16[128]{0:T(256)(128)(2,1)S(1)}) all-reduce(%a, %b, %c), channel_id=1, \
replica_groups=mesh['axis_0'=4] {'axis_0'}, to_apply=%region_51.53.clone, \
metadata={op_name="jit(train_step)/reduce_sum"}
  %all-gather.1 = bf16[64,64]{1,0} all-gather(%d), channel_id=2, \
replica_groups=[1,4]<=[4], dimensions={0}
  %while.3 = (s32[], bf16[8,8]) while(%tuple.1), condition=%cond, body=%body.2
  ROOT %copy.2 = f32[64]{0} copy(%fusion.1)
}
"""


def test_operations_of_a_program():
    ran = operations.read(PROGRAM, loop_runs=3)
    assert operations.by_source(ran)[:3] == [
        ("gradient: u_vi_t/up_1_*/mlp_hidden/dot_general", 1, 5000),
        ("forward: u_vi_t/middle_0_*/norm_query/convert_element_type", 2, 3000),
        ("while/body/u_vi_t_ema/middle_0_*/mlp_output/dot_general", 3, 300),
    ]
    assert operations.sent_bytes(ran) == {
        "all-reduce": 2 * 3 / 4 * (4 + 4 * 11 * 64 + 2 * 128),
        "all-gather": 3 / 4 * 2 * 64 * 64,
    }


def test_what_is_sent_while_others_compute():
    begin = """
%fused_computation.8 (param_0.1: bf16[64,16]) -> (bf16[64,16], bf16[64,64]) {
  %all-gather.7 = bf16[64,64]{0,1:T(8,128)(2,1)} all-gather(%param_0.1), \
replica_groups=mesh['axis_0'=1,'axis_1'=4] {'axis_1'}, dimensions={1}, \
metadata={op_name="jit(train_step)/jvp(u_vi_t)/up_1_2/mlp_hidden/dot_general"}
  ROOT %custom-call.3 = (bf16[64,16]{0,1}, bf16[64,64]{0,1}, u32[]{:S(2)}) \
custom-call(%all-gather.7), custom_call_target="AsyncCollectiveStart"
}

ENTRY"""
    # It goes on within another fusion, which is no second one.
    within = """
  %async-collective-start.7 = (bf16[64,16]{0,1}, bf16[64,64]{0,1}) \
fusion(%e), kind=kCustom, calls=%fused_computation.8
  ROOT"""
    other = "  %all-gather.9 = bf16[64,64]{0,1} all-gather(%p), dimensions={1}"
    text = PROGRAM.replace("\nENTRY", begin).replace("\n  ROOT %copy", within)
    text = text.replace("  ROOT %convert.3", f"{other}\n  ROOT %convert.3")
    before, after = map(operations.read, (PROGRAM, text))
    sent = operations.sent_bytes(before)
    assert operations.sent_bytes(after) == sent
    meanwhile = operations.sent_bytes(after, meanwhile=True)
    assert meanwhile == {"all-gather": sent["all-gather"]}
    (new,) = set(after) - set(before)
    assert (new.kind, new.cycles, new.runs) == ("all-gather", 0, 1)
    assert new.source == "forward: u_vi_t/up_1_*/mlp_hidden/dot_general"
    plan = estimate.costs(program(text=text), Slice("v5e:2x2"), 4 * 1e9)
    seconds = plan["seconds"]["communication_meanwhile"]
    assert seconds == pytest.approx(0.75 * 8192 / 90e9)
    without = estimate.costs(program(), Slice("v5e:2x2"), 4 * 1e9)
    assert plan["steps_per_second"] == without["steps_per_second"]


@pytest.mark.parametrize(
    ("limit", "step", "runs"),
    [("7", "1", 7), ("8", "2", 4), ("7", "2", 4), (None, "1", 3)],
)
def test_runs_of_a_loop_are_its_counters(limit, step, runs):
    """An argument as limit, as `generate` has, leaves them open."""
    limit = f"constant({limit})" if limit else "get-tuple-element(%p), index=0"
    condition = f"""
%cond (p: (s32[], bf16[8,8])) -> pred[] {{
  %limit.1 = s32[]{{:T(128)}} {limit}
  %p = (s32[], bf16[8,8]) parameter(0)
  %counter.1 = s32[]{{:T(128)}} get-tuple-element(%p), index=0
  ROOT %less.1 = pred[]{{:T(512)}} compare(%counter.1, %limit.1), direction=LT
}}

%body.2 """
    body = f"""
  %step.1 = s32[]{{:T(128)}} constant({step})
  %old.1 = s32[]{{:T(128)}} get-tuple-element(%param.1), index=0
  %new.1 = s32[]{{:T(128)}} add(%old.1, %step.1)
  ROOT %tuple.9 = (s32[], bf16[8,8]{{1,0}}) tuple(%new.1, /*index=1*/%fusion.9)
}}

ENTRY"""
    text = PROGRAM.replace("\n%body.2 ", condition)
    text = text.replace("}\n\nENTRY", body)
    ran = operations.read(text, loop_runs=3)
    assert sum(operation.cycles for operation in ran) == 8000 + 100 * runs


def test_a_known_number_of_runs_counts():
    text = PROGRAM.replace(
        "body=%body.2",
        'body=%body.2, backend_config={"known_trip_count":{"n":"7"}}',
    )
    ran = operations.read(text, loop_runs=3)
    assert sum(operation.cycles for operation in ran) == 8700


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("mesh['x'=16,'y'=4] {'y'}", 4),
        ("mesh['x'=16,'y'=4] {'x','y'}", 64),
        ("[2,32]<=[64]", 32),
        ("{{0,1,2},{3,4,5}}", 3),
    ],
)
def test_size_of_a_group(groups, size):
    text = PROGRAM.replace("mesh['axis_0'=4] {'axis_0'}", groups)
    sent = operations.sent_bytes(operations.read(text))
    payload = 4 + 4 * 11 * 64 + 2 * 128
    assert sent["all-reduce"] == pytest.approx(2 * (size - 1) / size * payload)


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="has no ENTRY"):
        operations.read("HloModule nothing")


def test_slices():
    chips = Slice("v5e:8x8")
    assert (chips.num_chips, chips.axes) == (64, (8, 8))
    # The peak of 4 units of 128 x 128 multiply-adds.
    assert chips.chip.peak_flops == pytest.approx(
        4 * 128**2 * 2 * chips.chip.clock, rel=0.01
    )
    # Lines are used one way, rings both.
    assert chips.collective_bandwidth == 2 * 45e9
    assert Slice("v5e:16x16").collective_bandwidth == 4 * 45e9
    assert Slice("v5e:1x8").collective_bandwidth == 45e9
    assert Slice("v5p:4x4x8").collective_bandwidth == 6 * 90e9


@pytest.mark.parametrize(
    "topology",
    [
        *["v5e", "v3:2x2", "v5e:8", "v5e:8x8x", "v5e:0x8", "v5e:8x-8", ""],
        *["v5e:99999999x9", "v5e:8x8\n", 8, None, True, b"v5e:8x8"],
    ],
)
def test_what_is_no_slice_is_refused(topology):
    with pytest.raises(ValueError, match="`topology` must be a chip"):
        Slice(topology)


@pytest.mark.parametrize("topology", ["v5e:16x17", "v5p:9999x9999x9999"])
def test_a_slice_larger_than_there_are_is_refused(topology):
    with pytest.raises(ValueError, match=r"`topology` must be .* at most \d+"):
        Slice(topology)


def program(**kwargs):
    gib = 2**30
    numbers = dict(
        flops=2e12,
        bytes_accessed=3e9,
        argument_bytes=6 * gib,
        temporary_bytes=4 * gib,
        output_bytes=6 * gib,
        alias_bytes=5 * gib,
        code_bytes=0,
    )
    return compiler.Program(**{"text": PROGRAM, **numbers, **kwargs})


def test_costs():
    costs = estimate.costs(program(), Slice("v5e:2x2"), 4 * 1e9, loop_runs=3)
    assert costs["cycles"] == 8300
    computation = 8300 / 1.5e9
    communication = (1.5 * 3076 + 0.75 * 8192) / 90e9
    assert costs["seconds"]["computation"] == pytest.approx(computation)
    assert costs["seconds"]["communication"] == pytest.approx(communication)
    seconds = computation + communication
    assert costs["steps_per_second"] == pytest.approx(1 / seconds)
    assert costs["model_flops_utilisation"] == pytest.approx(
        1e9 / 197e12 / seconds
    )
    # What takes an argument's place is not counted twice.
    assert costs["memory_gib_per_chip"] == 6 + 4 + 6 - 5
    assert costs["fits"]
    large = program(temporary_bytes=10 * 2**30)
    assert not estimate.costs(large, Slice("v5e:2x2"), 1e9)["fits"]


def settings(**kwargs):
    return {
        "memory_capacity_gib": 16.0,
        "num_chips": 64,
        "memory_gib": {"arguments": 6.0},
        "memory_gib_per_chip": 26.0,
        "remat": False,
        "shard_weights": False,
        "batch_size": 2048,
        "method": "training",
        **kwargs,
    }


def test_advice():
    remat, shard, batch, accumulate = estimate.advice(settings())
    assert remat.startswith("--remat")
    assert "20.0 GiB" in remat
    assert shard.startswith("--shard-weights")
    assert "0.09 GiB" in shard
    # 32 images per chip take 20 GiB, and there is room for 10.
    assert batch.startswith("--batch-size 1024:")
    assert accumulate.startswith(
        "--batch-size 1024 --gradient-accumulation-steps 2:"
    )


def test_advice_leaves_out_what_does_not_help():
    (shard,) = estimate.advice(
        settings(memory_gib={"arguments": 20.0}, remat=True)
    )
    assert shard.startswith("--shard-weights")
    ways = estimate.advice(
        settings(remat=True, shard_weights=True, memory_gib={"arguments": 0.5})
    )
    assert [way.split(" ")[0] for way in ways] == ["--batch-size"] * 2
    (batch,) = estimate.advice(
        settings(method="generate", memory_gib={"arguments": 1.5})
    )
    assert batch.startswith("--batch-size 1152:")


@on_jax
def test_a_model_without_values_takes_no_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = step_of("imagenet64_large", "distillation", 256, **SETTINGS)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 1e6  # kB: a third of the weights of one network in bfloat16
    network = preset_files.count("imagenet64_large")["parameters"]
    assert network > 1.2e9
    sizes = [
        sum(int(np.prod(variable.shape)) for variable in part)
        for part in step.variables
    ]
    trainable, others, optimizer, _ = sizes
    assert trainable == network
    # The moving average and the teacher; Adam's two, its count and rate.
    assert others == pytest.approx(2 * network, rel=1e-6)
    assert optimizer == 2 * network + 2


@on_jax
@pytest.mark.parametrize(
    ("preset", "topology"),
    [
        ("imagenet64_small", "v5e:8x8"),
        ("text_to_image_512", "v5e:8x8"),
        # More chips than the first stage has channels.
        ("text_to_image_512", "v5e:16x16"),
    ],
)
@pytest.mark.parametrize("method", ["training", "distillation", "generate"])
def test_layouts_of_sharded_weights(preset, topology, method):
    """Nearly everything is shared out, the optimizer's state as its weights."""
    chips = Slice(topology)
    step = step_of(preset, method, chips.num_chips, **SETTINGS)
    axes_of = step.sharded_axes(chips)
    variables = keras.tree.flatten(step.variables)
    whole = 0
    for variable in variables:
        axes = axes_of(variable)
        size = int(np.prod(variable.shape))
        for axis, length in zip(axes, variable.shape):
            assert axis is None or length % chips.num_chips == 0, variable.path
        whole += 0 if "batch" in axes else size
    total = sum(int(np.prod(variable.shape)) for variable in variables)
    assert whole < 0.01 * total


@on_jax
@pytest.mark.parametrize("method", ["training", "distillation", "generate"])
def test_flops_of_a_traced_step(method):
    """Of the network's passes, and of what Adam and the average add."""
    import jax

    step = step_of("grey28", method, 64, **SETTINGS)

    def shape(x):
        return jax.ShapeDtypeStruct(tuple(x.shape), x.dtype)

    lowered = jax.jit(step.function).lower(
        keras.tree.map_structure(shape, step.variables),
        keras.tree.map_structure(shape, step.batch),
        *map(shape, step.constants),
    )
    # Before it is optimised; of a loop it counts one run.
    passes = 1 if method == "generate" else step.passes
    expected = passes * step.model.network.flops() * 64
    assert lowered.cost_analysis()["flops"] == pytest.approx(expected, rel=0.1)


@on_jax
@pytest.mark.parametrize("method", ["training", "generate"])
def test_command(method, monkeypatch, capsys):
    given = {}

    def compile_step(function, variables, batch, constants, chips, **kwargs):
        given.update(chips=chips, batch=batch, **kwargs)
        return program()

    monkeypatch.setattr(compiler, "check", lambda: None)
    monkeypatch.setattr(compiler, "compile_step", compile_step)
    monkeypatch.setattr(
        estimate.metadata, "version", lambda name: f"{name}'s version"
    )
    arguments = ["--preset", "digits", "--topology", "v5e:2x2"]
    arguments += ["--batch-size", "64", "--method", method]
    command.main([*arguments, "--json"])
    made = json.loads(capsys.readouterr().out)
    assert made["steps_per_second"] > 0
    assert made["memory_gib_per_chip"] == 11
    assert made["fits"]
    assert "not a measurement" in made["note"]
    assert made["parameters"] == preset_files.count("digits")["parameters"]
    assert given["batch"][0].shape == (64, 8, 8, 1)
    assert given["donate"] == (method == "training")
    command.main(arguments)
    table = capsys.readouterr().out
    assert "not a measurement" in table
    assert f"{made['steps_per_second']:.2f}" in table
    assert "gradient: u_vi_t/up_1_*/mlp_hidden/dot_general" in table


@on_jax
def test_what_does_not_fit_says_what_would(monkeypatch, capsys):
    def compile_step(*args, **kwargs):
        raise compiler.DoesNotFit(30 * 2**30, "Ran out of memory")

    monkeypatch.setattr(compiler, "check", lambda: None)
    monkeypatch.setattr(compiler, "compile_step", compile_step)
    monkeypatch.setattr(estimate.metadata, "version", lambda name: "1")
    command.main(
        ["--preset", "digits", "--topology", "v5e:2x2", "--batch-size", "64"]
    )
    table = capsys.readouterr().out
    assert "30.02 of 16 GiB **does not fit**" in table
    assert "To make it fit: --remat" in table


def test_the_compiler_s_memory_error_is_read():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (20.50G) exceeds available HBM (15.75G)."
    )
    with (
        pytest.raises(compiler.DoesNotFit) as caught,
        compiler._memory_errors(),
    ):
        raise RuntimeError(message)
    assert caught.value.needed_bytes == 20.5 * 2**30
    with (
        pytest.raises(RuntimeError, match="else"),
        compiler._memory_errors(),
    ):
        raise RuntimeError("something else")


@pytest.mark.skipif(backend.NAME == "jax", reason="here plans are made")
def test_other_backends_are_refused():
    with pytest.raises(ValueError, match="set KERAS_BACKEND=jax"):
        plan.make_plan("digits", "v5e:2x2", batch_size=64)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"topology": "v5e"}, "`topology` must be"),
        ({"topology": 4}, "`topology` must be"),
        ({"method": ["training"]}, "`method` must be one of"),
        ({"batch_size": True}, "`batch_size` must be an integer"),
        ({"batch_size": 64.0}, "`batch_size` must be an integer"),
        ({"batch_size": "64"}, "`batch_size` must be an integer"),
        ({"batch_size": 2**62}, "`batch_size` must be .* at most"),
        ({"student_steps": None}, "`student_steps` must be an integer"),
        ({"student_steps": 10**9}, "`student_steps` must be .* at most"),
        ({"dtype": "float12"}, "`dtype` must be one of"),
        ({"dtype": "int8"}, "`dtype` must be one of"),
        ({"dtype": None}, "`dtype` must be one of"),
        ({"remat": "no"}, "`remat` must be True or False"),
        ({"remat": 1}, "`remat` must be True or False"),
        ({"shard_weights": "no"}, "`shard_weights` must be True or False"),
        (
            {"gradient_accumulation_steps": 1},
            "`gradient_accumulation_steps` must be an integer of at least 2",
        ),
        (
            {"gradient_accumulation_steps": True},
            "`gradient_accumulation_steps` must be an integer",
        ),
        (
            {"gradient_accumulation_steps": 2, "method": "generate"},
            "`gradient_accumulation_steps` must be not given",
        ),
        (
            {"remat": True, "method": "generate"},
            "`remat` must be not given for 'generate'",
        ),
        ({"preset": 3}, "`preset` must be"),
        ({"preset": ""}, "`preset` must be"),
        ({"preset": "a" * 5000}, "`preset` must be"),
        ({"method": "guessing"}, "`method` must be one of"),
        ({"batch_size": 0}, "`batch_size` must be"),
        ({"batch_size": 6}, "`batch_size` must be a multiple of the 4 chips"),
        ({"student_steps": 0}, "`student_steps` must be"),
        ({"preset": "nothing"}, "`preset` must be"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_asked_of_the_machine(
    kwargs, message
):
    arguments = {"preset": "digits", "topology": "v5e:2x2", "batch_size": 64}
    with pytest.raises(ValueError, match=message):
        plan.make_plan(**{**arguments, **kwargs})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--topology=v5e:0x8", "`topology` must be"),
        ("--batch-size=63", "`batch_size` must be a multiple of"),
        ("--batch-size=many", "--batch-size: invalid int value"),
        ("--student-steps=0", "`student_steps` must be"),
        ("--gradient-accumulation-steps=1", "`gradient_accumulation_steps`"),
        ("--preset=nothing", "`preset` must be"),
        ("--dtype=float12", "--dtype: invalid choice"),
        ("--method=guessing", "--method: invalid choice"),
    ],
)
def test_the_command_says_which_argument_is_bad(option, message, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(["--preset=digits", "--topology=v5e:2x2", option])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert message in err


@on_jax
@pytest.mark.slow
def test_the_tpu_compiler():
    """Where it is installed: pip install 'keras-mscm[tpu]', 0.7 GB."""
    pytest.importorskip("libtpu")
    made = plan.make_plan("digits", "v5e:2x2", batch_size=64)
    count = made["parameters"]
    # Weights, average, Adam's two: 16 bytes; small ones are padded.
    assert made["memory_gib"]["arguments"] * 2**30 == pytest.approx(
        16 * count, rel=0.05
    )
    assert made["memory_gib"]["aliased"] == pytest.approx(
        made["memory_gib"]["output"], rel=0.01
    )
    assert made["flops_per_chip"] == pytest.approx(
        made["model_flops_per_chip"], rel=0.15
    )
    # Gradients of all weights, in two bytes or four.
    sent = made["sent_bytes_per_chip"]["all-reduce"]
    assert 1.5 * 2 * count < sent < 1.5 * 4 * 1.1 * count
    assert made["fits"]
    assert 0 < made["steps_per_second"] < 1e5
