r"""What does an answer commit to? Text in, text out: nothing is evaluated here.

The last `\boxed{}` speaks for the text, with those close before it as one answer of several parts; else what follows
the last "answer is", "Answer:" or "####"; else all of it. Of prose, the formula is the first one after "answer is"
that is not what the sentence is about ("the largest $n$ is 34"), and the last one elsewhere, with all that is joined
to it by commas, "or", "and", "maybe": such parts make one answer, too.

Not math-verify's extraction: that pays an answer of two candidates for the one that it finds, and denied ones.

Not handled: bare variables in prose ("so it is x + y" without dollars), and numbers in words.
"""

import re
from typing import NamedTuple

from sympy import Expr

from ...data.formats import boxes, with_braces
from .units import measure

TAIL = 10_000
"""Characters: what is longer has its answer at the end, and is read from there."""

SIGNS = str.maketrans(
    {"−": "-", "–": "-", "×": r"\times ", "÷": "/", "·": r"\cdot ", "π": r"\pi ", "∞": r"\infty ", "°": " degrees ",
     "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm ", "∪": r"\cup ", "∈": r"\in ",
     "√": r"\sqrt ", "½": r"\frac{1}{2}", "％": "%", "，": ",", "。": ".", "：": ":", "（": "(", "）": ")",
     "€": " euros ", "£": " pounds ", "¥": " yen "}
)  # fmt: skip
SUPERSCRIPTS, RAISED = re.compile("[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+"), str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
ANCHOR = re.compile(r"(?:\banswers?\b[^.\n:=]{0,60}?(?:\b(?:is|are)\b|[:=])|####)[\s:=*]*", re.IGNORECASE)
BOLD = re.compile(r"(?<![\w)*])\*\*([^*]+)\*\*(?![\w(*])")
SPACE = re.compile(r"(?<!\\)\\(?:[,;:! \n]|q?quad(?![A-Za-z])|(?:left|right)(?![A-Za-z])\.?)|~")
TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it|sf)|mbox|operatorname)\s*\{([^{}]*)\}")
MATH = re.compile(r"\\[()\[\]]|\$\$")
DEGREES = re.compile(r"\^ ?(?:\\circ|\{ ?\\circ ?\})")
PERCENT = re.compile(r" ?\\?%| (?:per ?cent|percentage|pct)\b", re.IGNORECASE)
GROUPED = re.compile(r"(?<=\d)(?:,? ?\\[,!]|\{ ?,\}) ?(?=\d{3})")
POWERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
MAGNITUDE = re.compile(rf"(?<=[\d}}])(\$?)[- ]?({'|'.join(POWERS)})s?\b", re.IGNORECASE)
SCIENTIFIC = re.compile(r"(?<![\w.\\])(\d+(?:\.\d*)?|\.\d+)[eE]([-+]?\d+)(?![\w.]\d?)")
PRICE = re.compile(r"(\\\$|[€£¥]) ?(\d[\d,]*(?:\.\d+)?(?: \\times 10\^\{\d+\})?)(?: dollars?\b| euros?\b)?")
WORD = r"(?:or|and|maybe|perhaps|possibly|alternatively|also|either|else|it (?:could|might|may)(?: also| well)? be)"
JOINED = re.compile(rf"(?<![ ,.;])[ ,.;]*\b{WORD}\b[ ,]*(?:\b(?:{WORD}|even)\b[ ,]*)*", re.IGNORECASE)
FUNCTION = re.compile(r"(?<![\\A-Za-z])(?=(?:sqrt|pi|sin|cos|tan|cot|log|ln|exp|infty)(?![A-Za-z]))")
ROOT = re.compile(r"\\sqrt ?\(([^()]*)\)")
COMMAND = re.compile(r"\\(?:begin|end)\{[^{}]*\}|\\[A-Za-z]+|_\{[A-Za-z]+\}")
PROSE = re.compile(
    r"[^\W\d_]{3,}|\b(?:[Ii][sntf]|so|of|[Tt]o|[Ww]e|am|[Hh]e|at|[Aa]s|be|by|[Mm]y|on|us|[Nn]o|up)\b|[\u3400-\u9fff]"
)
SINGLE_ARGUMENTS = re.compile(r"\\([dt]?(?:frac|binom)) ?(\d) ?(\d)(?!\d)")
MIXED = re.compile(r"(?<![\d.^_{])(\d+) (\d+) ?/ ?(\d+)")
ROW = re.compile(r"(?<=\d)(?<![_^]\d) (?=[\d.])")
THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:(?:,|\{,\})\d{3})+(?![\d,])|\A\d{1,3}(?: \d{3})+(?!\S)")
BASE = re.compile(r"(?<=\d)_ ?\{? ?(\d+) ?\}?\Z")
# Two letters are a product of variables unless they are known here; one letter is a unit behind a space only.
UNIT = re.compile(
    r"(?:(?<=[\d)}\]!]) ?|(?<=[a-z]) )(?P<unit>(?:[A-Za-zµ]{3,}|[cdkmn]m|[km]g|m[lLs]|ft|in(?! [a-z])|lbs?|oz|hr|mi|yd"
    r"|sq|Hz|k[JWN]|cc|[ap]m|[AP]M|(?<= )[mgshlLNJWVAKCF])(?![A-Za-z])(?: ?\^ ?\{? ?\d{1,2} ?\}?)?"
    r"(?:(?: | ?/ ?)[A-Za-z]+(?: ?\^ ?\{? ?\d{1,2} ?\}?)?){0,3})"
)
AMOUNT = re.compile(UNIT.pattern + r"(?=,| ?\d)")
FORMULA = re.compile(
    r"\$(?P<math>[^$]+)\$"
    r"|(?P<run>(?<![\w.])(?:[-+] ?)?(?:\d|\.\d|\(|\\[A-Za-z])(?:[\d.,+\-*/^×()=!%: ]|\$(?=\d)|\\%|\\[A-Za-z]+"
    r"|(?<=[\w}\])^])\{(?:[^{}]|\{[^{}]*\})*\}|(?<=\d)[a-z](?![A-Za-z]))*)"
)
# A dollar sign before a number is a price, and so is what reads like a formula between two such signs.
CUT_OFF = re.compile(r"\A ?[=*/^]|[-+=*/(,] ?\Z")
SUBJECT = re.compile(
    r"\A[ ,]*(?:is|are|equals?|must be|should be|will be|would be)\b(?! (?:not|never|wrong|incorrect)\b)"
)
NOT = (
    r"(?:\b(?:not|never|cannot|neither|nor|no longer|none|except|rule out|(?:all|anything) but|wrong|incorrect"
    r"|false)\b|n't\b)"
)
DENIED = re.compile(NOT, re.IGNORECASE)
DENIED_BEFORE = re.compile(NOT + r"(?: [^\W\d]\w*){0,3} ?[$(]*\Z", re.IGNORECASE)
DENIED_AFTER = re.compile(r"\A[$), ]*(?:(?:is|was|are|can|could|would|does|do|must)\b ?)?" + NOT, re.IGNORECASE)


