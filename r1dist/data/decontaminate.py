"""Training rows that share words with test problems are found and dropped.

The rule is that of GPT-3 (arXiv 2005.14165, appendix C), 13 words in a row, and for shorter test problems that of
DeepSeekMath (arXiv 2402.03300, section 2.1): the whole problem, from 3 words on.
"""

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset

from ..config import Decontaminate, Source
from ..config.data import SHORTEST
from ..errors import UserError
from .reading import READERS
from .sources import load_questions

logger = logging.getLogger(__name__)

UNSPACED = (  # Han and kana, without their marks
    r"\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff"
    r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
WORD = re.compile(rf"[{UNSPACED}]|\d+|[^\W\d_{UNSPACED}]+")
SHOWN = 5
"""Dropped rows that the log quotes."""
QUOTED = 80
"""Characters of each."""


class Shared(NamedTuple):
    """What a text has in common with a test problem."""

    problem: int
    """The number of the test problem, the first one with these words."""
    words: str
    """The words, with spaces between them."""


class ProblemIndex:
    """Problems by the runs of words that no text may share with them: `length` words, or a whole shorter problem."""

    def __init__(self, problems: Iterable[str], length: int):
        self.without_words = 0
        """Problems of signs alone, which are never found."""
        self._runs: dict[str, int] = {}
        """Run -> the number of the first problem that has it."""
        self._lengths: dict[tuple[str, ...], tuple[int, ...]] = {}
        """First three words -> lengths of the runs that begin so, of which most places of a text have none."""
        for number, problem in enumerate(problems):
            found = words(problem)
            self.without_words += not found
            size = min(length, len(found))
            for begin in range(len(found) - size + 1 if found else 0):
                run = found[begin : begin + size]
                self._runs.setdefault(" ".join(run), number)
                known = self._lengths.get(start := tuple(run[:SHORTEST]), ())
                if size not in known:
                    self._lengths[start] = (*known, size)

    def shared(self, text: str) -> Shared | None:
        """The first run that `text` shares, or None. A problem of one or two words is only found as the whole text."""
        found = words(text)
        if len(found) < SHORTEST:
            return self._look_up(found)
        for begin, start in enumerate(zip(*(found[n:] for n in range(SHORTEST)), strict=False)):
            for size in self._lengths.get(start, ()):
                if (shared := self._look_up(found[begin : begin + size])) is not None:
                    return shared
        return None

    def _look_up(self, run: list[str]) -> Shared | None:
        joined = " ".join(run)
        return None if (number := self._runs.get(joined)) is None else Shared(number, joined)


def words(text: str) -> list[str]:
    """Runs of letters and runs of digits, after NFKC, without case; each character of Chinese and Japanese is one.

    Signs are none, so that LaTeX leaves the names of its commands, variables and numbers.
    """
    return WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def decontaminate(parts: list[Dataset], settings: Decontaminate) -> tuple[list[Dataset], list[dict]]:
    """The rows of which no question shares words with a test problem, and what is known of the others.

    Args:
        parts: Rows of each source, as `load_problems` or `load_conversations` gives them.

    Returns the rows of each that are left, and for each dropped one a dictionary: `source` and `problem`, the
    question; `test_source` and `test_problem`; `shared`, the words in common. Raises `UserError` if no row is left.
    """
    tests = [(_name(source), problem) for source in settings.against for problem in _questions(source)]
    index = ProblemIndex((problem for _, problem in tests), settings.ngram)
    if index.without_words:
        logger.warning(
            "data.decontaminate: %d of %d test problems have no words and are not looked for",
            index.without_words, len(tests),
        )  # fmt: skip
    left, dropped = [], []
    for rows in parts:
        clean, found = _compared(rows, index, tests)
        left.append(clean)
        dropped += found
    total = sum(map(len, parts))
    if not dropped:
        logger.info("data.decontaminate: no row of %d shares words with a test problem", total)
        return parts, dropped
    _log(dropped, total)
    if not any(map(len, left)):
        raise UserError(
            f"data.decontaminate: all of the {total} rows share words with problems of `against`.\n"
            "Name training rows in `data.sources`, or raise `ngram`."
        )
    return left, dropped


def questions(row: dict) -> list[str]:
    """What the user says in a row of `load_problems` or `load_conversations`."""
    if "messages" in row:
        return [turn["content"] for turn in row["messages"] if turn["role"] == "user"]
    return [*(exchange["question"] for exchange in row["earlier"]), row["problem"]]


def _compared(rows: Dataset, index: ProblemIndex, tests: list[tuple[str, str]]) -> tuple[Dataset, list[dict]]:
    """`decontaminate` of one source's rows; `tests` are the (source, problem) in `index`."""
    left, dropped = [], []
    columns = [name for name in ("problem", "earlier", "messages", "source") if name in rows.features]
    for place, row in enumerate(rows.select_columns(columns)):  # completions are long, and not read
        found = next(((text, shared) for text in questions(row) if (shared := index.shared(text))), None)
        if found is None:
            left.append(place)
            continue
        problem, shared = found
        test_source, test_problem = tests[shared.problem]
        dropped.append({"source": row["source"], "problem": problem, "test_source": test_source,
                        "test_problem": test_problem, "shared": shared.words})  # fmt: skip
    return rows.select(left) if dropped else rows, dropped


def _questions(source: Source) -> list[str]:
    try:
        return load_questions(source)
    except UserError as error:
        raise UserError(f"data.decontaminate.against: {str(error).removeprefix('data.sources: ')}") from error


def _name(source: Source) -> str:
    """How lists call a source of tests; a file has no split."""
    is_file = Path(source.path).suffix in READERS
    return source.path if is_file else " ".join(filter(None, (source.path, source.subset, source.split)))


def _log(dropped: list[dict], rows: int) -> None:
    counts = Counter((row["source"], row["test_source"]) for row in dropped)
    counted = ", ".join(f"{count} of {ours} with {theirs}" for (ours, theirs), count in counts.most_common())
    logger.warning(
        "data.decontaminate: dropped %d of %d rows, which share words with test problems: %s",
        len(dropped), rows, counted,
    )  # fmt: skip
    for row in dropped[:SHOWN]:
        logger.info("dropped because of %s: %s", row["test_source"], " ".join(row["problem"].split())[:QUOTED])
