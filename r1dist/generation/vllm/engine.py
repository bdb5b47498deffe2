"""The engine of `rollout.engine: vllm`: every rank asks the servers itself; the first one gives them weights."""

import asyncio
import logging
import queue
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import aiohttp

from ...config import Rollout as RolloutSettings
from ..engine import GenerationHandle, Request, Rollout, RolloutsLost, Sampling
from ..weight_sync.transports import Transport
from .client import UNTOUCHED, Client, Completion, ServerError, open_session
from .dispatch import Dispatcher, Group, ServerState, groups_of
from .endpoints import ServerRegistry
from .liveness import Liveness

logger = logging.getLogger(__name__)

MONITOR_SECONDS = 1.0
SECONDS_PER_TOKEN = 0.1
"""That a completion may take; a GPU takes a tenth to a third of it."""


@dataclass(frozen=True)
class Policy:
    """What the engine needs of the trainer."""

    score: Callable[[list[int]], list[float]] | None
    """The policy's logprob of each token but the first, at temperature 1. A collective. None: fixed weights."""
    probe: list[int]
    """A prompt on which servers and trainer are compared."""
    probe_tokens: int
    """How many tokens are drawn after it for that."""
    stop_ids: list[int]
    """Token ids that end a completion."""
    rank: int
    ranks: int
    """How many processes ask the same servers."""
    broadcast: Callable[[Any], Any]
    """Gives every rank the first one's value."""


