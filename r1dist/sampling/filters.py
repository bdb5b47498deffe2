"""Rewrites, scores and filters samples."""

import re
from dataclasses import dataclass

from ..config import Filters, Refine
from ..rewards.format import has_format
from ..rewards.language import language_share
from ..rewards.math.accuracy import final_answer
from ..rewards.repetition import repetition_share
from ..rewards.thinking import CLOSE, OPEN, after_thinking, thinking_of

NGRAM = 8


@dataclass(frozen=True)
class Sample:
    """One completion, as drawn."""

    text: str
    """The prefilled beginning included."""
    tokens: int
    finished: bool
    accuracy: float | None
    """None where the gold answer does not parse."""


def refine(text: str, how: Refine) -> str:
    """The reasoning without its filler, then the answer, each inside its tags.

    A text without both parts is returned as it is. The final answer stays what it was.
    """
    if text.count(CLOSE) != 1 or text.count(OPEN) > 1 or "<answer>" not in after_thinking(text):
        return text
    reasoning = thinking_of(text)
    for pattern in how.filler:
        reasoning = re.sub(pattern, "", reasoning)
    return f"<think>{reasoning.strip()}</think>\n<answer>{final_answer(text).strip()}</answer>"


def scores(sample: Sample, text: str, filters: Filters) -> dict[str, float | None]:
    """The scores of a sample; `text` is the rewritten one."""
    return {
        "accuracy": sample.accuracy,
        "format": float(has_format(text)),
        "language": None if filters.language is None else _language_share(text, filters.language),
        "repetition": repetition_share(text, NGRAM),
    }


def _language_share(text: str, target: str) -> float | None:
    """The smaller share of words in `target`: in the thinking, or in the whole text. None without a word."""
    shares = [language_share(part, target) for part in (thinking_of(text), text)]
    return min((share for share in shares if share is not None), default=None)


def fault(sample: Sample, text: str, scored: dict[str, float | None], filters: Filters) -> str | None:
    """The first filter that rejects a sample, None if none does.

    A text without a single word is in no wrong language. An answer that cannot be checked is `unverifiable`
    where correctness is asked for.
    """
    longest = max((len(paragraph) for paragraph in re.split(r"\n\s*\n", text)), default=0)
    share = scored["language"]
    faults = {
        "unverifiable": filters.correct and sample.accuracy is None,
        "wrong answer": filters.correct and sample.accuracy is not None and sample.accuracy < 1,
        "cut off": filters.finished and not sample.finished,
        "format": filters.format and not scored["format"],
        "language": share is not None and share < filters.min_language_share,
        "too short": filters.min_tokens is not None and sample.tokens < filters.min_tokens,
        "too long": filters.max_tokens is not None and sample.tokens > filters.max_tokens,
        "long paragraph": filters.max_paragraph is not None and longest > filters.max_paragraph,
        "repetition": filters.max_repetition is not None and scored["repetition"] > filters.max_repetition,
        "code block": not filters.code_blocks and "```" in text,
    }
    return next((name for name, present in faults.items() if present), None)
