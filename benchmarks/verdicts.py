"""The paper's claims, each confirmed or not by an experiment's numbers."""

from itertools import pairwise

import numpy as np

CD_TARGETS = {4: 1.13, 8: 1.07, 16: 1.0}  # the paper's own ratios


def verdicts(results):
    """Triples of a claim, what was measured, and the reading.

    A claim about several numbers is confirmed if it holds for all of them, and
    contradicted if for none.
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


def _mean(values):
    return float(np.mean(values))


def _near_the_teacher(results):
    for k, target in CD_TARGETS.items():
        ratios = results.ratio(results.student(k))
        if ratios:
            ratio = _mean(ratios)
            yield (
                f"CD at K = {k} within {target} of the teacher's best",
                f"{ratio:.3f}",
                "confirmed" if ratio <= target else "not confirmed",
            )


def _better_with_more_steps(results, method, name):
    known = [
        (k, _mean(values))
        for k in (1, 2, 4, 8, 16)
        if (values := results.student(k, method))
    ]
    if len(known) < 2:
        return []
    held = [b <= a for (_, a), (_, b) in pairwise(known)]
    said = ", ".join(f"{k}: {value:.4f}" for k, value in known)
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
            steps, value = row["teacher_steps"], [row["frechet_distance"]]
            if row["student_steps"] != k or "iterations" in row:
                continue
            if isinstance(steps, list):
                annealed["{} to {}".format(*steps)] = value
            else:
                constant[steps] = value
        constant = {n: _mean(v) for n, v in sorted(constant.items()) if v}
        for steps, values in annealed.items():
            if not values or not constant:
                continue
            said = f"{_mean(values):.4f}; " + ", ".join(
                f"{n}: {value:.4f}" for n, value in constant.items()
            )
            held = [_mean(values) <= value for value in constant.values()]
            claim = f"K = {k}: teacher steps from {steps} better than constant"
            claims.append((claim, said, _verdict(held)))
    return claims


def _addim(results):
    claims = []
    for k in (1, 2, 4, 8):
        ddim = results.student(k, integrator="ddim")
        addim = results.student(k)
        if ddim and addim:
            ours, theirs = _mean(addim), _mean(ddim)
            better = "aDDIM" if k >= 4 else "DDIM"
            claims.append(
                (
                    f"K = {k}: {better} the better teacher",
                    f"aDDIM {ours:.4f}, DDIM {theirs:.4f}",
                    _verdict([(ours <= theirs) == (k >= 4)]),
                )
            )
    return claims


def _progressive(results):
    claims = []
    for k in (1, 2, 4):
        pd, cd = results.student(k, "progressive"), results.student(k)
        if pd and cd:
            claims.append(
                (
                    f"K = {k}: CD better than progressive distillation",
                    f"CD {_mean(cd):.4f}, PD {_mean(pd):.4f}",
                    _verdict([_mean(cd) <= _mean(pd)]),
                )
            )
    return claims
