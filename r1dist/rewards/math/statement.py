r"""What does an answer commit to? Text in, text out: nothing is evaluated here.

The last `\boxed{}` speaks for the text, and several are one answer of several parts; else what follows the last
"answer is" or "Answer:"; else all of it. Of prose, the formula is the first one after "answer is", and the last
one elsewhere, with all that is joined to it by commas, "or", "and", "maybe": such parts make one answer, too.

Not handled: bare variables in prose ("so it is x + y" without dollars), and amounts of two units ("5 m 20 cm").
"""

import re
from typing import NamedTuple

TAIL = 10_000
"""Characters: what is longer has its answer at the end, and is read from there."""

SIGNS = str.maketrans(
    {"−": "-", "–": "-", "×": r"\times ", "÷": "/", "·": r"\cdot ", "π": r"\pi ", "∞": r"\infty ", "°": " degrees ",
     "≤": r"\le ", "≥": r"\ge ", "∪": r"\cup ", "√": r"\sqrt ", "²": "^2", "³": "^3", "½": r"\frac{1}{2}",
     "％": "%", "，": ",", "。": ".", "：": ":", "（": "(", "）": ")", "€": "", "£": "", "¥": ""}
)  # fmt: skip
BOX = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
ANCHOR = re.compile(r"\banswers?\b[^.\n:=]{0,60}?(?:\b(?:is|are)\b|[:=])[\s:=*]*", re.IGNORECASE)
BOLD = re.compile(r"(?<![\w)*])\*\*([^*]+)\*\*(?![\w(*])")
SPACE = re.compile(r"(?<!\\)\\(?:[,;:! \n]|q?quad(?![A-Za-z])|(?:left|right)(?![A-Za-z])\.?)|~")
TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it|sf)|mbox|operatorname)\s*\{([^{}]*)\}")
MATH = re.compile(r"\\[()\[\]]|\$\$")
DEGREES = re.compile(r"\^ ?(?:\\circ|\{ ?\\circ ?\})")
PERCENT = re.compile(r" ?\\?%| per ?cent\b", re.IGNORECASE)
JOINED = re.compile(
    r"(?<![ ,.;])[ ,.;]*(?:\b(?:or|and|maybe|perhaps|possibly|also|either|even|else)\b[ ,]*)+", re.IGNORECASE
)
FUNCTION = re.compile(r"(?<![\\A-Za-z])(?=(?:sqrt|pi|sin|cos|tan|cot|log|ln|exp|infty)(?![A-Za-z]))")
ROOT = re.compile(r"\\sqrt ?\(([^()]*)\)")
COMMAND = re.compile(r"\\(?:begin|end)\{[^{}]*\}|\\[A-Za-z]+")
PROSE = re.compile(
    r"[^\W\d_]{3,}|\b(?:is|it|so|of|to|in|we|am|he|at|as|be|by|if|my|on|us|no|up)\b|[\u3400-\u9fff]", re.IGNORECASE
)
SINGLE_ARGUMENTS = re.compile(r"\\([dt]?(?:frac|binom)) ?(\d) ?(\d)(?!\d)")
MIXED = re.compile(r"(?<![\d.^_{])(\d+) (\d+) ?/ ?(\d+)")
ROW = re.compile(r"(?<=\d)(?<![_^]\d) (?=[\d.])")
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:,|\{,\})\d{3})+(?![\d,])|\A\d{1,3}(?: \d{3})+(?!\S)")
# Two letters are a product of variables unless they are known here; one letter is a unit behind a space only.
UNIT = re.compile(
    r"(?:(?<=[\d)}\]!]) ?|(?<=[a-z]) )(?P<unit>(?:[A-Za-zµ]{3,}|[cdkmn]m|[km]g|m[lLs]|ft|in|lbs?|oz|hr|mi|yd|Hz|k[JWN]"
    r"|[ap]m|[AP]M|(?<= )[mgshlLNJWVAKCF])(?![A-Za-z])(?:\^ ?\{? ?\d ?\}?)?"
    r"(?:(?: | ?/ ?)[A-Za-z]+(?:\^ ?\{? ?\d ?\}?)?){0,3})"
)
FORMULA = re.compile(
    r"\$(?P<math>[^$]+)\$"
    r"|(?P<run>(?<![\w.])(?:[-+] ?)?(?:\d|\.\d|\(|\\[A-Za-z])(?:[\d.,+\-*/^×()=!%: ]|\$(?=\d)|\\%|\\[A-Za-z]+"
    r"|(?<=[\w}\])^])\{(?:[^{}]|\{[^{}]*\})*\}|(?<=\d)[a-z](?![A-Za-z]))*)"
)
# A dollar sign before a number is a price, and so is what reads like a formula between two such signs.
CUT_OFF = re.compile(r"\A ?[=*/^]|[-+=*/(,] ?\Z")
NEGATED = re.compile(r"(?:\bnot|\bnever|n't)(?: \w+){0,2} ?\$?\Z", re.IGNORECASE)


