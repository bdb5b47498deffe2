"""Answers made to hang, to crash or to be paid without being right: none does."""

import time

import pytest

from r1dist.rewards.math.accuracy import accuracy
from r1dist.rewards.math.hostile import too_hard

# None of them is 7.
REFUSED = {
    "tower": "9^{9^{9^9}}",
    "tower without braces": "9^9^9^9",
    "Python's tower": "9**9**9",
    "tower in brackets": "(9)^{(9)^{(9)}}",
    "huge exponent": "2^{10000000000}",
    "huge negative exponent": "2^{-10000000000}",
    "signed exponent": "2**-99999999",
    "huge exponent of a decimal": "1.0000001^{9999999999}",
    "exponent in a fraction": "2^{\\frac{10^{9}}{3}}",
    "exponent of a command": "9^\\left(10^9\\right)",
    "power of a factorial": "(99!)^{99!}",
    "power of powers": "((9^9)^9)^{99999}",
    "product of powers": "9^{999} 9^{999} 9^{999} 9^{999}",
    "modular tower": "9^{9^{9^9}} \\bmod 10",
    "logarithm of a tower": "\\log_{10} 10^{10^{10}}",
    "root of a power": "\\sqrt[9]{9^{9^9}}",
    "expanded sum": "(x+y+z)^{50}",
    "expanded sum of high degree": "(x+1)^{1000}",
    "sum of sums": "((x+1)^2+(y-1)^2)^{40}",
    "factorials of factorials": "10!!!!!!!!",
    "double factorial": "10!!",
    "factorial": "100000!",
    "factorial of a power": "(10^{100})!",
    "factorial in brackets": "((((10!)!)!)!)!",
    "binomial": "\\binom{10^9}{5 \\cdot 10^8}",
    "binomial without braces": "\\binom 99999999 5",
    "display binomial": "\\dbinom{1000000}{500000}",
    "gamma": "\\Gamma(10^9)",
    "sum": "\\sum_{k=1}^{10^{12}} k^k",
    "product": "\\prod_{k=1}^{999999999} k",
    "integral": "\\int_0^{\\infty} e^{-x^2} \\sin x dx",
    "double integral": "\\iint x y dx dy",
    "limit": "\\lim_{n \\to \\infty} (1 + 1/n)^n",
    "union": "\\bigcup_{k=1}^{99999999} \\{k\\}",
    "brackets": "(" * 10_000 + "7" + ")" * 10_000,
    "square brackets": "[" * 30 + "7" + "]" * 30,
    "braces": "{" * 30 + "7" + "}" * 30,
    "set in a set": "\\{" * 30 + "7" + "\\}" * 30,
    "unbalanced brackets": ")" * 40 + "(" * 40 + "7",
    "opened only": "(" * 5_000 + "7",
    "fractions": "\\frac{1}{1+" * 30 + "7" + "}" * 30,
    "sines": "\\sin(" * 30 + "x" + ")" * 30,
    "sines without brackets": "\\sin" * 60 + " x",
    "roots": "\\sqrt{" * 30 + "7" + "}" * 30,
    "roots without braces": "\\sqrt" * 60 + " 7",
    "indices": "x_{" * 30 + "7" + "}" * 30,
    "signs": "-" * 300 + "7",
    "digits": "7" * 5_000,
    "decimals": "0." + "7" * 5_000,
    "terms": "+".join(f"x_{{{i}}}" for i in range(200)),
    "matrix": "\\begin{pmatrix}" + "\\\\".join("&".join("7" * 100) for _ in range(100)) + "\\end{pmatrix}",
    "small matrix of many cells": "\\begin{pmatrix}" + "&".join("7" * 90) + "\\end{pmatrix}",
    "list": ", ".join(map(str, range(3_000))),
    "megabyte of a letter": "x" * 1_000_000,
    "megabyte of a sum": "1+" * 500_000 + "1",
    "NUL": "7\x00",
    "escape": "7\x1b[2J",
    "lone surrogate": "7\ud800",
    "file read": "\\input{/etc/passwd} + 6",
    "file written": "\\write18{rm} + 6",
    "macro": "\\def\\x{\\x\\x}\\x + 6",
    "loop": "\\loop 6 \\repeat",
}
# Passed on, or read as prose, a list or no answer at all.
LET_THROUGH = {
    "box never closed": "\\boxed{" * 3_000 + "7",
    "boxes in boxes": "\\boxed{" * 3_000 + "6" + "}" * 3_000,
    "many boxes": "\\boxed{6}" * 30_000,
    "fraction never closed": "\\frac{7",
    "environment never closed": "\\begin{pmatrix} 7",
    "megabyte of spaces": " " * 1_000_000,
    "megabyte of new lines": "\n" * 1_000_000,
    "megabyte of dollars": "$" * 1_000_000,
    "megabyte of backslashes": "\\" * 1_000_000,
    "megabyte of points": "." * 1_000_000,
    "megabyte of braces": "{" * 1_000_000,
    "opened answers": "<answer>" * 125_000,
    "closed answers": "</answer>" * 100_000 + "6",
    "opened thoughts": "<think>" * 100_000 + "7",
    "answers": "The answer is 6 or " * 50_000,
    "prices": "$6 and " * 100_000,
    "numbers in prose": "so 7 is 6 " * 100_000,
    "joining words": "or and maybe " * 80_000,
    "commas": "7," * 400 + "6",
    "lone brackets in prose": "so ( and [ and ( are " * 40_000,
    "amounts": "7 m " * 200_000,
    "rates": "6 m" + " per m" * 200_000,
    "denials": "not 7 never " * 80_000,
    "magnitudes": "7 million " * 80_000,
    "exponents": "7e7" * 200_000,
    "magnitude of magnitudes": "7" + " million" * 2_000,
    "superscripts": "7" + "⁷" * 3_000,
    "plus and minus": "\\pm 7," * 60 + "6",
    "letters": "A " * 200_000,
    "every digit": "0123456789",
    "every number": " ".join(map(str, range(100))),
    "full-width tower": "９^{９^{９}}",
    "Arabic digits": "٦",
    "right to left": "\u202e6",
    "combining marks": "7" + "\u0301" * 300,
    "emoji": "😀" * 300,
    "code": "__import__('os').system('sleep 9')",
    "division by zero": "\\frac{7}{0}",
    "zero to a negative": "0^{-1}",
    "not a number": "\\text{nan}",
    "equals itself": "x = x",
    "any number": "x \\in \\mathbb{R}",
    "all of a range": "[0, 10]",
    "bars": "|" * 15 + "x" + "|" * 15,
    "imaginary tower": "i^{i^{i^{i}}}",
    "symbols' tower": "x^{x^{x^{x}}}",
    "periodic function": "\\sin(10^{50})",
}


