"""Recognises expressions that would take too long, or too much memory, before anything evaluates them.

Half of what keeps a trainer alive: what it lets pass still needs a clock (an expression may be slow without being
big), and what it stops would often not hear one.
"""

import math
import re
from collections import deque
from itertools import groupby

LENGTH = 400
"""Characters of a formula. A sum of a hundred variables, 690 characters long, takes math-verify's parser 2.5 s."""
DEPTH = 8
"""Brackets inside brackets. The parser's time doubles with every few: 0.6 s at 8 pairs of braces, over 4 s at 15."""
DIGITS = 3000
"""Decimal digits of all numbers of a formula multiplied."""
FACTORIAL = 1000
"""Argument of a factorial or a gamma function."""
BINOMIAL = 10_000
"""Upper argument of a binomial coefficient."""
EXPANSION = 16
"""Exponent of a sum that holds a variable: `(x+y+z)^{50}` keeps sympy busy for more than 4 s."""
CELLS = 64
"""Entries of a matrix."""

NO_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
# The first are work to do rather than answers; the others are TeX programming.
REFUSED = re.compile(
    r"\\(?:sum|prod|coprod|i{1,4}nt|oint|lim|limsup|liminf|bigcup|bigcap"
    r"|input|include|write|read|open(?:in|out)|[exg]?def|let|(?:re)?newcommand|catcode|csname|loop|repeat|usepackage)"
    r"(?![A-Za-z])"
)
TOKEN = re.compile(r"\d+(?:\.\d+)?|\.\d+|\*\*|\\[A-Za-z]+|\\?[^\s\\]|\\")
# Functions and signs nest without brackets, too: \sin\sin\sin x, ----1.
CHAINED = re.compile(r"\\(?:a?(?:rc)?(?:sin|cos|tan)h?|cot|sec|csc|log|ln|lg|exp|sqrt)|[-+]")
OPENING, CLOSING = {"{", "(", "[", r"\{"}, {"}", ")", "]", r"\}"}
HARD = (math.inf, False)


def too_hard(formula: str) -> bool:
    """True if `formula`, in LaTeX or plain notation, is beyond one of the bounds above. Never raises.

    Sizes are bounded from above, and cheaply: a sum counts as a product, so a formula of a small value may be
    refused. Sums, products, integrals and limits over ranges always are.
    """
    if len(formula) > LENGTH or formula.count("&") > CELLS or NO_TEXT.search(formula) or REFUSED.search(formula):
        return True
    tokens = deque(TOKEN.findall(formula))
    if _depth(tokens) > DEPTH:
        return True
    digits = 0.0
    while tokens:
        digits += _until_closed(tokens)[0]
    return digits > DIGITS


def _depth(tokens: deque[str]) -> int:
    depth = deepest = 0
    for token in tokens:
        depth = max(0, depth + (token in OPENING) - (token in CLOSING))
        deepest = max(deepest, depth)
    chains = (len(list(run)) for chained, run in groupby(tokens, lambda t: bool(CHAINED.fullmatch(t))) if chained)
    return max(deepest, *chains, 0)


def _until_closed(tokens: deque[str]) -> tuple[float, bool]:
    """Takes all up to a closing bracket off: its digits, and whether it is a sum that holds a variable."""
    digits, variable, signs = 0.0, False, False
    while tokens and tokens[0] not in CLOSING:
        signs |= tokens[0] in "+-"
        variable |= tokens[0].isalpha()
        size, expansion = _operand(tokens)
        digits += size
        variable, signs = variable | expansion, signs | expansion
    if tokens:
        tokens.popleft()
    return digits, variable and signs


def _operand(tokens: deque[str]) -> tuple[float, bool]:
    """The same of one number, variable, command or bracket, with its factorials and powers."""
    digits, expansion = _bare_operand(tokens)
    while tokens and tokens[0] in ("!", "^", "**"):
        if tokens.popleft() == "!":
            if digits > math.log10(FACTORIAL):
                return HARD
            digits *= 10**digits
            continue
        exponent = 10 ** min(_exponent(tokens), 9.0)
        if expansion and exponent > EXPANSION:
            return HARD
        digits = max(digits, 1.0) * exponent
    return digits, expansion


def _exponent(tokens: deque[str]) -> float:
    while tokens and tokens[0] in "+-":
        tokens.popleft()
    return _operand(tokens)[0] if tokens else 0.0


def _bare_operand(tokens: deque[str]) -> tuple[float, bool]:
    token = tokens.popleft()
    if token in OPENING:
        return _until_closed(tokens)
    if token[-1].isdecimal() and token[0] != "\\":
        # What is smaller than 2 counts as 2: its powers may be long, too, and so may those of a sum it stands in.
        return math.log10(max(float(token), 2.0)), False
    if not token[-1].isalpha():
        return 0.0, False
    if token[0] != "\\":
        return 1.0, False
    arguments = []
    while tokens and (tokens[0] in OPENING or tokens[0].isdecimal()):
        arguments.append(_bare_operand(tokens))
    bound = {"binom": BINOMIAL, "gamma": FACTORIAL}.get(token[-5:].lower())
    if bound and arguments and arguments[0][0] > math.log10(bound):
        return HARD
    return sum(size for size, _ in arguments), any(is_sum for _, is_sum in arguments)