class Statement(NamedTuple):
    """What a text says its answer is, tidied. `text` still has the dollars around its formulas."""

    text: str
    announced: bool
    """It followed "answer is": its first formula is meant rather than its last."""


class Formula(NamedTuple):
    """What math-verify is given, and the words that stood behind it."""

    text: str
    unit: str


def statement(text: str) -> Statement:
    """What `text` commits to; empty if it has an unclosed box only."""
    text = text[-TAIL:]
    boxes = _boxes(text)
    if boxes:
        text = ", ".join(dict.fromkeys(boxes))
    elif r"\boxed{" in text:
        return Statement("", False)
    text = tidy(text)
    end = max((found.end() for found in ANCHOR.finditer(text)), default=None)
    return Statement(_trim(text[end:]), end is not None)


def whole_formula(text: str) -> Formula | None:
    """`text` of a `Statement` as one formula with at most a unit behind it, else None."""
    bare = _trim(text.replace("$", ""))
    unit = ""
    for found in UNIT.finditer(bare):
        if found.end() == len(bare):
            bare, unit = bare[: found.start()], found["unit"]
    if not re.search(r"[^\W_]|\\", bare) or has_prose(bare):
        return None
    return Formula(_digits(bare), unit)


def stated_formula(stated: Statement) -> Formula | None:
    """The formula that a statement, be it prose, comes to; None without one, or if it is denied."""
    whole = whole_formula(stated.text)
    if whole is None and stated.announced:
        whole = whole_formula(stated.text.partition(". ")[0])
    if whole is not None:
        return whole
    groups = _joined_formulas(stated.text)
    if not groups:
        return None
    start, end, formula = groups[0 if stated.announced else -1]
    if NEGATED.search(stated.text[:start]):
        return None
    unit = UNIT.match(stated.text, end)
    return Formula(_digits(_trim(formula)), unit["unit"] if unit else "")


def has_prose(text: str) -> bool:
    """True if there are words in it that are no LaTeX."""
    return PROSE.search(COMMAND.sub(" ", text)) is not None


def tidy(text: str) -> str:
    """One way of writing for what can be written in several ways without meaning another thing."""
    text = text.translate(SIGNS).replace(r"\$", "")
    text = re.sub(r"(?<=\d)\\[,!](?=\d{3})|(?<=\d)\{,\}(?=\d{3})", ",", text)
    text = MATH.sub("$", SPACE.sub(" ", text))
    text = TEXT.sub(r" \1 ", BOLD.sub(r"\1", text))
    text = " ".join(text.split())
    text = PERCENT.sub(r"\\%", DEGREES.sub(" degrees", text))
    text = ROOT.sub(r"\\sqrt{\1}", FUNCTION.sub(r"\\", JOINED.sub(", ", text)))
    return _trim(text)


def _trim(text: str) -> str:
    text = text.lstrip(" ,;:*").rstrip(" .,;:*")
    return _trim(text[1:-1]) if re.fullmatch(r"\$[^$]*\$", text) else text


def _digits(formula: str) -> str:
    """Thousands without separators, mixed numbers as LaTeX, and numbers in a row as what they are: a list."""
    formula = SINGLE_ARGUMENTS.sub(r"\\\1{\2}{\3}", formula.replace("**", "^"))
    formula = MIXED.sub(r"\1\\frac{\2}{\3}", formula)
    if not re.search(r"[(\[]|\\[{(]", formula):
        formula = THOUSANDS.sub(lambda found: re.sub(r"\D", "", found[0]), formula)
    return ROW.sub(", ", formula).strip()


def _boxes(text: str) -> list[str]:
    r"""What the innermost `\boxed{}` hold, braces balanced."""
    boxes, open_braces = [], []
    for found in BOX.finditer(text):
        if found[0].endswith("{") and found[0] != r"\{":
            open_braces.append(found.end() if len(found[0]) > 1 else None)
        elif found[0] == "}" and open_braces:
            begin = open_braces.pop()
            if begin is not None and r"\boxed" not in text[begin : found.start()]:
                boxes.append(text[begin : found.start()].strip())
    return boxes


def _joined_formulas(text: str) -> list[tuple[int, int, str]]:
    """(start, end, formula) of what prose holds; formulas with nothing but commas between them are one."""
    groups: list[tuple[int, int, str]] = []
    position = 0
    while found := FORMULA.search(text, position):
        position = found.end()
        # Of an equation in plain prose, only what stands behind it is sure to be whole: "3 boxes of 6 = 18".
        formula = found["math"] or _trim(found["run"]).replace("$", "").rpartition("=")[2]
        if found["math"] and (has_prose(formula) or CUT_OFF.search(formula)):
            position = found.start() + 1
        elif re.search(r"\d|\\[A-Za-z]", formula) or found["math"]:
            if groups and not text[groups[-1][1] : found.start()].strip(" ,;$"):
                start, _, before = groups.pop()
                groups.append((start, position, f"{_trim(before)}, {_trim(formula)}"))
            else:
                groups.append((found.start(), position, formula))
    return groups
