"""What a compiled step will cost, by the compiler's own estimate."""

import datetime
import math
import os
import time
from importlib import metadata
from typing import Any

from keras_mscm import checks, preset_files
from keras_mscm.plan import compiler, foreign, operations
from keras_mscm.plan.chips import Slice
from keras_mscm.plan.steps import (
    METHODS,
    gradient_bytes,
    pass_flops,
    state_parts,
    step_of,
)

NOTE = (
    "The compiler's estimate, not a measurement: no TPU was there. Cycles are "
    "summed as if no operation overlapped another; what is sent is divided by "
    "the bandwidth of the links, and added, but for what the compiler itself "
    "has sent while others compute."
)
COUNTED = (
    "Counted from shapes, not compiled: what is alive within the step comes on "
    "top, but for the gradients."
)
GIB = 2**30
DTYPES = (
    "mixed_bfloat16",
    "mixed_float16",
    "bfloat16",
    "float16",
    "float32",
)
# What 32 bits can count.
LARGE = 2**31 - 1


def make_plan(
    preset: str | os.PathLike,
    topology: str,
    *,
    batch_size: int,
    method: str = "training",
    student_steps: int = 8,
    dtype: str = "mixed_bfloat16",
    remat: bool = False,
    shard_weights: bool = False,
    gradient_accumulation_steps: int | None = None,
    lora_rank: int | None = None,
    guidance_scale: float | None = None,
    memory_gb: float | None = None,
    compiled: bool = True,
    quick: bool = False,
) -> dict[str, Any]:
    """Compiles a step for a TPU slice that isn't there, and says what it costs.

    The step is that of `MultistepConsistencyModel`, with Adam and the moving
    average of the weights; or its `generate`. No weight gets a value: a plan
    takes the memory of the compiler, a few GiB.

    Args:
        preset: Name or directory of the network's preset; or the name of a
            network of another library, `"stable_diffusion_3_medium"` of
            KerasHub, whose student begins with its weights, by
            `from_teacher(teacher, copy=False)`.
        topology: Slice, a chip and the chips along each axis: `"v5e:8x8"`.
        batch_size: Images per step, over all chips; a multiple of their
            number.
        method: `"training"` (CT), `"distillation"` (CD) or `"generate"`.
        student_steps: Evaluations of the network in `generate`.
        dtype: Policy of the network and the model: `"mixed_bfloat16"`,
            `"mixed_float16"`, `"bfloat16"`, `"float16"` or `"float32"`.
        remat: Whether blocks are computed again for the gradient, and not kept
            (`UViT`'s `remat`; of a foreign network `keras.RematScope`).
        shard_weights: Whether weights, averages and the optimizer's state are
            spread over the chips (`keras_mscm.distribution.fully_sharded`);
            by default each chip holds all of them.
        gradient_accumulation_steps: Batches of `batch_size` to an update of
            the weights, at least 2; or None.
        lora_rank: Rank of adapters that are trained in the weights' place, so
            that these are held once; None for none.
        guidance_scale: Scale of the teacher's guidance, in `"distillation"`.
        memory_gb: Memory of a device in 10^9 bytes, at most the chip's, if it
            is to be compared with another than that.
        compiled: Whether the step is compiled. If not, state and gradients are
            counted, in seconds and without libtpu.
        quick: Whether the compiler is to spend little time on the program's
            speed. Its memory stays nearly the same, and nothing is said of
            its time.

        Of `remat` and `gradient_accumulation_steps` there is nothing to plan
        in `"generate"`, which takes no gradient.

    Returns:
        What the command `python -m keras_mscm.plan --json` prints:
        `"steps_per_second"`, `"memory_gib_per_chip"`, `"fits"`, and the
        numbers that they come from. Of a step that the compiler could not fit
        into memory there is no more than the memory, and `"advice"`.

    Raises:
        ValueError: If an argument is out of its range, or Keras runs on another
            backend than JAX.
        ImportError: If libtpu is not installed.
    """
    if not foreign.is_foreign(preset):
        preset_files.find(preset)
    chips = Slice(topology)
    checks.check_choice("method", method, METHODS)
    checks.check_choice("dtype", dtype, DTYPES)
    batch_size = checks.check_positive_integer("batch_size", batch_size, LARGE)
    # As many as the model can count in float32.
    student_steps = checks.check_positive_integer(
        "student_steps", student_steps, 2**24
    )
    remat = checks.check_boolean("remat", remat)
    shard_weights = checks.check_boolean("shard_weights", shard_weights)
    if gradient_accumulation_steps is not None:
        gradient_accumulation_steps = checks.check_integer(
            "gradient_accumulation_steps", gradient_accumulation_steps, 2, LARGE
        )
    if method == "generate":
        without = "not given for 'generate', which takes no gradient"
        if remat:
            raise checks.invalid("remat", without, remat)
        if gradient_accumulation_steps is not None:
            raise checks.invalid(
                "gradient_accumulation_steps",
                without,
                gradient_accumulation_steps,
            )
    if batch_size % chips.num_chips:
        raise ValueError(
            f"`batch_size` must be a multiple of the {chips.num_chips} chips "
            f"of {topology}. Received: batch_size={batch_size}"
        )
    capacity = _check_more(
        chips, method, lora_rank, guidance_scale, memory_gb, compiled, quick
    )
    if compiled:
        compiler.check()
    else:
        compiler.check_backend()
    begin = time.perf_counter()
    step = step_of(
        preset,
        method,
        batch_size,
        student_steps=student_steps,
        dtype=dtype,
        remat=remat,
        gradient_accumulation_steps=gradient_accumulation_steps,
        lora_rank=lora_rank,
        guidance_scale=guidance_scale,
    )
    state = state_parts(step)
    plan = {
        "note": NOTE if compiled else COUNTED,
        "steps_per_second": None,
        "memory_gib_per_chip": None,
        "fits": False,
        "preset": os.fspath(preset),
        "topology": topology,
        "chip": chips.chip.name,
        "num_chips": chips.num_chips,
        "batch_size": batch_size,
        "method": method,
        "student_steps": student_steps,
        "dtype": dtype,
        "remat": remat,
        "shard_weights": shard_weights,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "lora_rank": lora_rank,
        "guidance_scale": guidance_scale,
        "quick": quick,
        "parameters": step.model.network.count_params(),
        "state_gib": {name: size / GIB for name, size in state.items()},
        "gradients_gib": gradient_bytes(step) / GIB,
        "memory_capacity_gib": capacity / GIB,
        "date": datetime.date.today().isoformat(),
        "versions": {
            name: metadata.version(name)
            for name in ("keras", "jax", "jaxlib", "libtpu")[: 3 + compiled]
        },
    }
    held = sum(state.values()) / (chips.num_chips if shard_weights else 1)
    if not compiled:
        memory = {"arguments": held / GIB, "gradients": plan["gradients_gib"]}
        needed = sum(memory.values())
        return plan | {
            "memory_gib_per_chip": needed,
            "memory_gib": memory,
            # Whether the rest fits too, nobody has asked the compiler.
            "fits": None if needed <= plan["memory_capacity_gib"] else False,
        }
    try:
        program = compiler.compile_step(
            step.function,
            step.variables,
            step.batch,
            step.constants,
            chips,
            donate=step.updates,
            axes_of=step.sharded_axes(chips) if shard_weights else None,
            quick=quick,
        )
    except compiler.DoesNotFit as error:
        plan |= {
            "memory_gib_per_chip": (held + error.needed_bytes) / GIB,
            "memory_gib": {
                "arguments": held / GIB,
                "temporaries": error.needed_bytes / GIB,
            },
            "compiler_says": str(error),
        }
        return plan | {"advice": advice(plan)}
    plan["compile_seconds"] = round(time.perf_counter() - begin, 1)
    model_flops = step.passes * pass_flops(step.model) * batch_size
    plan |= costs(program, chips, model_flops, student_steps)
    if quick:  # because its cycles mean nothing then
        plan["steps_per_second"] = None
        for name in ("cycles", "seconds", "model_flops_utilisation"):
            del plan[name]
        del plan["operations"]
    plan["fits"] = plan["memory_gib_per_chip"] <= plan["memory_capacity_gib"]
    return plan if plan["fits"] else plan | {"advice": advice(plan)}


