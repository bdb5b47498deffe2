"""Calls of reward functions: a rank's rollouts divided among calls, and calls in the trainer's process."""

import asyncio
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, as_completed
from typing import TYPE_CHECKING, Any

from ..config.rewards import Reward
from ..errors import RewardFailed, UserError, did_you_mean
from .function import RewardFunction
from .pool import BACK_OFF, Overran, Pool
from .server import NoScore, Refused

if TYPE_CHECKING:  # nothing for a pool's workers to import
    from datasets import Dataset

logger = logging.getLogger(__name__)

OF_ROLLOUTS = {"tokens", "group_tokens", "completion_ids"}
"""What the rows have that functions are given, beside the dataset's columns."""
TO_BLAME = 4
"""Calls without an outcome, and none with, after which it is the function's fault."""
TWICE = 4
"""Calls of a generation that are made twice of a function that says that it is deterministic."""
SAME_AGAIN = 2
"""Times at most that a reply without a score is asked for again: a judge at temperature 0 mostly repeats itself."""
LONGEST_WAIT = 120.0
"""Seconds that a server may ask to be left alone before it is asked again."""


class CallScorer:
    """Scores by a function, in `pool` or, with `isolated: false`, in this process.

    A call is of one completion, or of those of one prompt. One beyond its limits, or answered without a score, leaves
    its completions unscored. Raises `RewardFailed` where a call fails, after `TO_BLAME` calls without an outcome, and
    for a function that says that it is `deterministic` and is not; `VerifiersBroken` where a server is down.
    """

    def __init__(self, function: RewardFunction, reward: Reward, parameters: dict[str, Any], pool: Pool):
        self.function = function
        self.deterministic = reward.deterministic
        self._without = 0  # calls without an outcome since one had one
        submit = pool.call if reward.isolated else InTrainer(function, reward).call
        self._submit: Callable[[list[str], list[dict]], Future] = lambda *call: submit(
            function.name, *call, parameters
        )

    def __call__(
        self, texts: list[str], rows: list[dict], heartbeat: Callable[[], None] = lambda: None
    ) -> list[float | None]:
        rows = [whole_row(row) for row in rows]
        by_call: dict[Any, list[int]] = {}
        for place, row in enumerate(rows):
            by_call.setdefault(place if self.function.form == "completion" else row["prompt_id"], []).append(place)
        calls = [*by_call.values()]

        def submitted(some: list[list[int]]) -> dict[Future, list[int]]:
            return {self._submit([texts[i] for i in call], [rows[i] for i in call]): call for call in some}

        pending = submitted(calls)
        again = submitted(calls[:: max(1, len(calls) // TWICE)][:TWICE]) if self.deterministic else {}
        scores: list[float | None] = [None] * len(rows)
        without: list[tuple[dict, Exception]] = []
        for future in as_completed([*pending, *again]):
            heartbeat()
            try:
                found = future.result()
            except (Overran, NoScore) as error:
                if future in pending:
                    without.append((rows[pending[future][0]], error))
                continue
            if future in pending:
                for place, score in zip(pending[future], found, strict=True):
                    scores[place] = score
        self._compare(pending, again, rows)
        self._without = self._without + len(without) if len(without) == len(pending) else 0
        if without:
            self._report(without, len(pending))
        return scores

    def _compare(self, pending: dict[Future, list[int]], again: dict[Future, list[int]], rows: list[dict]) -> None:
        """Raises `RewardFailed` where the two calls of the same completions have other scores."""
        first = {call[0]: future for future, call in pending.items()}
        for second, call in again.items():
            both = first[call[0]], second
            if any(future.exception() is not None for future in both):
                continue
            for place, *scores in zip(call, *(future.result() for future in both), strict=True):
                if scores[0] != scores[1]:
                    raise RewardFailed(
                        f"rewards.{self.function.key}, row of prompt_id {rows[place].get('prompt_id')}: it says "
                        f"`deterministic: true`, and gave the same completion {scores[0]} and {scores[1]}."
                    )

    def _report(self, without: list[tuple[dict, Exception]], calls: int) -> None:
        """Logs that some of `calls` had no outcome. Raises `RewardFailed` if too many had none, one after another."""
        row, error = without[0]
        first = f"prompt_id {row.get('prompt_id')}"
        if isinstance(error, NoScore):
            how = f"were answered without a score ({first}: {error})"
        else:
            limits = "`verify.seconds`, `verify.memory_mib` or Python's recursion limit"
            how = f"went beyond {limits}, or ended their worker ({first}, ...)"
        what = f"rewards.{self.function.key}: {len(without)} of {calls} calls {how}"
        if self._without >= TO_BLAME:
            raise RewardFailed(f"{what}.")
        logger.warning("%s; their completions are unscored", what)


class InTrainer:
    """Calls in this process, beside its main thread: `async` functions in an event loop, others in a thread each."""

    def __init__(self, function: RewardFunction, reward: Reward):
        self.function = function
        self.retries = function.retries if reward.retries is None else reward.retries
        self.deadline = reward.deadline or 60.0
        self._free = asyncio.Semaphore(reward.concurrency or 8)
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        self._interval = 60.0 * processes / reward.requests_per_minute if reward.requests_per_minute else 0.0
        self._next = 0.0  # when the next call may be made
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def call(self, name: str, completions: list[str], rows: list[dict], parameters: dict[str, Any]) -> Future:
        """The scores to come; `result` raises what `failed` gives once all tries have failed."""
        arguments = self.function.arguments(completions, rows, parameters)
        return asyncio.run_coroutine_threadsafe(self._scores(arguments, rows), self._loop)

    async def _scores(self, arguments: dict[str, Any], rows: list[dict]) -> list[float | None]:
        async with self._free:
            for attempt in range(self.retries + 1):
                await self._turn()
                try:
                    async with asyncio.timeout(self.deadline):
                        own = self.function
                        returned = await (own.function if own.is_async else _in_thread(own.function))(**arguments)
                    break
                except Exception as error:  # whatever it is, it is named in the end
                    if isinstance(error, TimeoutError):
                        error = TimeoutError(f"no answer within `deadline`, {self.deadline:g} s")
                    wait = max(min(2.0**attempt, BACK_OFF), getattr(error, "retry_after", 0.0))
                    if attempt >= self._most_retries(error) or wait > LONGEST_WAIT:
                        raise self.function.failed(rows, error) from error
                    await asyncio.sleep(wait)
        return self.function.scores(returned, rows)

    def _most_retries(self, error: Exception) -> int:
        if isinstance(error, Refused):
            return 0
        return min(self.retries, SAME_AGAIN) if isinstance(error, NoScore) else self.retries

    async def _turn(self) -> None:
        """Wait until `requests_per_minute` lets another call be made."""
        now = time.monotonic()
        turn = max(now, self._next)
        self._next = turn + self._interval
        await asyncio.sleep(turn - now)


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


def check_columns(function: RewardFunction, reward: Reward, dataset: "Dataset") -> None:
    """Raises `UserError` if rows of `dataset` lack a column that the function cannot do without."""
    first: dict[tuple[str, str], int] = {}
    for place, of in enumerate(zip(dataset["source"], dataset["kind"], strict=True)):
        first.setdefault(of, place)
    for (source, kind), place in first.items():
        there = whole_row(dataset[place]).keys() | OF_ROLLOUTS
        if (reward.kinds is None or kind in reward.kinds) and (missing := sorted(function.columns - there)):
            raise UserError(
                f"rewards.{function.key}: it takes `{missing[0]}`, which rows of {source} do not have"
                f"{did_you_mean(missing[0], there)}\n"
                f"Name the column in `columns` of that source, or {function.otherwise}."
            )