class Statement(NamedTuple):
    """What a text says its answer is, tidied. `text` still has the dollars around its formulas."""

    text: str
    announced: bool
    """It followed "answer is": its first formula is meant rather than its last."""


class Formula(NamedTuple):
    """What math-verify is given, and the units of measure behind its numbers."""

    text: str
    units: tuple[Expr, ...]


def statement(text: str) -> Statement:
    """What `text` commits to; empty if it has an unclosed box only."""
    text = with_braces(text[-TAIL:])
    boxed = _boxes(text)
    if boxed:
        text = ", ".join(boxed if len(set(boxed)) > 1 else boxed[:1])
    elif r"\boxed{" in text:
        return Statement("", False)
    text = tidy(text)
    end = max((found.end() for found in ANCHOR.finditer(text)), default=None)
    return Statement(_trim(text[end:]), end is not None)


def whole_formula(text: str) -> Formula | None:
    """`text` of a `Statement` as one formula with units behind its numbers, else None."""
    units = []

    def counted(found: re.Match) -> str:
        units.append(measure(found["unit"]))
        return found[0] if units[-1] is None else "" if found.string[found.end() :].startswith(",") else ","

    bare = BASE.sub(r" base^{\1}", AMOUNT.sub(counted, _trim(text.replace("$", ""))))
    for found in UNIT.finditer(bare):
        if found.end() == len(bare):
            units.append(measure(found["unit"]))
            bare = bare[: found.start()]
            break
    if not re.search(r"[^\W_]|\\", bare) or has_prose(bare):
        return None
    named = tuple(dict.fromkeys(unit for unit in units if unit is not None))
    return Formula(f"({_digits(bare)})" if len(named) > 1 else _digits(bare), named)


def stated_formula(stated: Statement) -> Formula | None:
    """The formula that a statement, be it prose, comes to; None without one, or if it is denied."""
    whole = whole_formula(stated.text)
    if whole is None and stated.announced:
        whole = whole_formula(stated.text.partition(". ")[0])
    if whole is not None:
        return whole
    groups = _joined_formulas(stated.text)
    meant = [group for group in groups[:-1] if not SUBJECT.match(stated.text[group[1] :])] + groups[-1:]
    if not meant:
        return None
    start, end, formula = meant[0 if stated.announced else -1]
    if DENIED_BEFORE.search(stated.text[:start]) or DENIED_AFTER.match(stated.text[end:]):
        return None
    return whole_formula(formula)


