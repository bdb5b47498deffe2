"""Reward functions by name, as the YAML selects them.

A score is None where a row has none: its gold answer does not parse, it is of another kind, or the completion
holds nothing to measure. TRL leaves such a score out of the row's sum.
"""

import functools
from collections.abc import Callable

from ..reward_fields import Reward, check_rewards, parameters
from .accuracy import accuracy
from .code import code, code_format
from .format import format_reward, soft_format, tag_count
from .language import language
from .length import cosine, length, overlong
from .pool import Pool
from .repetition import repetition
from .sandbox import require_sandbox
from .steps import reasoning_steps

Scorer = Callable[[list[str], list[dict]], list[float | None]]
"""Completions' texts and their rows -> scores. Beside the dataset's columns a row holds `tokens`, the length of
its completion, and `group_tokens`, those of all completions of its prompt. With `accuracy`, it was graded before."""

ONE_BY_ONE: dict[str, Callable[..., float | None]] = {
    "code_format": code_format,
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

VERIFIERS: dict[str, Callable[[str, dict], float | None]] = {"accuracy": accuracy, "code": code}
"""What an answer can make slow, or worse: only ever called in a pool's workers."""
GRADED = ("cosine", "length")
"""Rewards whose rows hold the completion's `accuracy`."""


class Rewards:
    """The rewards of a run.

    Args:
        rewards: As the YAML names them.
        pool: Where answers are verified; it must know `VERIFIERS`.

    Reward models are loaded. Raises `UserError` for what `check_rewards` refuses, for a `model` that is none, and for
    `code` where no sandbox is installed; `VerifiersBroken` where the machine does not let it run.
    """

    def __init__(self, rewards: dict[str, Reward], pool: Pool):
        check_rewards(rewards)
        if "code" in rewards:
            require_sandbox()
        self.rewards = rewards
        self.pool = pool
        self.scorers = {
            name: _for_kinds(_scorer(name, reward, pool), reward.kinds) for name, reward in rewards.items()
        }

    def begin(self, step: int, text: str, row: dict) -> None:
        """Let verification start on a completion, before the scorers are asked for its batch."""
        for verifier in self._due(step, row):
            self.pool.begin(verifier, text, row)

    def graded(self, step: int, texts: list[str], rows: list[dict]) -> list[dict]:
        """The rows with their completions' `accuracy`, None where no reward of the row asks for it.

        Each completion is graded once, however many rewards are made of it.
        """
        if not {"accuracy", *GRADED} & self.rewards.keys():
            return rows
        asked = [place for place, row in enumerate(rows) if "accuracy" in self._due(step, row)]
        scores = self.pool.scores("accuracy", [texts[i] for i in asked], [rows[i] for i in asked])
        by_place = dict(zip(asked, scores, strict=True))
        return [{**row, "accuracy": by_place.get(place)} for place, row in enumerate(rows)]

    def _due(self, step: int, row: dict) -> set[str]:
        """The verifiers that the row's rewards ask at `step`."""
        due = {
            name
            for name, reward in self.rewards.items()
            if step >= reward.from_step and (reward.kinds is None or row["kind"] in reward.kinds)
        }
        return {"accuracy" if name in GRADED else name for name in due} & VERIFIERS.keys()


def _scorer(name: str, reward: Reward, pool: Pool) -> Scorer:
    if name == "accuracy":
        return functools.partial(_accuracies, pool)
    if name in VERIFIERS:
        return functools.partial(pool.scores, name)
    if name not in ONE_BY_ONE:
        from .model import ModelReward  # torch and transformers are nothing for a pool's workers to import

        return ModelReward(name, reward.model)
    one = functools.partial(ONE_BY_ONE[name], **parameters(name, reward))

    def scores(texts: list[str], rows: list[dict]) -> list[float | None]:
        if name in GRADED:
            right = _accuracies(pool, texts, rows)
            rows = [{**row, "accuracy": score} for row, score in zip(rows, right, strict=True)]
        return [one(text, row) for text, row in zip(texts, rows, strict=True)]

    return scores


def _accuracies(pool: Pool, texts: list[str], rows: list[dict]) -> list[float | None]:
    if rows and "accuracy" in rows[0]:
        return [row["accuracy"] for row in rows]
    return pool.scores("accuracy", texts, rows)


def _for_kinds(scorer: Scorer, kinds: list[str] | None) -> Scorer:
    if kinds is None:
        return scorer

    def scores(texts: list[str], rows: list[dict]) -> list[float | None]:
        meant = [place for place, row in enumerate(rows) if row["kind"] in kinds]
        scored = scorer([texts[i] for i in meant], [rows[i] for i in meant]) if meant else []
        by_place = dict(zip(meant, scored, strict=True))
        return [by_place.get(place) for place in range(len(rows))]

    return scores
