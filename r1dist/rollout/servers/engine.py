"""The engine of `rollout.engine: vllm`: every rank asks the servers itself; the first one gives them weights."""

import asyncio
import logging
import queue
import secrets
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import aiohttp

from ...config import Rollout as RolloutSettings
from ..protocol import Request, Rollout, RolloutsLost, Sampling
from ..weights.transports import Transport
from .client import Client, Completion, ServerError, open_session
from .dispatch import Dispatcher, Group, Lane, groups_of
from .endpoints import Roster

logger = logging.getLogger(__name__)

KEEP_SECONDS = 1.0
UNTOUCHED = "default"  # what vLLM calls the weights that a server came up with


@dataclass(frozen=True)
class Policy:
    """What the engine needs of the trainer."""

    score: Callable[[list[int]], list[float]] | None
    """The policy's logprob of each token but the first, at temperature 1. A collective. None: nobody trains."""
    probe: list[int]
    """A prompt on which servers and trainer are compared."""
    probe_tokens: int
    """How many tokens are drawn after it for that."""
    stop_ids: list[int]
    """Token ids that end a completion."""
    rank: int
    share: Callable[[Any], Any]
    """Gives every rank the first one's value."""


class ServerEngine:
    """Rollouts by vLLM servers.

    A thread of its own talks to the servers. On the first rank it never rests: a server that comes back while
    the trainer trains is given the current weights then. On every rank a server is used only while it says
    itself that it holds them.

    Args:
        settings: The YAML's `rollout`.
        roster: Which servers there are.
        transport: How they are given weights; None for servers that keep their own (`adopt`).
        policy: The trainer's side.
    """

    def __init__(self, settings: RolloutSettings, roster: Roster, transport: Transport | None, policy: Policy):
        self.settings = settings
        self.roster = roster
        self.transport = transport
        self.policy = policy
        self.first = policy.rank == 0
        self.lanes: dict[str, Lane] = {}
        self.counts: Counter[str] = Counter()
        self.version = -1
        self._run_id = policy.share(secrets.token_hex(4))  # another run's version 3 is not ours
        self._label = ""
        self._expected: tuple[list[int], list[float]] | None = None
        self._logp_diff: float | None = None
        self._generating = False
        self._asleep = False
        self._keeper: Future | None = None
        self._tending: dict[str, asyncio.Task] = {}
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="r1dist-servers", daemon=True).start()
        self._session = self._wait(_open_session())

    def sync_weights(self, version: int) -> None:
        """Raises `RolloutsLost` if no server has ever come up, or if one computes other logprobs than we do."""
        if self._label:
            self._stop_keeper()
        else:
            self._together(self._wait_for_servers)
        self._wake()
        self._expected = None
        self._label, self.version = f"{self._run_id}-{version}", version
        self.transport.publish(self._label, [lane.client for lane in self._up()])
        tokens = self._together(lambda: self._wait(self._give_to_all()))
        self._expected = (tokens, self.policy.score(tokens))
        self._together(lambda: self._wait(self._check_all()))
        if self.first:
            self._start_keeper()

    def adopt(self) -> None:
        """Use the weights that the servers came up with. Raises `RolloutsLost` if none comes up."""
        self._together(self._wait_for_servers)
        self._label, self.version = UNTOUCHED, 0

    def stream(self, requests: list[Request], sampling: Sampling) -> Iterator[tuple[int, Rollout]]:
        flight = self.depart(requests, sampling)
        try:
            yield from flight
        finally:
            flight.cancel()

    def depart(self, requests: list[Request], sampling: Sampling) -> "Flight":
        """`stream` for a caller that has other work in the meantime. Weights must not be synced while it lasts."""
        self._wake()
        finished: queue.SimpleQueue = queue.SimpleQueue()
        self._generating = True
        self._start_keeper()
        producer = asyncio.run_coroutine_threadsafe(self._produce(requests, sampling, finished.put), self._loop)
        producer.add_done_callback(lambda _: finished.put(None))
        return Flight(producer, finished)

    def rest(self) -> None:
        self._generating = False
        if self.settings.sleep or not self.first:
            self._stop_keeper()
        if self.settings.sleep and self.first:
            self._wait(self._tell_all("/sleep?level=1"))
        self._asleep = self.settings.sleep

    def metrics(self) -> dict[str, float]:
        """Counts since the last call; from the first rank also the state of the servers."""
        taken, self.counts = dict(self.counts), Counter()
        if self.first:
            taken["servers"] = sum(lane.trusted and lane.version == self._label for lane in self.lanes.values())
            if self._logp_diff is not None:
                taken["logp_diff"] = self._logp_diff
        return {f"rollout/{name}": float(value) for name, value in taken.items()}

    def close(self) -> None:
        self._stop_keeper()
        self._wait(self._session.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        if self.transport is not None:
            self.transport.close()

    # Weights: on the first rank, for all servers at once after a step, for one whenever it comes back.

    def _wait_for_servers(self) -> None:
        """Until each server is up or has failed for good; one that is up is enough to go on."""
        deadline = time.monotonic() + self.settings.serve.start_timeout
        while any(server.state == "starting" for server in self.roster.read().servers):
            if time.monotonic() > deadline:
                break
            time.sleep(KEEP_SECONDS / 4)
        self._wait(self._refresh())
        if not self._up():
            raise RolloutsLost(
                "no server came up. " + "; ".join(f"{n}: {x.last_error}" for n, x in self.lanes.items())
            )

    async def _give_to_all(self) -> list[int]:
        """Give the weights to every server that is up; returns the tokens to compare on."""
        await self._refresh()
        given = await asyncio.gather(*(self._attempt(lane, self._give) for lane in self._up()))
        for lane in [lane for lane in given if lane is not None and self.policy.probe_tokens]:
            drawing = Sampling(max_tokens=self.policy.probe_tokens)
            with suppress(ServerError):
                asked = lane.client.complete(
                    self.policy.probe, 1, max(self.version, 0), drawing, self.policy.stop_ids,
                    self.settings.request_timeout,
                )  # fmt: skip
                return self.policy.probe + (await asked)[0].token_ids
        return self.policy.probe

    async def _give(self, lane: Lane) -> None:
        await lane.client.weight_version(self.settings.health_timeout)  # a hung one is found out sooner by this
        await self.transport.give(lane.client, self._label, self.settings.sync_timeout, self._generating)
        lane.version = self._label

    async def _check_all(self) -> None:
        holding = [lane for lane in self.lanes.values() if lane.version == self._label]
        self._logp_diff = None
        await asyncio.gather(*(self._attempt(lane, self._check) for lane in holding))

    async def _check(self, lane: Lane) -> None:
        """Compare the logprobs of the drawn tokens. Raises `RolloutsLost` above the bound (NaN included)."""
        tokens, expected = self._expected
        logprobs = await lane.client.prompt_logprobs(tokens, self.settings.request_timeout)
        drawn = len(tokens) - len(self.policy.probe) or len(expected)
        diff = fmean(abs(a - b) for a, b in zip(logprobs[-drawn:], expected[-drawn:], strict=True))
        if not diff <= self.settings.max_logp_diff:
            raise RolloutsLost(
                f"server {lane.name} was given the weights of step {self.version}, but its logprobs differ from the "
                f"trainer's by {diff:.3g} on average over {drawn} tokens (rollout.max_logp_diff is "
                f"{self.settings.max_logp_diff:g}).\nEither the weights did not arrive whole, or the server computes "
                "too differently: compare rollout.serve.dtype with the trainer's, and the two's model."
            )
        self._logp_diff = max(diff, self._logp_diff or 0.0)

    # The keeper: refreshes the roster, asks each server how it is, gives weights where they are missing.

    def _start_keeper(self) -> None:
        if self._keeper is None:
            self._keeper = asyncio.run_coroutine_threadsafe(self._keep(), self._loop)

    def _stop_keeper(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            self._keeper = None
            self._wait(self._stop_tending())

    async def _keep(self) -> None:
        while True:
            await self._refresh()
            for lane in self._up():
                busy = lane.name in self._tending and not self._tending[lane.name].done()
                if not busy and time.monotonic() >= lane.not_before:
                    self._tending[lane.name] = asyncio.create_task(self._attempt(lane, self._tend))
            await asyncio.sleep(KEEP_SECONDS)

    async def _tend(self, lane: Lane) -> None:
        version = await lane.client.weight_version(self.settings.health_timeout)
        if version != self._label and self.first and self._expected is not None:
            await self._give(lane)
            try:
                await self._check(lane)
            except RolloutsLost as error:
                raise ServerError("logprobs", str(error)) from error
            logger.info("server %s has the weights of step %d", lane.name, self.version)
        else:
            lane.version = version

    async def _stop_tending(self) -> None:
        tasks, self._tending = list(self._tending.values()), {}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _refresh(self) -> None:
        endpoints = self.roster.read()
        for server in endpoints.servers:
            lane = self.lanes.setdefault(server.name, Lane(server.name))
            if server.state != "ready":
                if lane.client is not None:
                    lane.failed(ServerError("gone", server.error or server.state))
                lane.client = None
                lane.last_error = server.error or lane.last_error
            elif lane.client is None or lane.client.url != server.url:
                lane.client = Client(self._session, server.url, endpoints.token)
                lane.version, lane.not_before = None, 0.0

    async def _attempt(self, lane: Lane, act: Callable[[Lane], Awaitable]) -> Lane | None:
        """The lane if it worked; a server's error takes the server out and is counted."""
        try:
            await act(lane)
        except ServerError as error:
            self.counts[f"errors/{error.kind}"] += 1
            lane.failed(error)
            return None
        return lane

    def _up(self) -> list[Lane]:
        return [lane for lane in self.lanes.values() if lane.client is not None]

    # Rollouts

    async def _produce(self, requests: list[Request], sampling: Sampling, put: Callable) -> None:
        async def ask(client: Client, group: Group) -> list[Completion]:
            first = group.requests[0]
            return await client.complete(
                first.prompt_ids, len(group.requests), first.seed, sampling, self.policy.stop_ids,
                self.settings.request_timeout,
            )  # fmt: skip

        settings = self.settings
        dispatcher = Dispatcher(self.lanes, ask, settings.in_flight, settings.timeout, self.counts)
        async for group, completions in dispatcher.run(groups_of(requests), self._label):
            for place, request, completion in zip(group.places, group.requests, completions, strict=True):
                drawn = (completion.token_ids, completion.logprobs, completion.finish_reason)
                put((place, Rollout(request, *drawn, self.version)))

    # Sleep

    def _wake(self) -> None:
        if self._asleep:
            self._together(lambda: self._wait(self._tell_all("/wake_up")))
            self._asleep = False

    async def _tell_all(self, path: str) -> None:
        def tell(lane: Lane) -> Awaitable:
            return lane.client.call("POST", path, timeout=self.settings.request_timeout)

        await asyncio.gather(*(self._attempt(lane, tell) for lane in self._up()))

    def _wait(self, coroutine: Coroutine) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _together(self, act: Callable[[], Any]) -> Any:
        """The first rank acts; every rank gets its result, or its `RolloutsLost`."""
        outcome = None
        if self.first:
            try:
                outcome = (act(), None)
            except RolloutsLost as error:
                outcome = (None, str(error))
        value, lost = self.policy.share(outcome)
        if lost is not None:
            raise RolloutsLost(lost)
        return value


class Flight:
    """Rollouts on their way, with their places. Iterating waits for them and raises `RolloutsLost`."""

    def __init__(self, producer: Future, finished: queue.SimpleQueue):
        self._producer = producer
        self._finished = finished
        self.landed = False
        """Whether nothing more will come."""

    def __iter__(self) -> Iterator[tuple[int, Rollout]]:
        while not self.landed:
            yield from self._next(block=True)
        self._producer.result()

    def arrived(self) -> Iterator[tuple[int, Rollout]]:
        """Those that are there by now; raises nothing."""
        while not self.landed:
            try:
                yield from self._next(block=False)
            except queue.Empty:
                return

    def cancel(self) -> None:
        self._producer.cancel()

    def _next(self, block: bool) -> Iterator[tuple[int, Rollout]]:
        item = self._finished.get(block)
        if item is None:
            self.landed = True
        else:
            yield item


async def _open_session() -> aiohttp.ClientSession:
    return open_session()  # which wants to be called inside the loop
