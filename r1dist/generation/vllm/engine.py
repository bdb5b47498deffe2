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
from ..weight_sync.transports import Transport, name_weights
from .client import UNTOUCHED, Client, Completion, ServerError, open_session
from .dispatch import Dispatcher, Group, ServerState, groups_of
from .endpoints import ServerRegistry
from .handle import QueueHandle
from .liveness import Liveness

logger = logging.getLogger(__name__)

MONITOR_SECONDS = 1.0
SECONDS_PER_TOKEN = 0.1
"""That a completion may take; a GPU takes a tenth to a third of it."""
SLEEP_TAGS = ("weights", "kv_cache")
"""What vLLM releases when it sleeps."""


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
    release_memory: Callable[[], None] = lambda: None
    """Gives the memory that the trainer keeps unused back to the GPU, on every rank. A collective that waits."""


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
        self._asleep = False
        self._weights = threading.Lock()
        """Held by the trainer, except while it waits for rollouts: its weights stand still then."""
        self._weights.acquire()
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
        self._expected = None
        self._label, self.version = f"{self._run_id}-{version}", version
        self._wake("weights")
        woken = [server for server in self._up() if "weights" in server.awake]
        errors = self.transport.publish(self._label, [server.client for server in woken])
        for server in woken:
            if server.client.url in errors:
                self._take_out(server, errors[server.client.url])
        holding = [server for server in woken if server.client.url not in errors]
        self._release_memory()
        tokens = self._together(lambda: self._wait(self._give_to_all(holding)))
        self._expected = (tokens, self.policy.score(tokens))
        self._together(lambda: self._wait(self._check_all()))
        if self.first:
            self._start_monitor()

    def use_loaded_weights(self) -> None:
        """Use the weights that the servers came up with. Raises `RolloutsLost` if none comes up."""
        self._together(self._wait_for_servers)
        self._wake(*SLEEP_TAGS)
        self._label, self.version = UNTOUCHED, 0

    def stream(self, requests: list[Request], sampling: Sampling) -> Iterator[tuple[int, Rollout]]:
        flight = self.submit(requests, sampling)
        try:
            yield from flight
        finally:
            flight.cancel()

    def submit(self, requests: list[Request], sampling: Sampling) -> GenerationHandle:
        """`stream` for a caller that has other work in the meantime. Weights must not be synced while it lasts."""
        if self._asleep:
            self._wake(*SLEEP_TAGS)
        finished: queue.SimpleQueue = queue.SimpleQueue()
        self._start_monitor()
        producer = asyncio.run_coroutine_threadsafe(self._produce(requests, sampling, finished.put), self._loop)
        producer.add_done_callback(lambda _: finished.put(None))
        return QueueHandle(producer, finished, self._weights)

    def end_generation(self) -> None:
        if self.settings.sleep or not self.first:
            self._stop_monitor()
        if self.settings.sleep and self.first:
            self._wait(self._for_all(self._put_to_sleep))
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

    async def _give_to_all(self, servers: list[ServerState]) -> list[int]:
        """Give the weights to these servers; returns the tokens to compare on."""
        given = await asyncio.gather(*(self._attempt(server, self._give) for server in servers))
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
        """The cache is woken last: until then its memory is there for the transfer."""
        timeout = self.settings.sync_timeout
        await self._wake_server(server, "weights")
        await self.transport.give(server.client, self._label, timeout, self._weights)
        await self._wake_server(server, "kv_cache")
        await name_weights(server.client, self._label, timeout)
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
            if self.first:
                await self._wake_server(server, *SLEEP_TAGS)
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
                server.awake.clear()

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
            self._take_out(server, error)
            return None
        finally:
            if acting is not None:
                acting.cancel()
        return server

    def _take_out(self, server: ServerState, error: ServerError) -> None:
        self.counts[f"errors/{error.kind}"] += 1
        server.failed(error)

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

    # Sleep. A server may have been left asleep by another run, so each is woken before it is first used.

    def _wake(self, *tags: str) -> None:
        """Wake these parts of every server that is up; one that fails is taken out. A collective."""
        self._release_memory()
        self._together(lambda: self._wait(self._for_all(lambda server: self._wake_server(server, *tags))))
        self._asleep = False

    def _release_memory(self) -> None:
        if self.settings.sleep:
            self.policy.release_memory()

    async def _wake_server(self, server: ServerState, *tags: str) -> None:
        """To a server that is awake, vLLM does nothing either."""
        for tag in tags:
            if tag not in server.awake:
                await server.client.call("POST", f"/wake_up?tags={tag}", timeout=self.settings.sync_timeout)
                server.awake.add(tag)

    async def _put_to_sleep(self, server: ServerState) -> None:
        server.awake.clear()
        await server.client.call("POST", "/sleep?level=1", timeout=self.settings.sync_timeout)

    async def _for_all(self, act: Callable[[ServerState], Coroutine]) -> None:
        await self._refresh()
        await asyncio.gather(*(self._attempt(server, act) for server in self._up()))

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


async def _open_session() -> aiohttp.ClientSession:
    return open_session()  # which wants to be called inside the loop
