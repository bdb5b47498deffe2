"""Gold answers that cannot be scored are found before anything is generated."""

import logging
from collections import Counter
from collections.abc import Sequence

from ..config.rewards import Reward
from ..errors import UserError
from .pool import Pool

logger = logging.getLogger(__name__)

LOOKED_AT = 1000
"""Of more different answers, so many are looked at, spread over the rows; of all, if none of those can be scored."""
BY_ANSWER = ("accuracy", "cosine", "length")


def check_golds(answers: Sequence[str | list[str] | None], pool: Pool, field: str = "data.sources") -> None:
    """Raises `UserError`, which names `field`, if none of the gold `answers` can be scored; logs how many cannot."""
    rows = Counter(tuple(answer) if isinstance(answer, list) else answer for answer in answers)
    different = list(rows)
    parts = -(-len(different) // LOOKED_AT)
    seen, unscorable = 0, 0
    for part in range(parts):
        asked = different[part::parts]
        scores = pool.scores("accuracy", [""] * len(asked), [{"answer": _as_column(answer)} for answer in asked])
        seen += sum(rows[answer] for answer in asked)
        unscorable += sum(rows[answer] for answer, score in zip(asked, scores, strict=True) if score is None)
        if unscorable < seen:
            break
    else:
        raise UserError(f"{field}: no gold answer parses; set `answer` or `answer_format` of the source.")
    if unscorable:
        logger.warning("%d of %d gold answers do not parse; no answer to them is scored", unscorable, seen)


def check_golds_of(rewards: dict[str, Reward], kinds: Sequence[str], answers: Sequence, pool: Pool) -> None:
    """`check_golds` of the rows, of which `kinds` and `answers` are columns, that a reward of right answers is for.

    Raises `UserError` also if it is for none of them.
    """
    meant: set[int] = set()
    for name in rewards.keys() & set(BY_ANSWER):
        wanted = rewards[name].kinds
        places = [place for place, kind in enumerate(kinds) if wanted is None or kind in wanted]
        if not places:
            there = ", ".join(sorted(set(kinds)))
            raise UserError(f"rewards.{name}.kinds: no row is of kind {', '.join(wanted)}; there are {there}.")
        meant.update(places)
    if meant:
        check_golds([answers[place] for place in sorted(meant)], pool)


def _as_column(answer: str | tuple[str, ...] | None) -> str | list[str] | None:
    return list(answer) if isinstance(answer, tuple) else answer
