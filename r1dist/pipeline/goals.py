"""Whether the stages did what they are there for: a recipe's goals against what was measured."""

import functools

from ..config.pipeline import Goal
from .table import percent

INTERVALS = {"accuracy": "ci95"}  # all others: the score's own name and _ci95
SHARES = ("accuracy", "cons_at_n", "format", "finished", "language", "answered", "declined", "as_reference")


def judge(goal: Goal, stages: dict[str, dict]) -> dict | None:
    """`stage`, `text` (a sentence with both numbers) and `met`; None while a stage of it is not measured.

    `stages`: the entries of `summary.json` by their names. "Apart" is meant of 95 % intervals that do not overlap.
    """
    other = goal.above or goal.below or goal.not_below
    measured = [_measured(stages.get(name), goal.score) for name in (goal.stage, other) if name is not None]
    if None in measured:
        return None
    value, (low, high) = measured[0]
    what = goal.score.removeprefix("eval.").replace(".", " ").replace("_", " ")
    here = f"{goal.stage}: {what} {_shown(goal, measured[0])}"
    if other is None:
        text, met = f"{here}, at least {_number(goal, goal.at_least)}", value >= goal.at_least
    else:
        there, (other_low, other_high) = measured[1]
        if goal.above:
            word, met = "above", low > other_high and value >= there + goal.by
            word = f"{_number(goal, goal.by)} above" if goal.by else word
        elif goal.below:
            word, met = "below", high < other_low
        else:
            word, met = "not below", value >= min(there - goal.within, other_low)
        text = f"{here}, {word} {other}'s {_shown(goal, measured[1])}"
    return {"stage": goal.stage, "text": text, "met": met} | ({"note": goal.note} if goal.note else {})


def _measured(stage: dict | None, score: str) -> tuple[float, tuple[float, float]] | None:
    """The score and its interval, which is a point where none was measured."""
    *path, name = score.split(".")
    scores = functools.reduce(lambda section, part: section.get(part) or {}, path, stage or {})
    if scores.get(name) is None:
        return None
    low, high = scores.get(INTERVALS.get(name, f"{name}_ci95")) or (scores[name], scores[name])
    return scores[name], (low, high)


def _shown(goal: Goal, measured: tuple[float, tuple[float, float]]) -> str:
    value, (low, high) = measured
    interval = "" if low == high else f" [{_number(goal, low)}, {_number(goal, high)}]"
    return _number(goal, value) + interval


def _number(goal: Goal, value: float) -> str:
    return percent(value) if goal.score.rpartition(".")[2] in SHARES else f"{value:.3g}"