def has_prose(text: str) -> bool:
    """True if there are words in it that are no LaTeX."""
    return PROSE.search(COMMAND.sub(" ", text)) is not None


def denied(text: str) -> bool:
    """True if there is a negation in it."""
    return DENIED.search(text) is not None


def tidy(text: str) -> str:
    """One way of writing for what can be written in several ways without meaning another thing."""
    if r"\begin" not in text:
        text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)
    text = GROUPED.sub(",", re.sub(r"(?<=\d)(?=[cdkm]?m[²³])", " ", text))
    text = SUPERSCRIPTS.sub(lambda found: f"^{{{found[0].translate(RAISED)}}}", text)
    text = MATH.sub("$", SPACE.sub(" ", TEXT.sub(r" \1 ", BOLD.sub(r"\1", text))))
    text = MAGNITUDE.sub(lambda found: rf" \times 10^{{{POWERS[found[2].lower()]}}}{found[1]}", " ".join(text.split()))
    text = PRICE.sub(lambda found: found[2] + (" dollars" if found[1] == r"\$" else found[1]), text)
    text = text.replace(r"\$", "").translate(SIGNS)
    text = re.sub(r"\b([ap])\.m\b\.?", r"\1m", re.sub(r"(?<=[a-z]) \^", "^", text))
    text = SCIENTIFIC.sub(
        r"\1 \\times 10^{\2}", re.sub(r"\^ ?(-\d+)", r"^{\1}", re.sub(r"(?<=\d) x (?=\d)", r" \\times ", text))
    )
    text = PERCENT.sub(r"\\%", DEGREES.sub(" degrees", " ".join(text.split())))
    text = ROOT.sub(r"\\sqrt{\1}", FUNCTION.sub(r"\\", JOINED.sub(", ", text)))
    return _trim(text)


def _trim(text: str) -> str:
    text = re.sub(r"\A\$?\\approx(?![A-Za-z]) ?", "", text.lstrip(' ,;:*"“').rstrip(' .,;:*"”'))
    return _trim(text[1:-1]) if re.fullmatch(r"\$[^$]*\$", text) else text


def _digits(formula: str) -> str:
    """Thousands without separators, mixed numbers as LaTeX, and numbers in a row as what they are: a list."""
    formula = SINGLE_ARGUMENTS.sub(r"\\\1{\2}{\3}", formula.replace("**", "^"))
    formula = MIXED.sub(r"\1\\frac{\2}{\3}", formula)
    if not re.search(r"[(\[]|\\[{(]", formula):
        formula = THOUSANDS.sub(lambda found: re.sub(r"\D", "", found[0]), formula)
    return ROW.sub(", ", formula).strip()


def _boxes(text: str) -> list[str]:
    r"""What the last of the innermost `\boxed{}` holds, and what those close before it do."""
    found: list[str] = []
    last = 0
    for begin, end in boxes(text):
        if end is None:
            continue
        between = text[last:begin]
        if len(between) > 90 or (len(between) > 18 and not re.search(r"\b(?:and|or)\b|[,;]", between)):
            found.clear()
        found.append(text[begin:end].strip())
        last = end + 1
    return found


def _joined_formulas(text: str) -> list[tuple[int, int, str]]:
    """(start, end, formula) of what prose holds; formulas with nothing but commas or units between them are one."""
    groups: list[tuple[int, int, str]] = []
    position = 0
    while found := FORMULA.search(text, position):
        position = found.start() + max(1, len(found[0].rstrip(" .,:(")))
        # Of an equation in plain prose, only what stands behind it is sure to be whole: "3 boxes of 6 = 18".
        formula = found["math"] or _trim(found["run"].rstrip(" .,:(")).replace("$", "").rpartition("=")[2]
        if found["math"] and (has_prose(formula) or CUT_OFF.search(formula)):
            position = found.start() + 1
        elif re.search(r"\d|\\[A-Za-z]", formula) or found["math"]:
            start, formula = found.start(), _trim(formula)
            unit = UNIT.match(text, position)
            if unit and measure(unit["unit"]) is not None:
                position, formula = unit.end(), f"{formula} {unit['unit']}"
            if groups and not text[groups[-1][1] : start].strip(" ,;$"):
                start, _, before = groups.pop()
                formula = f"{before}, {formula}"
            groups.append((start, position, formula))
    return groups
