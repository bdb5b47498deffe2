"""Rows that no completion can be scored on, for want of a readable gold answer or of tests: found before the start."""

import logging
from typing import TYPE_CHECKING

from ..config.rewards import Reward
from ..errors import UserError
from .code.sandbox import require_sandbox
from .pool import Pool

if TYPE_CHECKING:  # nothing for a pool's workers to import
    from datasets import Dataset

logger = logging.getLogger(__name__)

LOOKED_AT = 2000
"""Of more rows, so many are looked at, spread over all; all others, too, if none of them can be scored."""
GRADED = ("cosine", "length")
"""Rewards whose rows hold the completion's `accuracy`."""
COLUMNS = {"accuracy": ["answer", "entry"], "task": ["entry"], "code": ["tests", "language"]}
"""Verifier -> what it reads of a row."""
LACKING = {
    "accuracy": ("no gold answer parses", "`answer` or `answer_format`"),
    "task": ("no row is of a task", "`path: reasoning_gym`"),
    "code": ("no row has tests that can be run", "`tests` and `language`"),
}


def verifier_of(row: dict) -> str:
    """What says whether an answer to `row` is right: `code` where it has tests, else `accuracy`."""
    return "accuracy" if row["tests"] is None else "code"


def check_answers(rows: "Dataset", pool: Pool, field: str) -> float:
    """`check_golds` of `rows`, each by its `verifier_of`; the largest share that one of them cannot score.

    Raises `UserError` where `code` has no sandbox, too.
    """
    tests, most = rows["tests"], 0.0
    for verifier, places in (
        ("accuracy", [place for place, given in enumerate(tests) if given is None]),
        ("code", [place for place, given in enumerate(tests) if given is not None]),
    ):
        if not places:
            continue
        if verifier == "code":
            require_sandbox()
        share = check_golds(verifier, rows if len(places) == len(rows) else rows.select(places), pool, field)
        most = max(most, share)
    return most


def check_golds(verifier: str, rows: "Dataset", pool: Pool, field: str = "data.sources") -> float:
    """The share of `rows`, or of `LOOKED_AT` of them, that `verifier` cannot score; logged, too.

    Raises `UserError`, which names `field`, if it can score none.
    """
    parts = -(-len(rows) // LOOKED_AT)
    columns = rows.select_columns(COLUMNS[verifier])
    looked_at, unscorable = 0, 0
    for part in range(parts):
        asked = list(columns.select(range(part, len(rows), parts)))
        scores = pool.scores(verifier, [""] * len(asked), asked)
        looked_at, unscorable = looked_at + len(asked), unscorable + scores.count(None)
        if unscorable < looked_at:
            break
    else:
        what, mend = LACKING[verifier]
        raise UserError(f"{field}: {what}; set {mend} of the source.")
    if unscorable:
        sample = "" if looked_at == len(rows) else f" that were looked at, of {len(rows)},"
        logger.warning("%d of %d rows%s cannot be scored by `%s`", unscorable, looked_at, sample, verifier)
    return unscorable / looked_at


def check_golds_of(rewards: dict[str, Reward], rows: "Dataset", pool: Pool) -> None:
    """`check_golds` of what each reward verifies, on the rows of its kinds. Raises `UserError` if there are none."""
    kinds = rows["kind"]
    meant: dict[str, set[int]] = {}  # verifier -> places in `rows`
    for name, reward in rewards.items():
        verifier = "accuracy" if name in GRADED else name
        if verifier not in COLUMNS:
            continue
        places = {place for place, kind in enumerate(kinds) if reward.kinds is None or kind in reward.kinds}
        if not places:
            there = ", ".join(sorted(set(kinds)))
            raise UserError(f"rewards.{name}.kinds: no row is of kind {', '.join(reward.kinds)}; there are {there}.")
        meant[verifier] = meant.get(verifier, set()) | places
    for verifier, places in meant.items():
        check_golds(verifier, rows.select(sorted(places)), pool)
