"""Measures speed: `python -m benchmarks.speed`, or `--check` for the guard.

Each part runs in a process of its own, on each backend that it is about; what
it prints goes to benchmarks/speed/results.jsonl, and from there into table.md
and growth.png. With `--check` only ratios are measured, quickly, and the exit
status is 1 if one is more than 10 % over its bound in table.md.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from benchmarks.speed import report

FOLDER = Path(__file__).parent
EVERY = ("jax", "tensorflow", "torch")
PARTS = {
    "startup": EVERY,
    "overhead": EVERY,
    "profile": ("jax",),
    "evaluations": ("jax",),
    "machine": EVERY,
    "peers": ("torch", "tensorflow"),
    "growth": ("jax",),
}
GUARDED = {
    "startup": ("jax",),
    "overhead": EVERY,
    "evaluations": ("jax",),
}
PACKAGES = ("keras", "jax", "tensorflow-cpu", "torch", "diffusers")
PACKAGES += ("denoising-diffusion-pytorch", "keras-hub")
SLACK = 1.1


def run(part, backend, quick=False):
    """The rows that one part prints."""
    print(f"{part} on {backend}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.speed.{part}"]
        + ["--quick"] * quick,
        env={
            **os.environ,
            "KERAS_BACKEND": backend,
            "TF_CPP_MIN_LOG_LEVEL": "3",
        },
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    print(done.stdout, end="", flush=True)
    lines = done.stdout.splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def circumstances():
    """What a number depends on."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    processor = dict(
        line.split("\t: ")
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith(("model name", "cpu family"))
    )
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "hardware": f"{os.cpu_count()} cores, "
        f"{processor['model name']}, family {processor['cpu family']}",
        "python": platform.python_version(),
        "versions": versions,
    }


def check():
    """Runs what is guarded; False if a ratio is 10 % over its bound."""
    rows = [
        row
        for part, backends in GUARDED.items()
        for backend in backends
        for row in run(part, backend, quick=True)
    ]
    ratios = [row for row in rows if "bound" in row and "ratio" in row]
    over = [row for row in ratios if row["ratio"] > SLACK * row["bound"]]
    for row in over:
        print(
            f"over its bound: {row['part']}, {row['backend']}, {row['what']}: "
            f"{row['ratio']} > {SLACK} x {row['bound']}"
        )
    print(f"{len(ratios) - len(over)} of {len(ratios)} ratios within bounds")
    return not over


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="the guard")
    parser.add_argument("--parts", nargs="*", default=[*PARTS], choices=PARTS)
    parser.add_argument(
        "--report", action="store_true", help="from the results there are"
    )
    args = parser.parse_args()
    if args.check:
        sys.exit(not check())
    if not args.report:
        for part in args.parts:
            rows = [
                row for backend in PARTS[part] for row in run(part, backend)
            ]
            replace(part, rows)
    report.write(FOLDER)


def replace(part, rows):
    """Puts a part's rows in the place of those that were there."""
    results, told = FOLDER / "results.jsonl", circumstances()
    lines = results.read_text().splitlines() if results.is_file() else []
    kept = [line for line in lines if json.loads(line)["file"] != part]
    new = [json.dumps({"file": part, **row, **told}) for row in rows]
    results.write_text("\n".join([*kept, *new]) + "\n")


if __name__ == "__main__":
    main()
