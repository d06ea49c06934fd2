"""Tables in Markdown."""


def markdown(head, lines):
    """The lines of a table, and an empty one."""
    rows = [head, ["---"] * len(head), *lines]
    return ["| " + " | ".join(map(str, row)) + " |" for row in rows] + [""]
