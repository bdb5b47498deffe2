"""Calls of the user's reward functions: a rank's rollouts divided among calls, and calls in the trainer's process."""

import asyncio
import json
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, as_completed
from typing import TYPE_CHECKING, Any

from ..config.rewards import Reward
from ..errors import RewardFailed, UserError
from .own import OwnReward
from .pool import BACK_OFF, Overran, Pool

if TYPE_CHECKING:  # nothing for a pool's workers to import
    from datasets import Dataset

logger = logging.getLogger(__name__)

OF_ROLLOUTS = {"tokens", "group_tokens", "completion_ids"}
"""What the rows have that functions are given, beside the dataset's columns."""
TO_BLAME = 4
"""Calls beyond their limits, and none within, after which it is the function's fault."""


class OwnScorer:
    """Scores by a function of the user's, in `pool` or, with `isolated: false`, in this process.

    A call is of one completion, or of those of one prompt. One beyond its limits leaves its completions unscored.
    Raises `RewardFailed` where a call fails, and after `TO_BLAME` calls beyond their limits.
    """

    def __init__(self, own: OwnReward, reward: Reward, parameters: dict[str, Any], pool: Pool):
        self.own = own
        self._beyond = 0  # calls beyond their limits since one was not
        submit = pool.call if reward.isolated else InTrainer(own, reward).call
        self._submit: Callable[[list[str], list[dict]], Future] = lambda *call: submit(own.name, *call, parameters)

    def __call__(
        self, texts: list[str], rows: list[dict], heartbeat: Callable[[], None] = lambda: None
    ) -> list[float | None]:
        rows = [whole_row(row) for row in rows]
        calls: dict[Any, list[int]] = {}
        for place, row in enumerate(rows):
            calls.setdefault(place if self.own.form == "completion" else row["prompt_id"], []).append(place)
        pending = {
            self._submit([texts[i] for i in places], [rows[i] for i in places]): places for places in calls.values()
        }
        scores: list[float | None] = [None] * len(rows)
        over = []
        for future in as_completed(pending):
            heartbeat()
            try:
                found = future.result()
            except Overran:
                over.append(rows[pending[future][0]].get("prompt_id"))
                continue
            for place, score in zip(pending[future], found, strict=True):
                scores[place] = score
        self._beyond = self._beyond + len(over) if len(over) == len(pending) else 0
        if over:
            what = f"rewards.{self.own.key}: {len(over)} of {len(pending)} calls went beyond `verify.seconds`, "
            what += (
                f"`verify.memory_mib` or Python's recursion limit, or ended their worker (prompt_id {over[0]}, ...)"
            )
            if self._beyond >= TO_BLAME:
                raise RewardFailed(f"{what}.")
            logger.warning("%s; their completions are unscored", what)
        return scores


class InTrainer:
    """Calls in this process, beside its main thread: `async` functions in an event loop, others in a thread each."""

    def __init__(self, own: OwnReward, reward: Reward):
        self.own = own
        self.retries = 2 if reward.retries is None else reward.retries
        self.deadline = reward.deadline or 60.0
        self._free = asyncio.Semaphore(reward.concurrency or 8)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def call(self, name: str, completions: list[str], rows: list[dict], parameters: dict[str, Any]) -> Future:
        """The scores to come; `result` raises `RewardFailed` once all tries have failed."""
        arguments = self.own.arguments(completions, rows, parameters)
        return asyncio.run_coroutine_threadsafe(self._scores(arguments, rows), self._loop)

    async def _scores(self, arguments: dict[str, Any], rows: list[dict]) -> list[float | None]:
        async with self._free:
            for attempt in range(self.retries + 1):
                try:
                    async with asyncio.timeout(self.deadline):
                        call = self.own.function if self.own.is_async else _in_thread(self.own.function)
                        returned = await call(**arguments)
                    break
                except Exception as error:  # whatever it is, it is named in the end
                    if isinstance(error, TimeoutError):
                        error = TimeoutError(f"no answer within `deadline`, {self.deadline:g} s")
                    if attempt == self.retries:
                        raise self.own.failed(rows, error) from error
                    await asyncio.sleep(min(2.0**attempt, BACK_OFF))
        return self.own.scores(returned, rows)


def _in_thread(function: Callable) -> Callable[..., asyncio.Future]:
    """`function`, to be awaited. Its thread cannot be ended: past a deadline it is left to itself."""

    def call(**arguments: Any) -> asyncio.Future:
        future: Future = Future()
        future.set_running_or_notify_cancel()

        def run() -> None:
            try:
                future.set_result(function(**arguments))
            except Exception as error:  # handed on to whoever waits
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        return asyncio.wrap_future(future)

    return call


def whole_row(row: dict) -> dict:
    """A row as functions are given it: with the further columns of its source."""
    row = dict(row)
    return row | json.loads(row.pop("columns", None) or "{}")


def check_columns(own: OwnReward, reward: Reward, dataset: "Dataset") -> None:
    """Raises `UserError` if rows of `dataset` lack a column that the function cannot do without."""
    first: dict[tuple[str, str], int] = {}
    for place, of in enumerate(zip(dataset["source"], dataset["kind"], strict=True)):
        first.setdefault(of, place)
    for (source, kind), place in first.items():
        there = whole_row(dataset[place]).keys() | OF_ROLLOUTS
        if (reward.kinds is None or kind in reward.kinds) and (missing := sorted(own.columns - there)):
            raise UserError(
                f"rewards.{own.key}: it takes `{missing[0]}`, which rows of {source} do not have.\n"
                f"Name the column in `columns` of that source, or give the parameter a default."
            )