def costs(
    program: compiler.Program,
    chips: Slice,
    model_flops: float,
    loop_runs: int = 1,
) -> dict[str, Any]:
    """Time, memory and traffic of a compiled step.

    Args:
        program: The step.
        chips: What it was compiled for.
        model_flops: FLOPs of the network's passes over the whole batch.
        loop_runs: How often a loop runs whose number is an argument.

    Returns:
        What a plan says of a step that was compiled.
    """
    chip = chips.chip
    ran = operations.read(program.text, loop_runs)
    cycles = sum(operation.cycles for operation in ran)
    sent = operations.sent_bytes(ran)
    meanwhile = operations.sent_bytes(ran, meanwhile=True)
    computation = cycles / chip.clock
    communication, hidden = (
        sum(kinds.values()) / chips.collective_bandwidth if kinds else 0.0
        for kinds in (sent, meanwhile)
    )
    seconds = computation + communication
    arithmetic = model_flops / chips.num_chips / chip.peak_flops
    memory = {
        "arguments": program.argument_bytes / GIB,
        "temporaries": program.temporary_bytes / GIB,
        "output": program.output_bytes / GIB,
        "aliased": program.alias_bytes / GIB,
        "code": program.code_bytes / GIB,
    }
    # Results that take an argument's place need none of their own.
    needed = sum(memory.values()) - 2 * memory["aliased"]
    return {
        "steps_per_second": 1 / seconds,
        "memory_gib_per_chip": needed,
        "fits": needed <= chip.memory_bytes / GIB,
        "memory_gib": memory,
        "flops_per_chip": program.flops,
        "model_flops_per_chip": model_flops / chips.num_chips,
        "bytes_accessed_per_chip": program.bytes_accessed,
        "cycles": cycles,
        "seconds": {
            "step": seconds,
            "computation": computation,
            "communication": communication,
            "communication_meanwhile": hidden,
            "bound_by_flops": arithmetic,
            "bound_by_memory_bandwidth": (
                program.argument_bytes + program.output_bytes
            )
            / chip.memory_bandwidth,
        },
        "model_flops_utilisation": arithmetic / seconds,
        "sent_bytes_per_chip": sent,
        "sent_meanwhile_bytes_per_chip": meanwhile,
        "operations": [
            {
                "operation": source,
                "count": count,
                "cycles": number,
                "share": number / cycles,
            }
            for source, count, number in operations.by_source(ran)[:15]
        ],
    }


