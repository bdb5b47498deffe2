r"""Is the final answer right? Checked by math-verify, never by a model.

Of a completion, only the final answer is read, and of that only what it commits to (`statement.py`). An answer of
several parts is right if the gold answer has the same parts: "3 or 5" is wrong where 3 is right. In a chain of
equations, all numbers must be right: "x = 1/2 = 0.5".

- Numbers: `1,000` is 1000, `2 1/2` is 5/2; decimals are compared after rounding to 6 places.
- Percent: `50%` equals 50 and 0.5, as questions ask for either.
- Units: the number decides. A unit may be missing, but one of measure may not contradict the gold answer's; none
  is converted. Currency signs are dropped.
- A capital letter as the gold answer is a choice: no other letter may stand alone in the answer.
- Up to three words as the gold answer ("Tuesday", "no solution") are compared as text, case aside.
- A formula `too_hard` to evaluate is right only if it is the gold answer's text, spaces aside.

Not handled: undone work counts as an answer where it can be evaluated ("3*4+5" is 17).
"""

import logging
import re
from functools import lru_cache
from typing import Any, NamedTuple

import sympy.physics.units
from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy.physics.units import Quantity

from .hostile import too_hard
from .statement import Formula, Statement, stated_formula, statement, whole_formula

# No search inside other text, and no units stripped: `statement` has done both by rules of ours.
EXTRACTION = (
    LatexExtractionConfig(
        boxed_match_priority=-1,
        normalization_config=NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True),
    ),
)
# Each character is read once, however many elements are opened and never closed.
ANSWER = re.compile(r"<answer>([^<]*+(?:<(?!/?answer>)[^<]*+)*+)</answer>")
# The pool's limit is the only clock: math-verify's own would call a right answer wrong on a machine that is suspended
# for a moment, and it would be remembered as wrong.
NO_CLOCK = None
logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of having no clock
# A training run's groups ask for the same gold answer many times, and often give the same wrong one.
CACHED = 4096
CHOICE = re.compile(r"[(\[]?([A-HJ])[)\].:]*")
# With the operators next to it, which make it a variable. "I" is a word far more often than a choice.
LETTER = re.compile(r"(?:[-+*/^=_] ?)?(?<![\w\\'])[A-HJ](?![\w'])(?: ?[-+*/^=_])?")
WORDS = re.compile(r"(?=.*[^\W\d_]{3}|no\b)(?:[^\W\d_][\w'’-]*)(?: [^\W\d_][\w'’-]*){0,2}", re.IGNORECASE)
# "1 2" is not 12.
SPACE = re.compile(r"(?<!\w) | (?!\w)")
EQUALS = re.compile(r"(?<![<>!:\\])=")
UNIT_WORD = re.compile(r"(?P<name>[A-Za-zµ]+)(?:\^ ?\{? ?(?P<power>\d))?")


class Gold(NamedTuple):
    """A gold answer that can be scored: a choice, words, or a formula with its unit."""

    text: str
    choice: str | None = None
    formula: Formula | None = None


def final_answer(completion: str) -> str:
    """The part of a completion that is graded.

    What follows the last `</think>`, up to a `<think>` that is never closed (thinking is never graded), and of
    that the inside of the last `<answer>` element if there is one.
    """
    tail = completion.rpartition("</think>")[2].partition("<think>")[0]
    elements = ANSWER.findall(tail)
    return elements[-1] if elements else tail


def accuracy(completion: str, row: dict) -> float | None:
    """1 if the final answer equals the row's `answer`, else 0; None if no gold answer can be scored.

    `answer` may be a list: of equally right answers, any will do. Range {0, 1}. Source: DeepSeek-R1
    (arXiv 2501.12948), section 2.2.2, "accuracy rewards".
    """
    answers = [row["answer"]] if isinstance(row["answer"], str) else row["answer"] or []
    golds = [gold for gold in map(_gold, answers) if gold is not None]
    if not golds:
        return None
    stated = statement(final_answer(completion))
    return float(any(_right(gold, stated) for gold in golds))


@lru_cache(CACHED)
def _gold(answer: str) -> Gold | None:
    stated = statement(answer)
    text = _squeezed(stated.text)
    choice = CHOICE.fullmatch(stated.text)
    if choice:
        return Gold(text, choice=choice[1])
    formula = whole_formula(stated.text)
    if formula is not None:
        return Gold(text, formula=formula) if too_hard(formula.text) or _parse(formula.text) else None
    return Gold(text) if WORDS.fullmatch(stated.text) else None


def _right(gold: Gold, stated: Statement) -> bool:
    if _squeezed(stated.text) == gold.text:
        return True
    if gold.choice is not None:
        return set(LETTER.findall(stated.text)) == {gold.choice}
    given = stated_formula(stated) if gold.formula else None
    if given is None or _contradicts(given.unit, gold.formula.unit):
        return False
    if _squeezed(given.text) == _squeezed(gold.formula.text):
        return True
    return not (too_hard(given.text) or too_hard(gold.formula.text)) and _equal(gold.formula.text, given.text)


@lru_cache(CACHED)
def _equal(gold: str, given: str) -> bool:
    sides = [given] if EQUALS.search(gold) else EQUALS.split(given)
    numbers = [side for side in sides[:-1] if not re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", side))]
    return all(_verified(gold, text) for text in [given, *numbers])


def _verified(gold: str, given: str) -> bool:
    return verify(_parse(gold), _parse(given), timeout_seconds=NO_CLOCK)


@lru_cache(CACHED)
def _parse(formula: str) -> list[Any]:
    return parse(f"${formula}$", extraction_config=EXTRACTION, fallback_mode="no_fallback", parsing_timeout=NO_CLOCK)


def _squeezed(text: str) -> str:
    text = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", text.replace("$", ""))
    return text.casefold() if WORDS.fullmatch(text) else SPACE.sub("", text)


def _contradicts(unit: str, gold: str) -> bool:
    return any(own != other for own, other in zip(_measures(unit), _measures(gold), strict=False))


@lru_cache(CACHED)
def _measures(unit: str) -> tuple[tuple[Any, int], ...]:
    """The units of measure in it with their powers; other words ("apples") are none."""
    measures, power = [], 1
    for found in UNIT_WORD.finditer(unit):
        name = found["name"]
        if name in ("square", "sq", "cubic"):
            power = 3 if name == "cubic" else 2
        elif name in ("dollar", "dollars", "cent", "cents"):
            measures.append((name.rstrip("s"), 1))
        elif isinstance(quantity := getattr(sympy.physics.units, name, None), Quantity):
            measures.append((quantity, int(found["power"] or power)))
            power = 1
    return tuple(measures)
