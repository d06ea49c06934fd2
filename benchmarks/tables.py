"""Tables in Markdown."""

import statistics

METHODS = {
    "training": "CT",
    "distillation": "CD",
    "progressive": "PD",
}


def markdown(head, lines):
    """The lines of a table, and an empty one."""
    rows = [head, ["---"] * len(head), *lines]
    return ["| " + " | ".join(map(str, row)) + " |" for row in rows] + [""]


def circumstances(row):
    """When, on what and by which versions a row was measured, in words."""
    cores = f"{row['cores']} core{'s'[: row['cores'] != 1]}"
    versions = (f"{k} {v}" for k, v in row["versions"].items())
    return ", ".join([row["date"], row["processor"], cores, *versions])


def shared(*measured):
    """Each with those seeds only that all have which have any."""
    known = [set(values) for values in measured if values]
    seeds = set.intersection(*known) if known else set()
    return [
        {seed: values[seed] for seed in values if seed in seeds}
        for values in measured
    ]


def cell(values, digits=3):
    """Mean of what each seed has; of several also the least and the most."""
    if not values:
        return ""
    numbers = values.values()
    mean = f"{statistics.mean(numbers):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(numbers):.{digits}f} to {max(numbers):.{digits}f})"
