"""Is the final answer right? Checked by math-verify, never by a model."""

import re

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

EXTRACTION = (LatexExtractionConfig(), ExprExtractionConfig())
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
COMMAND = re.compile(r"\\(?:text|mathrm|textbf)\{[^}]*\}|\\[A-Za-z]+")
PROSE = re.compile(r"[^\W\d_]{3,}")
# math-verify's clocks are signals; a second is far beyond what an honest answer takes.
SECONDS = 1


def final_answer(completion: str) -> str:
    """The part of a completion that is graded.

    What follows the last `</think>` (thinking is never graded), and of that the inside of the last
    `<answer>` element if there is one.
    """
    tail = completion.rpartition("</think>")[2]
    elements = ANSWER.findall(tail)
    return elements[-1] if elements else tail


def accuracy(completion: str, row: dict) -> float | None:
    """1 if the final answer equals the row's `answer` mathematically, else 0; None if there is no gold that parses.

    Range {0, 1}. Source: DeepSeek-R1 (arXiv 2501.12948), section 2.2.2, "accuracy rewards".
    """
    gold = row["answer"] and _parse(_as_latex(row["answer"]))
    if not gold:
        return None
    return float(verify(gold, _parse(final_answer(completion)), timeout_seconds=SECONDS))


def _as_latex(answer: str) -> str:
    """Mark a bare formula as LaTeX. Prose is left alone: as LaTeX, it would parse as a product of letters."""
    marked = "$" in answer or "\\boxed" in answer
    return answer if marked or PROSE.search(COMMAND.sub("", answer)) else f"${answer}$"


def _parse(text: str) -> list:
    return parse(text, extraction_config=EXTRACTION, parsing_timeout=SECONDS)
