"""The paper's claims, each confirmed or not by an experiment's numbers."""

import statistics
from itertools import pairwise

from benchmarks.tables import cell, shared

CD_TARGETS = {4: 1.13, 8: 1.07, 16: 1.0}  # the paper's own ratios


def verdicts(results):
    """Triples of a claim, what was measured, and the reading.

    A claim about several numbers, or one number of several seeds, is confirmed
    if it holds for all of them, and contradicted if for none.
    """
    claims = [*_near_the_teacher(results)]
    for method, name in (("distillation", "CD"), ("training", "CT")):
        claims += _better_with_more_steps(results, method, name)
    claims += _annealing(results) + _addim(results) + _progressive(results)
    return claims


def _verdict(held):
    if all(held):
        return "confirmed"
    return "not confirmed" if any(held) else "contradicted"


def _no_worse(ours, theirs):
    """For each seed that has both, whether ours is no further away."""
    return [ours[seed] <= theirs[seed] for seed in ours if seed in theirs]


def _near_the_teacher(results):
    """Of the mean over seeds, as a target is about the method."""
    for k, target in CD_TARGETS.items():
        ratios = results.ratio(results.student(k))
        if ratios:
            near = statistics.mean(ratios.values()) <= target
            yield (
                f"CD at K = {k} within {target} of the teacher's best",
                cell(ratios),
                "confirmed" if near else "not confirmed",
            )


def _better_with_more_steps(results, method, name):
    known = {
        k: values
        for k in (1, 2, 4, 8, 16)
        if (values := results.student(k, method))
    }
    if len(known) < 2:
        return []
    held = [
        better
        for fewer, more in pairwise(known.values())
        for better in _no_worse(more, fewer)
    ]
    said = ", ".join(f"{k}: {cell(values, 4)}" for k, values in known.items())
    return [(f"{name}: each K better than the K below", said, _verdict(held))]


def _annealing(results):
    claims = []
    for k in (1, 2, 4, 8):
        start, end = results.settings["anneal"]
        annealed = {f"{start} to {end}": results.student(k)}
        constant = {
            n: results.student(k, steps=n)
            for n in results.settings["constant_teacher_steps"]
        }
        for row in results.further():
            steps, value = row["teacher_steps"], row["frechet_distance"]
            if row["student_steps"] != k or "iterations" in row:
                continue
            if isinstance(steps, list):
                key, kind = "{} to {}".format(*steps), annealed
            else:
                key, kind = steps, constant
            kind.setdefault(key, {})[row["seed"]] = value
        for steps, values in annealed.items():
            over = {
                n: {s: others[s] / values[s] for s in values if s in others}
                for n, others in sorted(constant.items())
            }
            over = {n: ratios for n, ratios in over.items() if ratios}
            if not over:
                continue
            held = [
                ratio >= 1
                for ratios in over.values()
                for ratio in ratios.values()
            ]
            said = f"{cell(values, 4)}; times that, constant " + ", ".join(
                f"{n}: {cell(ratios)}" for n, ratios in over.items()
            )
            claim = f"K = {k}: teacher steps from {steps} better than constant"
            claims.append((claim, said, _verdict(held)))
    return claims


def _addim(results):
    claims = []
    for k in (1, 2, 4, 8):
        ddim, addim = shared(
            results.student(k, integrator="ddim"), results.student(k)
        )
        held = _no_worse(addim, ddim)
        if held:
            better = "aDDIM" if k >= 4 else "DDIM"
            claims.append(
                (
                    f"K = {k}: {better} the better teacher",
                    f"aDDIM {cell(addim, 4)}, DDIM {cell(ddim, 4)}",
                    _verdict([one == (k >= 4) for one in held]),
                )
            )
    return claims


def _progressive(results):
    claims = []
    for k in (1, 2, 4):
        pd, cd = shared(results.student(k, "progressive"), results.student(k))
        held = _no_worse(cd, pd)
        if held:
            claims.append(
                (
                    f"K = {k}: CD better than progressive distillation",
                    f"CD {cell(cd, 4)}, PD {cell(pd, 4)}",
                    _verdict(held),
                )
            )
    return claims
