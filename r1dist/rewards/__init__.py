"""Reward functions by name, as the YAML selects them.

A score is None where a row has none: its gold answer does not parse, it is of another kind, or the completion
holds nothing to measure. TRL leaves such a score out of the row's sum.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Source
from ..config.gym import has_tasks
from ..config.rewards import Reward
from ..errors import VerifiersBroken
from ..files import JUDGEMENTS
from .calls import CallScorer, check_columns
from .code.sandbox import require_sandbox
from .golds import GRADED, check_golds_of
from .judge import JudgeScorer
from .own import is_own
from .pool import Pool
from .registry import JUDGE, MODELS, ONE_BY_ONE, VERIFIERS, asks_server, judge_of, own_reward, parameters, settle

if TYPE_CHECKING:  # nothing for a pool's workers to import
    from datasets import Dataset

Scorer = Callable[[list[str], list[dict]], list[float | None]]
"""Completions' texts and their rows -> scores. A row holds the dataset's columns, `tokens` (the length of its
completion), `group_tokens` (those of all completions of its prompt) and `VERIFIED`."""

THINKING = {"format", "language", "soft_format"}
"""Rewards that pay nothing where nothing is thought."""
VERIFIED = "verified"
"""Column of `score`'s rows: verifier -> score."""


def verifiers_of(rewards: Iterable[str], sources: Iterable[Source]) -> dict[str, Callable[..., float | None]]:
    """The verifiers that these rewards and rows need of a pool, and `accuracy`, by which gold answers are checked."""
    sources = list(sources)
    needed = {"accuracy", *rewards, *("task" for source in sources if has_tasks(source))}
    needed |= {"code" for source in sources if source.tests is not None}
    return {name: function for name, function in VERIFIERS.items() if name in needed}


