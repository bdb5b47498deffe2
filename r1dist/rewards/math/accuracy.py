r"""Is the final answer right? Checked by math-verify, never by a model.

Of a completion, only the final answer is read, and of that only what it commits to (`statement.py`). An answer of
several parts is right if the gold answer has the same parts, as often: "3 or 5" is wrong where 3 is right. In a chain
of equations, all numbers must be right: "x = 1/2 = 0.5". Ours, because math-verify does otherwise:

- Decimals agree in 6 places and in 6 significant digits; math-verify counts places only, and 0.0000014 as 0.0000006.
- `1, 1, 2` is not `1, 2, 2`; math-verify compares them as sets.
- Percent: `50%` equals 50 and 0.5, as questions ask for either; math-verify knows that of whole numbers only.
- Units: the number decides. A unit may be missing, but one of measure may not contradict the gold answer's; none
  is converted (`units.py`). math-verify drops them all.
- A capital letter as the gold answer is a choice: no other letter may stand alone in the answer.
- Words as the gold answer ("Tuesday", "no solution") are compared as text, case aside.
- A formula `too_hard` to evaluate is right only if it is the gold answer's text, spaces aside.

Not handled: undone work counts as an answer where it can be evaluated ("3*4+5" is 17).
"""

import logging
import re
from functools import lru_cache
from typing import Any, NamedTuple

from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
from latex2sympy2_extended.sets import FiniteSet
from math_verify import LatexExtractionConfig, parse, verify
from math_verify.grader import sort_key
from sympy import Eq, Expr, Float, Set, Tuple, Union, floor, log, preorder_traversal
from sympy.logic.boolalg import Boolean

from ..thinking import after_thinking
from .hostile import too_hard
from .statement import Formula, Statement, denied, has_prose, stated_formula, statement, whole_formula
from .units import contradict

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
PLACES = 6
EXACT = 12
"""Powers of ten: what is larger is written with its significant digits only, unless it is a whole number."""
CHOICE = re.compile(r"[(\[]?([A-HJ])[)\].:]*")
# With the operators next to it, which make it a variable. "I" is a word far more often than a choice.
LETTER = re.compile(r"(?:[-+*/^=_] ?)?(?<![\w\\'])[A-HJ](?![\w'])(?: ?[-+*/^=_])?")
ARTICLE = re.compile(r"(?<![(*])(?<!ption )(?<!hoice )\bA (?=[a-z])(?!(?:is|was|because|since|as|or|and)\b)")
CLAUSE = re.compile(r"[.;] |\b(?:because|since|as)\b")
LETTERS = r"[^\W\d_][\w'’-]*"
WORDS = re.compile(rf"(?=.*[^\W\d_]{{3}}|no\b){LETTERS}(?:,? [\w'’-]+){{0,2}}", re.IGNORECASE)
SENTENCE = re.compile(rf"\$*\\text\{{(?=[^{{}}]*[^\W\d_]{{3}}) ?{LETTERS}(?: {LETTERS})* ?\}}\$*")
# "Yes, it does." is a yes.
DECIDED = re.compile(r"(yes|no|true|false) \1[,.;:] (?!.*\b(?:yes|no|not|true|false)\b).*", re.IGNORECASE)
# What data sets write where there is no answer.
NO_ANSWER = re.compile(
    r".*\b(?:pro(?:of|ofs|ve|ves|ved|ven)|qed|q\.e\.d|var(?:y|ies)|see)\b.*"
    r"|(?:no|not|none|un)[ -]?(?:answer|found|available|applicable|provided|given|specified|known|answerable)(?: \w+)?"
    r"|n/?a|nan|null|tbd|todo|answers?|solutions?|omitted|missing|error|trivial|(?:as )?shown|verified|demonstrated",
    re.IGNORECASE,
)
# "1 2" is not 12.
SPACE = re.compile(r"(?<!\w) | (?!\w)")
EQUALS = re.compile(r"(?<![<>!:\\])=")
# The decimal comma is read as such only beside a decimal point: "1,2" is a list elsewhere.
COMMA = re.compile(r"-?\d+,\d+ -?\d*\.\d+|-?\d*\.\d+ -?\d+,\d+")
VARIABLE = re.compile(r"[A-Za-z]")
NUMBER = re.compile(r"-?\d{1,15}(?:\.\d{1,15})?")
SHORT = re.compile(r"(?<=\d)(?:([kK])|(M)|(bn|B))(?![A-Za-z])")


class Gold(NamedTuple):
    """A gold answer that can be scored: a choice, words, or a formula with its units."""

    text: str
    choice: str | None = None
    formula: Formula | None = None


def final_answer(completion: str) -> str:
    """The part of a completion that is graded.

    What `after_thinking` gives, and of that the inside of the last `<answer>` element if there is one.
    """
    tail = after_thinking(completion)
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
    if NO_ANSWER.fullmatch(stated.text):
        return None
    if choice:
        return Gold(text, choice=choice[1])
    if WORDS.fullmatch(stated.text) or SENTENCE.fullmatch(answer.strip()):
        return Gold(text)
    formula = whole_formula(stated.text)
    if formula is None and stated.announced:
        formula = whole_formula(stated.text.partition(". ")[0])
    if formula is None:
        return None
    # A number can be scored, and is not parsed before an answer is written otherwise.
    if not (NUMBER.fullmatch(formula.text) or too_hard(formula.text) or _parse(formula.text)):
        return None
    return Gold(text, formula=formula)


