"""Plans of the paper's networks, on slices of TPUs that aren't there.

Command:   python -m benchmarks.plans [--only imagenet64_small ...]
Needs:     pip install 'keras-mscm[jax,tpu]', 5 minutes to an hour and 2 to 16
           GiB of memory a plan
Writes:    benchmarks/plans/: each plan as a table and as JSON, and README.md,
           which sets them beside the paper's measured rates (appendix A.2)

A plan that is there is not made again; delete its files for that.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

from benchmarks import tables
from keras_mscm.plan import markdown
from keras_mscm.plan.steps import METHODS

FOLDER = Path(__file__).parent / "plans"
BATCH_SIZE = 2048
# Training steps per second in the paper: consistency training, distillation.
PAPER = {
    "imagenet64_small": ("v5e:8x8", 2.7, 2.5),
    "imagenet128_small": ("v5e:8x8", 2.2, 1.7),
    "imagenet64_large": ("v5e:16x16", 2.9, 2.5),
    "imagenet128_large": ("v5e:16x16", 2.2, 1.8),
    "text_to_image_512": ("v5e:16x16", None, 0.71),
}
# Here each chip has room for all weights in training. Elsewhere they are
# divided among the chips: they don't fit, or leave too little for the rest.
WHOLE = ("imagenet64_small",)
# Here they are in sampling too; in training blocks are computed twice, as there
# is much to keep of 512x512 pixels.
LARGEST = "text_to_image_512"
# Made before feature maps were laid out as convolutions want them (8e1f31e),
# by which the small networks' steps take a sixth to a quarter less.
OLDER = {
    "imagenet64_large": ("training", "distillation"),
    "imagenet128_large": ("training", "distillation"),
}
COLUMNS = (
    "network",
    "slice",
    "method",
    "steps/s",
    "paper",
    "GiB per chip, of 16",
    "FLOPs per chip",
    "utilisation",
    "roofline, steps/s",
    "plan",
)


def options(preset, method):
    """What the planner's command is given."""
    topology = PAPER[preset][0]
    chosen = {"preset": preset, "topology": topology, "method": method}
    chosen |= {"batch-size": BATCH_SIZE}
    words = [f"--{name}={value}" for name, value in chosen.items()]
    trained = method != "generate"
    if preset == LARGEST or (trained and preset not in WHOLE):
        words.append("--shard-weights")
    if preset == LARGEST and trained:
        words.append("--remat")
    return words


def make(preset, method):
    """In a process of its own, which gives the compiler's memory back."""
    file = FOLDER / f"{preset}_{method}.json"
    if file.is_file():
        return
    program = [sys.executable, "-m", "keras_mscm.plan"]
    words = options(preset, method)
    done = subprocess.run(
        [*program, *words, "--json"],
        env=os.environ | {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        print(f"no plan of {preset}, {method}: exit {done.returncode}")
        return
    command = f"python -m keras_mscm.plan {' '.join(words)}"
    table = markdown(json.loads(done.stdout))
    file.with_suffix(".md").write_text(f"```\n{command}\n```\n\n{table}\n")
    file.write_text(done.stdout)  # last, as it says that the plan is there


def row(preset, method, plan):
    topology, *rates = PAPER[preset]
    paper = dict(zip(("training", "distillation"), rates)).get(method)
    speed = plan["steps_per_second"]
    cells = [preset, topology, method]
    cells += [f"{speed:.2f}" if speed else "does not fit"]
    cells += [str(paper or ""), f"{plan['memory_gib_per_chip']:.1f}"]
    if speed:
        seconds = plan["seconds"]
        bounds = [v for k, v in seconds.items() if k.startswith("bound")]
        cells += [
            f"{plan['flops_per_chip'] / 1e12:.1f} T",
            f"{100 * plan['model_flops_utilisation']:.0f} %",
            f"{1 / max(bounds):.2f}",
        ]
    else:
        cells += [""] * 3
    return [*cells, f"[table]({preset}_{method}.md)"]


def overview():
    """All plans that there are, beside the paper's rates."""
    rows = []
    for preset in PAPER:
        for method in METHODS:
            file = FOLDER / f"{preset}_{method}.json"
            if file.is_file():
                plan = json.loads(file.read_text())
                rows.append(row(preset, method, plan))
    table = "\n".join(tables.markdown(COLUMNS, rows))
    older = ", ".join(f"{name} ({' and '.join(OLDER[name])})" for name in OLDER)
    head = __doc__.split("\n")[0]
    (FOLDER / "README.md").write_text(
        f"# {head}\n\n`python -m benchmarks.plans`, batch {BATCH_SIZE}, mixed "
        "bfloat16, Adam, moving average. The compiler's estimate, not a "
        "measurement, beside the rate that the paper measured; for `generate` "
        f"8 student steps are one step.\n\n{table}"
        + "\nMade before feature maps were laid out as convolutions want them, "
        f"from which they would gain: {older}.\n"
        * bool(OLDER)
        + f"\n{OF_OTHERS}\n"
    )


OF_OTHERS = (
    "Of another library's network: [Stable Diffusion 3 medium with LoRA]("
    "stable_diffusion_3_medium.md), on one device of 80 GB."
)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PAPER, default=list(PAPER))
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=METHODS
    )
    args = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    for method in args.methods:
        for preset in args.only:
            make(preset, method)
            overview()


if __name__ == "__main__":
    main()
