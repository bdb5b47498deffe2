"""Reward functions by name, as the YAML selects them.

A score is None where a row has none: its gold answer does not parse, it is of another kind, or the completion
holds nothing to measure. TRL leaves such a score out of the row's sum.
"""

import functools
from collections.abc import Callable

from ..config import Reward
from ..errors import UserError
from .accuracy import accuracy
from .format import format_reward
from .language import language_share
from .pool import Pool

Scorer = Callable[[list[str], list[dict]], list[float | None]]
"""Completions' texts and their rows -> scores."""

PLAIN: dict[str, Callable[[str, dict], float | None]] = {"format": format_reward}
# What an answer can make slow, or worse: only ever called in a pool's workers.
VERIFIERS: dict[str, Callable[[str, dict], float | None]] = {"accuracy": accuracy}
MODELS = ("helpfulness", "safety")
NAMES = sorted([*PLAIN, *VERIFIERS, *MODELS, "language"])


class Rewards:
    """The rewards of a run.

    Args:
        rewards: As the YAML names them.
        pool: Where answers are verified; it must know `VERIFIERS`.

    Raises `UserError` for a name that is not there, or a `model` that is missing or means nothing. Reward models are
    loaded.
    """

    def __init__(self, rewards: dict[str, Reward], pool: Pool):
        for name, reward in rewards.items():
            if name not in NAMES:
                raise UserError(f"rewards: `{name}` is not a reward; there are {', '.join(NAMES)}.")
            if (name in MODELS) != (reward.model is not None):
                said = "needs `model`, a reward model's folder" if name in MODELS else "takes no `model`"
                raise UserError(f"rewards.{name}: it {said}.")
        self.rewards = rewards
        self.pool = pool
        self.scorers = {
            name: _for_kinds(_scorer(name, reward, pool), reward.kinds) for name, reward in rewards.items()
        }

    def begin(self, step: int, text: str, row: dict) -> None:
        """Let verification start on a completion, before the scorers are asked for its batch."""
        for name in VERIFIERS.keys() & self.rewards.keys():
            reward = self.rewards[name]
            if step >= reward.from_step and (reward.kinds is None or row["kind"] in reward.kinds):
                self.pool.begin(name, text, row)


def _scorer(name: str, reward: Reward, pool: Pool) -> Scorer:
    if name in MODELS:
        from .model import ModelReward  # torch and transformers are nothing for a pool's workers to import

        return ModelReward(name, reward.model)
    if name in VERIFIERS:
        return functools.partial(pool.scores, name)
    one = PLAIN.get(name, lambda text, row: language_share(text, reward.target))
    return lambda texts, rows: [one(text, row) for text, row in zip(texts, rows, strict=True)]


def _for_kinds(scorer: Scorer, kinds: list[str] | None) -> Scorer:
    if kinds is None:
        return scorer

    def scores(texts: list[str], rows: list[dict]) -> list[float | None]:
        meant = [place for place, row in enumerate(rows) if row["kind"] in kinds]
        scored = scorer([texts[i] for i in meant], [rows[i] for i in meant]) if meant else []
        by_place = dict(zip(meant, scored, strict=True))
        return [by_place.get(place) for place in range(len(rows))]

    return scores
