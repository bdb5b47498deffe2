"""Reward functions by name, as the YAML selects them.

A score is None where a row has none: its gold answer does not parse, it is of another kind, or the completion
holds nothing to measure. TRL leaves such a score out of the row's sum.
"""

import functools
from collections.abc import Callable

from ..reward_fields import Reward, check_rewards, parameters
from .accuracy import accuracy
from .format import format_reward, soft_format, tag_count
from .language import language
from .length import cosine, length, overlong
from .model import ModelReward
from .repetition import repetition
from .steps import reasoning_steps

Scorer = Callable[[list[str], list[dict]], list[float | None]]
"""Completions' texts and their rows -> scores. Beside the dataset's columns a row holds `tokens`, the length of
its completion, and `group_tokens`, those of all completions of its prompt."""

ONE_BY_ONE: dict[str, Callable[..., float | None]] = {
    "accuracy": accuracy,
    "cosine": cosine,
    "format": format_reward,
    "language": language,
    "length": length,
    "overlong": overlong,
    "reasoning_steps": reasoning_steps,
    "repetition": repetition,
    "soft_format": soft_format,
    "tag_count": tag_count,
}
"""Rewards of a completion and its row, called with the parameters that the YAML gives."""


def select(rewards: dict[str, Reward]) -> dict[str, Scorer]:
    """The scorers of `rewards`, in their order; reward models are loaded.

    Raises `UserError` for what `check_rewards` refuses, and for a `model` that is none.
    """
    check_rewards(rewards)
    return {name: _for_kinds(_scorer(name, reward), reward.kinds) for name, reward in rewards.items()}


def _scorer(name: str, reward: Reward) -> Scorer:
    if name not in ONE_BY_ONE:
        return ModelReward(name, reward.model)
    one = functools.partial(ONE_BY_ONE[name], **parameters(name, reward))
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