def _check_more(
    chips: Slice,
    method: str,
    lora_rank: Any,
    guidance_scale: Any,
    memory_gb: Any,
    compiled: Any,
    quick: Any,
) -> float:
    """Raises unless these arguments are in their ranges; bytes of a device."""
    checks.check_boolean("compiled", compiled)
    checks.check_boolean("quick", quick)
    if lora_rank is not None:
        checks.check_positive_integer("lora_rank", lora_rank)
    if guidance_scale is not None:
        checks.check_number(
            "guidance_scale", guidance_scale, 0, "a number of at least 0"
        )
        if method != "distillation":
            raise checks.invalid(
                "guidance_scale",
                f"not given for {method!r}, which has no teacher",
                guidance_scale,
            )
    if memory_gb is None:
        return chips.chip.memory_bytes
    memory_gb = checks.check_positive_number("memory_gb", memory_gb)
    if memory_gb * 1e9 > chips.chip.memory_bytes:
        most = f"at most {chips.chip.memory_bytes / 1e9:.0f}, the chip's"
        raise checks.invalid("memory_gb", most, memory_gb)
    return memory_gb * 1e9


def advice(plan: dict[str, Any]) -> list[str]:
    """What would make a step fit into memory.

    Args:
        plan: A plan, with its settings and the memory that it needs.

    Returns:
        Sentences, the mildest change first.
    """
    capacity, chips = plan["memory_capacity_gib"], plan["num_chips"]
    state = plan["memory_gib"]["arguments"]
    rest = plan["memory_gib_per_chip"] - state
    ways = []
    if not plan["remat"] and plan["method"] != "generate":
        ways.append(
            "--remat: blocks are computed again for the gradient, and not "
            f"kept. What is alive within the step, {rest:.1f} GiB, shrinks to "
            "a small part, for up to a third more time."
        )
    if not plan["shard_weights"] and state > 0.2 * capacity:
        ways.append(
            f"--shard-weights: of {state:.1f} GiB of weights, averages and "
            f"optimizer each chip then holds {state / chips:.2f} GiB; weights "
            "are sent when they are needed."
        )
    room = capacity - state
    if room <= 0:
        return ways
    share = plan["batch_size"] // chips
    images = math.floor(share * room / rest) * chips
    if images:
        ways.append(
            f"--batch-size {images}: the largest that fits, if memory within "
            "the step grows with the batch."
        )
    parts = next(
        (n for n in range(2, share + 1) if share % n == 0 and rest / n <= room),
        None,
    )
    if parts and plan["method"] != "generate":
        ways.append(
            f"--batch-size {plan['batch_size'] // parts} "
            f"--gradient-accumulation-steps {parts}: the same update, from "
            f"{parts} smaller batches."
        )
    return ways