class ServerEngine:
    """Rollouts by vLLM servers.

    A thread talks to the servers. The first rank's also gives the current weights to a server that restarts while
    the trainer trains. Every rank uses a server only while the server reports these weights.

    Args:
        settings: The YAML's `rollout`.
        registry: Which servers there are.
        transport: How they are given weights; None for servers that keep their own (`use_loaded_weights`).
        policy: The trainer's side.
    """

    def __init__(
        self, settings: RolloutSettings, registry: ServerRegistry, transport: Transport | None, policy: Policy
    ):
        self.settings = settings
        self.registry = registry
        self.transport = transport
        self.policy = policy
        self.first = policy.rank == 0
        self.servers: dict[str, ServerState] = {}
        self.counts: Counter[str] = Counter()
        self.version = -1
        self._run_id = policy.broadcast(secrets.token_hex(4))  # another run's version 3 is not ours
        self._label = ""
        self._expected: tuple[list[int], list[float]] | None = None
        self._logp_diff: float | None = None
        self._generating = False
        self._asleep = False
        self._monitor_task: Future | None = None
        self._heartbeats: dict[str, asyncio.Task] = {}
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="r1dist-servers", daemon=True).start()
        self._session = self._wait(_open_session())

    def sync_weights(self, version: int) -> None:
        """Raises `RolloutsLost` if no server has ever come up, or if one computes other logprobs than we do."""
        if self._label:
            self._stop_monitor()
        else:
            self._together(self._wait_for_servers)
        self._wake()
        self._expected = None
        self._label, self.version = f"{self._run_id}-{version}", version
        self.transport.publish(self._label, [server.client for server in self._up()])
        tokens = self._together(lambda: self._wait(self._give_to_all()))
        self._expected = (tokens, self.policy.score(tokens))
        self._together(lambda: self._wait(self._check_all()))
        if self.first:
            self._start_monitor()

    def use_loaded_weights(self) -> None:
        """Use the weights that the servers came up with. Raises `RolloutsLost` if none comes up."""
        self._together(self._wait_for_servers)
        self._label, self.version = UNTOUCHED, 0

    def stream(self, requests: list[Request], sampling: Sampling) -> Iterator[tuple[int, Rollout]]:
        flight = self.submit(requests, sampling)
        try:
            yield from flight
        finally:
            flight.cancel()

    def submit(self, requests: list[Request], sampling: Sampling) -> GenerationHandle:
        """`stream` for a caller that has other work in the meantime. Weights must not be synced while it lasts."""
        self._wake()
        finished: queue.SimpleQueue = queue.SimpleQueue()
        self._generating = True
        self._start_monitor()
        producer = asyncio.run_coroutine_threadsafe(self._produce(requests, sampling, finished.put), self._loop)
        producer.add_done_callback(lambda _: finished.put(None))
        return QueueHandle(producer, finished)

    def end_generation(self) -> None:
        self._generating = False
        if self.settings.sleep or not self.first:
            self._stop_monitor()
        if self.settings.sleep and self.first:
            self._wait(self._call_all("/sleep?level=1"))
        self._asleep = self.settings.sleep

    def metrics(self) -> dict[str, float]:
        """Counts since the last call; from the first rank also the state of the servers."""
        taken: dict[str, float] = dict(self.counts)
        self.counts = Counter()
        if self.first:
            taken["servers"] = sum(
                server.trusted and server.version == self._label for server in self.servers.values()
            )
            if self._logp_diff is not None:
                taken["logp_diff"] = self._logp_diff
        return {f"rollout/{name}": float(value) for name, value in taken.items()}

    def close(self) -> None:
        self._stop_monitor()
        self._wait(self._session.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        if self.transport is not None:
            self.transport.close()

    # Weights: on the first rank, for all servers at once after a step, for one whenever it comes back.

    def _wait_for_servers(self) -> None:
        """Wait until each server is up or has failed for good; one that is up is enough."""
        deadline = time.monotonic() + self.settings.serve.start_timeout
        while any(server.state == "starting" for server in self.registry.read().servers):
            if time.monotonic() > deadline:
                break
            time.sleep(MONITOR_SECONDS / 4)
        self._wait(self._refresh())
        if not self._up():
            raise RolloutsLost(
                "no server came up. " + "; ".join(f"{n}: {x.last_error}" for n, x in self.servers.items())
            )

    async def _give_to_all(self) -> list[int]:
        """Give the weights to every server that is up; returns the tokens to compare on."""
        await self._refresh()
        given = await asyncio.gather(*(self._attempt(server, self._give) for server in self._up()))
        drawn: list[int] = []

        async def draw(server: ServerState) -> None:
            drawing, timeout = Sampling(max_tokens=self.policy.probe_tokens), self.settings.request_timeout
            seed, stop_ids = max(self.version, 0), self.policy.stop_ids
            drawn.extend(
                (await server.client.complete(self.policy.probe, 1, seed, drawing, stop_ids, timeout))[0].token_ids
            )

        for server in [server for server in given if server is not None and self.policy.probe_tokens]:
            if await self._attempt(server, draw):
                return self.policy.probe + drawn
        return self.policy.probe

    async def _give(self, server: ServerState) -> None:
        await self.transport.give(server.client, self._label, self.settings.sync_timeout, self._generating)
        server.version = self._label

    async def _check_all(self) -> None:
        holding = [server for server in self.servers.values() if server.version == self._label]
        self._logp_diff = None
        await asyncio.gather(*(self._attempt(server, self._check) for server in holding))

    async def _check(self, server: ServerState) -> None:
        """Compare the logprobs of the drawn tokens. Raises `RolloutsLost` above the bound (NaN included)."""
        tokens, expected = self._expected
        logprobs = await server.client.prompt_logprobs(tokens, self.settings.request_timeout)
        drawn = len(tokens) - len(self.policy.probe) or len(expected)
        diff = fmean(abs(a - b) for a, b in zip(logprobs[-drawn:], expected[-drawn:], strict=True))
        if not diff <= self.settings.max_logp_diff:
            raise RolloutsLost(
                f"server {server.name} was given the weights of step {self.version}, but its logprobs differ from the "
                f"trainer's by {diff:.3g} on average over {drawn} tokens (rollout.max_logp_diff is "
                f"{self.settings.max_logp_diff:g}).\nEither the weights did not arrive whole, or the server computes "
                "too differently: compare rollout.serve.dtype with the trainer's, and the two's model."
            )
        self._logp_diff = max(diff, self._logp_diff or 0.0)

    # The keeper: refreshes the registry, asks each server how it is, gives weights where they are missing.

    def _start_monitor(self) -> None:
        if self._monitor_task is None:
            self._monitor_task = asyncio.run_coroutine_threadsafe(self._monitor(), self._loop)

    def _stop_monitor(self) -> None:
        if self._monitor_task is not None:
            self._monitor_task.cancel()
            self._monitor_task = None
            self._wait(self._stop_heartbeats())

    async def _monitor(self) -> None:
        while True:
            await self._refresh()
            for server in self._up():
                busy = server.name in self._heartbeats and not self._heartbeats[server.name].done()
                if not busy and time.monotonic() >= server.not_before:
                    self._heartbeats[server.name] = asyncio.create_task(self._attempt(server, self._heartbeat))
            await asyncio.sleep(MONITOR_SECONDS)

    async def _heartbeat(self, server: ServerState) -> None:
        version = await server.client.weight_version(self.settings.request_timeout)
        if version != self._label and self.first and self._expected is not None:
            await self._give(server)
            try:
                await self._check(server)
            except RolloutsLost as error:
                raise ServerError("logprobs", str(error)) from error
            logger.info("server %s has the weights of step %d", server.name, self.version)
        else:
            server.version = version

    async def _stop_heartbeats(self) -> None:
        tasks, self._heartbeats = list(self._heartbeats.values()), {}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _refresh(self) -> None:
        endpoints = self.registry.read()
        for entry in endpoints.servers:
            server = self.servers.setdefault(entry.name, ServerState(entry.name))
            if entry.state != "ready":
                if server.client is not None:
                    server.failed(ServerError("gone", entry.error or entry.state))
                server.client = None
                server.last_error = entry.error or server.last_error
            elif server.client is None or server.client.url != entry.url:
                server.client = Client(self._session, entry.url, endpoints.token)
                server.liveness = Liveness(server.client, self.settings.health_timeout)
                server.version, server.not_before = None, 0.0

    async def _attempt(self, server: ServerState, act: Callable[[ServerState], Coroutine]) -> ServerState | None:
        """The server if it worked; a server's error, or its death meanwhile, takes it out and is counted."""
        acting: asyncio.Task | None = None
        try:
            await self._probe(server)
            acting = asyncio.create_task(act(server))
            while not (await asyncio.wait([acting], timeout=MONITOR_SECONDS))[0]:
                await self._probe(server)
            acting.result()
        except ServerError as error:
            self.counts[f"errors/{error.kind}"] += 1
            server.failed(error)
            return None
        finally:
            if acting is not None:
                acting.cancel()
        return server

    async def _probe(self, server: ServerState) -> None:
        await server.liveness.probe(self.settings.health_timeout)
        if server.version in (None, self._label):  # one with other weights is of no use, however alive
            server.heard()

    def _up(self) -> list[ServerState]:
        return [server for server in self.servers.values() if server.client is not None]

    # Rollouts

    async def _produce(self, requests: list[Request], sampling: Sampling, put: Callable) -> None:
        async def ask(client: Client, group: Group) -> list[Completion]:
            first = group.requests[0]
            return await client.complete(
                first.prompt_ids, len(group.requests), first.seed, sampling, self.policy.stop_ids
            )

        settings = self.settings
        # A server that does not say how its engine does shows progress only when a prompt's completions are finished.
        patience = max(settings.request_timeout, SECONDS_PER_TOKEN * sampling.max_tokens)
        most = max(1, settings.max_concurrent_requests // self.policy.ranks)
        dispatcher = Dispatcher(self.servers, ask, most, patience, settings.no_server_timeout, self.counts)
        async for group, completions in dispatcher.run(groups_of(requests), self._label):
            for place, request, completion in zip(group.places, group.requests, completions, strict=True):
                ids, logprobs, reason = completion.token_ids, completion.logprobs, completion.finish_reason
                put((place, Rollout(request, ids, logprobs, reason, self.version)))

    # Sleep

    def _wake(self) -> None:
        if self._asleep:
            self._together(lambda: self._wait(self._call_all("/wake_up")))
            self._asleep = False

    async def _call_all(self, path: str) -> None:
        def call(server: ServerState) -> Coroutine:
            return server.client.call("POST", path, timeout=self.settings.request_timeout)

        await asyncio.gather(*(self._attempt(server, call) for server in self._up()))

    def _wait(self, coroutine: Coroutine) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _together(self, act: Callable[[], Any]) -> Any:
        """The first rank acts; every rank gets its result, or its `RolloutsLost`."""
        value, lost = None, None
        if self.first:
            try:
                value = act()
            except RolloutsLost as error:
                lost = str(error)
        value, lost = self.policy.broadcast((value, lost))
        if lost is not None:
            raise RolloutsLost(lost)
        return value


class QueueHandle:
    """A `GenerationHandle` over a queue that the engine's thread fills."""

    def __init__(self, producer: Future, finished: queue.SimpleQueue):
        self._producer = producer
        self._finished = finished
        self.done = False
        """Whether nothing more will come."""

    def __iter__(self) -> Iterator[tuple[int, Rollout]]:
        while not self.done:
            yield from self._next(block=True)
        self._producer.result()

    def arrived(self) -> Iterator[tuple[int, Rollout]]:
        """Those that have arrived; does not wait, raises nothing."""
        while not self.done:
            try:
                yield from self._next(block=False)
            except queue.Empty:
                return

    def cancel(self) -> None:
        self._producer.cancel()

    def _next(self, block: bool) -> Iterator[tuple[int, Rollout]]:
        item = self._finished.get(block)
        if item is None:
            self.done = True
        else:
            yield item


async def _open_session() -> aiohttp.ClientSession:
    return open_session()  # which wants to be called inside the loop
