"""The score that a task of reasoning-gym gives to an answer, by its own scorer, and whether that means right."""

import ast
import re
from functools import lru_cache
from typing import Any

from ..config.gym import create
from .math.accuracy import accuracy as equals_gold
from .math.accuracy import final_answer

CACHED = 256
NAMES = "sin|cos|tan|cot|sec|csc|asin|acos|atan|sinh|cosh|tanh|exp|log|ln|sqrt|pi"
FORMULA = re.compile(rf"(?:[\s\d.+\-*/^()]|(?<![A-Za-z.])(?:[A-Za-z]|{NAMES})(?![A-Za-z_]))*+")
WORDS = re.compile(r"[A-Z\d_\s-]*")
# Their scorers evaluate what a model wrote: as Python, as sympy's formula.
AS_PYTHON = {"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"}
AS_FORMULA = {"countdown", "intermediate_integration", "polynomial_multiplication", "simple_integration"}


def task(completion: str, row: dict) -> float | None:
    """What the scorer of the row's task gives to the final answer; None for a row of no task.

    Range [0, 1]: scorers pay something for an answer that is nearly right, or just readable (0.01), as they will. Only
    full marks mean right. Source: reasoning-gym (arXiv 2505.24760), `score_answer`.

    A scorer that raises for an answer gives it 0; one that raises without an answer, too, cannot score the row (None).
    An answer that its scorer cannot be asked (`_may_be_scored`) counts as empty.
    """
    if row.get("entry") is None:
        return None
    entry = ast.literal_eval(row["entry"])
    scorer = _scorer(entry["task"], repr(entry["config"]))
    answer = final_answer(completion).strip()
    score = _score(scorer, answer if _may_be_scored(entry["task"], answer) else "", entry["item"])
    if score is None and _score(scorer, "", entry["item"]) is not None:
        return 0.0
    return score


def accuracy(completion: str, row: dict) -> float | None:
    """1 for the right answer, else 0: of a row of a task by `task`, of any other by `math.accuracy`."""
    if row.get("entry") is None:
        return equals_gold(completion, row)
    score = task(completion, row)
    return None if score is None else float(score >= 1)


@lru_cache(CACHED)
def _scorer(name: str, config: str) -> Any:
    return create(name, ast.literal_eval(config))


def _score(scorer: Any, answer: str, item: dict) -> float | None:
    """None if the scorer raises."""
    try:
        return float(scorer.score_answer(answer, item))
    except (MemoryError, RecursionError):  # for the pool
        raise
    except Exception:  # whatever it is: scorers let pass what reading the text raises
        return None


def _may_be_scored(name: str, answer: str) -> bool:
    """False for code where the task's scorer would evaluate it, and for what it mistakes for the right answer."""
    if name == "complex_arithmetic":  # of which a score is the distance, and NaN is none
        return "nan" not in answer.casefold()
    if name in AS_FORMULA:
        return FORMULA.fullmatch(answer) is not None
    return name not in AS_PYTHON or WORDS.fullmatch(answer) is not None or _is_literal(answer)


def _is_literal(text: str) -> bool:
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return False
    return True