def _right(gold: Gold, stated: Statement) -> bool:
    if _squeezed(stated.text) == gold.text:
        return True
    if gold.choice is not None:
        return _chooses(stated.text, gold.choice)
    if gold.formula is None:
        return DECIDED.fullmatch(f"{gold.text} {stated.text}") is not None
    if not VARIABLE.search(_no_commands(gold.formula.text)):
        # Behind a number, what is a variable elsewhere is a short magnitude, or a unit without its space.
        text = SHORT.sub(lambda found: rf" \times 10^{{{3 * found.lastindex}}}", stated.text)
        stated = Statement(re.sub(r"(?<=\d)(?=[A-Za-z])", " ", text) if gold.formula.units else text, stated.announced)
    given = stated_formula(stated)
    if given is None or contradict(given.units, gold.formula.units):
        return False
    if _squeezed(given.text) == _squeezed(gold.formula.text):
        return True
    return not (too_hard(given.text) or too_hard(gold.formula.text)) and _equal(gold.formula.text, given.text)


def _chooses(text: str, choice: str) -> bool:
    text = ARTICLE.sub("", text)
    clauses = (clause for clause in CLAUSE.split(text) if LETTER.search(clause))
    return set(LETTER.findall(text)) == {choice} and not any(map(denied, clauses))


@lru_cache(CACHED)
def _equal(gold: str, given: str) -> bool:
    if COMMA.fullmatch(f"{gold} {given}"):
        gold, given = gold.replace(",", "."), given.replace(",", ".")
    sides = [given] if EQUALS.search(gold) else EQUALS.split(given)
    numbers = [side for side in sides[:-1] if not VARIABLE.search(_no_commands(side))]
    return all(_verified(gold, text) for text in [given, *numbers])


def _verified(gold: str, given: str) -> bool:
    if (r"\%" in gold) != (r"\%" in given) and _verified(gold.replace(r"\%", ""), given.replace(r"\%", "")):
        return True
    pair = _parse(gold)[:1] + _parse(given)[:1]
    if len(pair) < 2:
        return False
    one, other = (_as_union(expression, beside) for expression, beside in (pair, pair[::-1]))
    places = _places(one)
    rounding = {"float_rounding": places, "numeric_precision": 9 + max(places, PLACES), "timeout_seconds": NO_CLOCK}
    # Numbers 1, 2 are not what lies between them.
    rounding["allow_set_relation_comp"] = not isinstance(one, FiniteSet)
    parts, given_parts = _listed(one), _listed(other)
    if isinstance(one, Expr) and given_parts:
        return all(verify(one, part, **rounding) for part in given_parts)
    if parts and r"\{" not in gold + given and (_repeats(parts) or _repeats(given_parts)):
        one, other = (Tuple(*sorted(listed, key=sort_key)) for listed in (parts, given_parts))
    return verify(one, other, **rounding)


@lru_cache(CACHED)
def _parse(formula: str) -> list[Any]:
    found = parse(f"${formula}$", extraction_config=EXTRACTION, fallback_mode="no_fallback", parsing_timeout=NO_CLOCK)
    if found or r"\pm" not in formula:
        # math-verify rounds a decimal only where it stands alone: 1.5 \times 10^{-7} would equal no fraction.
        return [
            part.doit() if isinstance(part, Expr) and part.is_number and part.has(Float) else part for part in found
        ]
    parts = [part.replace(r"\pm", sign) for part in formula.split(",") for sign in ("+-" if r"\pm" in part else " ")]
    return _parse(",".join(parts))


def _listed(expression: Any) -> list[Any]:
    """The parts of a list or tuple as they were written, equal ones included; none of what is neither."""
    inner = expression.rhs if isinstance(expression, Eq) else expression
    return list(getattr(inner, "_unsorted_args", inner if isinstance(inner, Tuple) else ()))


def _repeats(parts: list[Any]) -> bool:
    """True if a number occurs twice: a repeated root is meant, a repeated pair or equation is not."""
    numbers = [part for part in parts if getattr(part, "is_number", False)]
    return len(set(numbers)) < len(numbers)


def _as_union(expression: Any, beside: Any) -> Any:
    """Inequalities "x < 1, x > 2" as the union that they are where the other side is a set of numbers."""
    parts = getattr(expression, "_unsorted_args", [])
    beside = beside.rhs if isinstance(beside, Eq) else beside
    if not isinstance(expression, FiniteSet) or isinstance(beside, FiniteSet) or not isinstance(beside, Set):
        return expression
    if len(expression.free_symbols) != 1 or not all(isinstance(part, Boolean) for part in parts):
        return expression
    try:
        return Union(*(part.as_set() for part in parts))
    except (TypeError, ValueError, NotImplementedError):  # what sympy cannot solve, or compares with no real number
        return expression


def _places(gold: Any) -> int:
    """Decimals in which numbers must agree: six, and six significant digits of the smallest number in `gold`."""
    exponents, walk = [], preorder_traversal(gold)
    for part in walk:
        if getattr(part, "is_number", False) and isinstance(part, Expr):
            walk.skip()
            size = abs(part).evalf(8)
            if size.is_Float and size != 0:
                exponents.append(int(floor(log(size, 10))))
    least = min(exponents, default=-PLACES)
    return PLACES - 1 - least if least < 0 or (least >= EXACT and not getattr(gold, "is_integer", False)) else PLACES


def _squeezed(text: str) -> str:
    text = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", text.replace("$", ""))
    return text.casefold() if WORDS.fullmatch(text) or has_prose(text) else SPACE.sub("", text)


def _no_commands(formula: str) -> str:
    return re.sub(r"\\[A-Za-z]+", "", formula)
