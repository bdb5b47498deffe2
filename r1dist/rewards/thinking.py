"""Which part of a completion is thinking, and which part is what it says after it."""

OPEN, CLOSE = "<think>", "</think>"


def thinking_of(completion: str) -> str:
    """What is thought, without the outermost tags; empty if nothing is.

    From the first `<think>`, or from the beginning if `</think>` comes before one, to the last `</think>`. A `<think>`
    after that is never closed: it thinks to the end, as in a completion that was cut off.
    """
    closed, tag, rest = completion.rpartition(CLOSE)
    unfinished = rest.partition(OPEN)[2]
    if not tag:
        return unfinished
    before, opened, _ = closed.partition(OPEN)
    finished = closed if not opened or CLOSE in before else closed[len(before) + len(OPEN) :]
    return f"{finished}\n{unfinished}" if unfinished else finished


def after_thinking(completion: str) -> str:
    """What follows the last `</think>`, up to a `<think>` that is never closed."""
    return completion.rpartition(CLOSE)[2].partition(OPEN)[0]
