"""Reward functions by name, as the YAML selects them.

A score is None where a row has none: its gold answer does not parse, it is of another kind, or the completion
holds nothing to measure. TRL leaves such a score out of the row's sum.
"""

from collections.abc import Callable

from ..config import Reward
from ..errors import UserError
from .accuracy import accuracy
from .format import format_reward
from .language import language_share
from .model import ModelReward

Scorer = Callable[[list[str], list[dict]], list[float | None]]
"""Completions' texts and their rows -> scores."""

PLAIN: dict[str, Callable[[str, dict], float | None]] = {"accuracy": accuracy, "format": format_reward}
MODELS = ("helpfulness", "safety")
NAMES = sorted([*PLAIN, *MODELS, "language"])


def select(rewards: dict[str, Reward]) -> dict[str, Scorer]:
    """The scorers of `rewards`, in their order; reward models are loaded.

    Raises `UserError` for a name that is not there, or a `model` that is missing or means nothing.
    """
    for name, reward in rewards.items():
        if name not in NAMES:
            raise UserError(f"rewards: `{name}` is not a reward; there are {', '.join(NAMES)}.")
        if (name in MODELS) != (reward.model is not None):
            said = "needs `model`, a reward model's folder" if name in MODELS else "takes no `model`"
            raise UserError(f"rewards.{name}: it {said}.")
    return {name: _for_kinds(_scorer(name, reward), reward.kinds) for name, reward in rewards.items()}


def _scorer(name: str, reward: Reward) -> Scorer:
    if name in MODELS:
        return ModelReward(name, reward.model)
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
