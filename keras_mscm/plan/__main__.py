"""Plans for TPUs: `python -m keras_mscm.plan --preset imagenet64_small`."""

import argparse
import json
import os
import sys
from collections.abc import Sequence

from keras_mscm.plan import make_plan, markdown
from keras_mscm.plan.chips import CHIPS
from keras_mscm.plan.estimate import DTYPES
from keras_mscm.plan.foreign import FOREIGN
from keras_mscm.plan.steps import METHODS


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a plan as a table, or as JSON.

    Args:
        arguments: Those of the command line by default.
    """
    parser = argparse.ArgumentParser(
        prog="python -m keras_mscm.plan",
        description="Compiles a step for a TPU slice that isn't there, and "
        "prints what the compiler says of its memory and its time. A large "
        "network takes minutes.",
    )
    parser.add_argument(
        "--preset",
        required=True,
        help="name or directory, or a foreign network of these: "
        f"{', '.join(FOREIGN)}",
    )
    parser.add_argument(
        "--topology",
        default="v5e:8x8",
        help=f"a chip, of {', '.join(CHIPS)}, and how many along each axis",
    )
    parser.add_argument(
        "--batch-size", type=int, default=2048, help="images, over all chips"
    )
    parser.add_argument("--method", choices=METHODS, default="training")
    parser.add_argument(
        "--student-steps", type=int, default=8, help="for generate"
    )
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    parser.add_argument(
        "--remat", action="store_true", help="compute blocks twice"
    )
    parser.add_argument(
        "--shard-weights", action="store_true", help="over the chips"
    )
    parser.add_argument(
        "--gradient-accumulation-steps",
        type=int,
        help="batches to an update",
    )
    parser.add_argument(
        "--lora-rank", type=int, help="train adapters of this rank alone"
    )
    parser.add_argument(
        "--guidance-scale", type=float, help="of the teacher in distillation"
    )
    parser.add_argument(
        "--memory-gb",
        type=float,
        help="memory of a device, in 10^9 bytes; the chip's by default",
    )
    parser.add_argument(
        "--no-compile",
        dest="compiled",
        action="store_false",
        help="count state and gradients, in seconds",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="compile in less time: for the memory alone",
    )
    parser.add_argument("--json", action="store_true", help="all as JSON")
    options = vars(parser.parse_args(arguments))
    as_json = options.pop("json")
    try:
        plan = make_plan(**options)
    except (ValueError, ImportError) as error:
        parser.exit(2, f"{error}\n")
    print(json.dumps(plan, indent=2) if as_json else markdown(plan))


if __name__ == "__main__":
    if "KERAS_BACKEND" not in os.environ:
        # Keras has one backend to a process, and has chosen by now.
        os.environ["KERAS_BACKEND"] = "jax"
        command = [sys.executable, "-m", "keras_mscm.plan", *sys.argv[1:]]
        os.execv(sys.executable, command)
    main()