class Rewards:
    """The rewards of a run.

    Args:
        rewards: As the YAML names them.
        pool: Where `VERIFIERS` and the user's functions run; it must know them.
        dataset: The run's rows. None: they are not checked.
        dtype: Of reward models: what the trainer computes in.

    A function of the user's goes by its own name, without its module or file. Reward models are loaded. Raises
    `UserError` for what `settle` refuses, for rows of which none can be scored or which lack a column that a function
    takes, for a `model` that is none, and for `code` where no sandbox is installed; `VerifiersBroken` where the
    machine does not let it run.
    """

    def __init__(
        self, rewards: dict[str, Reward], pool: Pool, dataset: "Dataset | None" = None, dtype: str = "float32"
    ):
        settle(rewards)
        self.own = {own_reward(key).name: own_reward(key) for key in rewards if is_own(key)}
        self.judges = {name: judge_of(name, rewards[name]) for name in filter(JUDGE.fullmatch, rewards)}
        called = {name for name, reward in rewards.items() if asks_server(name, reward)}
        rewards = {own_reward(key).name if is_own(key) else key: reward for key, reward in rewards.items()}
        if dataset is not None:
            check_golds_of(rewards, dataset, pool)
            for name, function in (self.own | self.judges).items():
                check_columns(function, rewards[name], dataset)
        if "code" in rewards:
            require_sandbox()
        self.rewards = rewards
        self.pool = pool
        self.called = self.own.keys() | called
        """Rewards that are called for a whole generation, and waited for."""
        self._pending: dict[tuple[tuple, str], Future] = {}
        self.scorers = {
            name: _for_kinds(
                self._caller(name, dtype) if name in self.called else _scorer(name, reward, pool, dtype), reward
            )
            for name, reward in rewards.items()
        }

    def remember_in(self, folder: Path, rank: int) -> None:
        """Keep what judges say in a run's folder, and take up what is there. Every rank calls it before one scores."""
        for name, judge in self.judges.items():
            judge.judgements.open(folder / JUDGEMENTS, name, rank)

    def begin(self, rollout_id: tuple, step: int, text: str, row: dict) -> None:
        """Let the verification of a completion start, before `score` asks for it."""
        for verifier in self._due(step, row):
            self._pending[rollout_id, verifier] = self._submit(verifier, text, row)

    def wait(self, rollout_ids: Sequence[tuple], heartbeat: Callable[[], None]) -> str | None:
        """Wait for these rollouts' verification, with a heartbeat for each that ends.

        Returns why, if verification does not work.
        """
        wanted = set(rollout_ids)
        futures = [future for (rollout_id, _), future in self._pending.items() if rollout_id in wanted]
        for future in as_completed(futures):
            heartbeat()
            if isinstance(future.exception(), VerifiersBroken):
                return str(future.exception())
        return None

    def score(
        self, rollout_ids: Sequence[tuple], step: int, texts: list[str], rows: list[dict],
        heartbeat: Callable[[], None] = lambda: None,
    ) -> dict[str, list[float | None]]:  # fmt: skip
        """Reward name -> the rollouts' scores. Each completion is verified once, however many rewards use that.

        Args:
            rollout_ids: Names of the rollouts, as `begin` was given them.
            step: The optimizer step; rewards with a later `from_step` score nothing.
            rows: The dataset's rows with `tokens`, `group_tokens` and, for functions of the user's, `completion_ids`.
            heartbeat: Called for each call of these functions, and of a server, that ends.

        Raises what the verifiers raised, `RewardFailed`, and `VerifiersBroken` where a server is down.
        """
        due = [name for name, reward in self.rewards.items() if step >= reward.from_step]
        scores = {name: self.scorers[name](texts, rows, heartbeat) for name in due if name in self.called}
        rows = [
            {**row, VERIFIED: {verifier: self._result(rollout_id, verifier, text, row)
                               for verifier in self._due(step, row)}}
            for rollout_id, text, row in zip(rollout_ids, texts, rows, strict=True)
        ]  # fmt: skip
        scores |= {name: self.scorers[name](texts, rows) for name in due if name not in self.called}
        return {name: scores.get(name, [None] * len(rows)) for name in self.rewards}

    def _caller(self, name: str, dtype: str) -> Callable:
        reward = self.rewards[name]
        if name in self.own:
            return CallScorer(self.own[name], reward, parameters(self.own[name].key, reward), self.pool)
        reward_in_trainer = dataclasses.replace(reward, isolated=False)
        if name in self.judges:
            return JudgeScorer(self.judges[name], reward_in_trainer, self.pool)
        return CallScorer(MODELS[name](name, dtype, **parameters(name, reward)), reward_in_trainer, {}, self.pool)

    def _result(self, rollout_id: tuple, verifier: str, text: str, row: dict) -> float | None:
        future = self._pending.pop((rollout_id, verifier), None) or self._submit(verifier, text, row)
        return future.result()

    def _submit(self, verifier: str, text: str, row: dict) -> Future:
        # `accuracy` is also asked for rewards that are graded by it.
        given = parameters(verifier, self.rewards[verifier]) if verifier in self.rewards else {}
        return self.pool.submit(verifier, text, row, **given)

    def _due(self, step: int, row: dict) -> set[str]:
        """The verifiers that the row's rewards ask at `step`."""
        due = {
            name
            for name, reward in self.rewards.items()
            if step >= reward.from_step and (reward.kinds is None or row["kind"] in reward.kinds)
        }
        return {"accuracy" if name in GRADED else name for name in due} & VERIFIERS.keys()


def _scorer(name: str, reward: Reward, pool: Pool, dtype: str) -> Scorer:
    if name in VERIFIERS:
        return functools.partial(_verified, name, pool, **parameters(name, reward))
    if name in MODELS:
        return MODELS[name](name, dtype, **parameters(name, reward))
    score_one = functools.partial(ONE_BY_ONE[name], **parameters(name, reward))

    def scores(texts: list[str], rows: list[dict]) -> list[float | None]:
        if name in GRADED:
            accuracies = _verified("accuracy", pool, texts, rows)
            rows = [{**row, "accuracy": score} for row, score in zip(rows, accuracies, strict=True)]
        return [score_one(text, row) for text, row in zip(texts, rows, strict=True)]

    return scores


def _verified(name: str, pool: Pool, texts: list[str], rows: list[dict], **given: Any) -> list[float | None]:
    if rows and VERIFIED in rows[0]:
        return [row[VERIFIED][name] for row in rows]
    return pool.scores(name, texts, rows, **given)


def _for_kinds(scorer: Scorer, reward: Reward) -> Callable:
    kinds = reward.kinds
    if kinds is None:
        return scorer

    def scores(texts: list[str], rows: list[dict], *heartbeat: Callable[[], None]) -> list[float | None]:
        meant = [place for place, row in enumerate(rows) if row["kind"] in kinds]
        scored = scorer([texts[i] for i in meant], [rows[i] for i in meant], *heartbeat) if meant else []
        by_place = dict(zip(meant, scored, strict=True))
        return [by_place.get(place) for place in range(len(rows))]

    return scores