@pytest.fixture(scope="module", autouse=True)
def warm():
    """The parser builds its tables when it is first used."""
    assert accuracy("$\\frac{1}{2} + (x)^2$", {"answer": "0"}) == 0.0


@pytest.mark.parametrize("name", REFUSED)
def test_refused_without_being_evaluated(name):
    started = time.perf_counter()
    assert too_hard(REFUSED[name])
    assert accuracy(f"<answer>{REFUSED[name]}</answer>", {"answer": "7"}) == 0.0
    assert time.perf_counter() - started < 0.5


@pytest.mark.parametrize("name", LET_THROUGH)
def test_not_paid_and_not_slow(name):
    for completion in (f"<answer>{LET_THROUGH[name]}</answer>", LET_THROUGH[name]):
        started = time.perf_counter()
        assert accuracy(completion, {"answer": "7"}) == 0.0
        assert time.perf_counter() - started < 1.5


@pytest.mark.parametrize(
    "formula",
    [
        "2^{100}", "10^{12}", "20!", "\\binom{20}{10}", "3^{2^3}", "2^{2023}", "1000!", "(x+1)^{10}", "x^{2023}",
        "(n+1)!", "6.02 \\times 10^{23}", "(1+\\frac{0.05}{12})^{120}", "\\binom{n}{k}", "i^{2023}", "-(-(-1))",
        "1, 2, 3, 4, 5, 6", "\\frac{\\sqrt{3}+\\sqrt{5}}{\\sqrt{7}-\\sqrt{11}}", "\\sqrt{2+\\sqrt{2+\\sqrt{2}}}",
        "\\sin(\\cos(\\frac{\\pi}{3}))", "\\begin{pmatrix}1&2&3\\\\4&5&6\\\\7&8&9\\end{pmatrix}",
        "12345678901234567890123456789", "2^{-10}", "10^{100} \\bmod 7", "x^4 - 12 x^3 + 54 x^2 - 108 x + 81",
        "\\left(\\frac{1}{2}, \\frac{3}{4}\\right)",
    ],
)  # fmt: skip
def test_honest_answers_are_evaluated(formula):
    assert not too_hard(formula)


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "file read" and len(REFUSED[name]) < 400])
def test_a_refused_answer_is_right_where_it_is_the_gold_answer(name):
    said = REFUSED[name]
    assert accuracy(f"<answer>${said}$</answer>", {"answer": said}) == 1.0


def test_a_gold_answer_beyond_the_bounds_is_compared_as_text():
    for said, score in (
        ("2023!", 1.0),
        ("$2023!$", 1.0),
        ("2023 \\cdot 2022!", 0.0),
        ("7", 0.0),
        ("9^{9^{9^9}}", 0.0),
    ):
        assert accuracy(said, {"answer": "2023!"}) == score
