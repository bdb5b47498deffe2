"""Which server makes which group, and what happens when one fails: no HTTP, no weights, only decisions.

A server is *trusted* until it or a request fails there; then it is *tried* with one group at a time, when its back-off
is over and it holds the right weights, until a group is finished. A failed request costs that request alone. Groups go
to the trusted server with the fewest samples in flight. A request may wait in a server's queue for as long as the
server makes progress: sent again, it would be at the queue's end.
"""

import asyncio
import logging
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from ..engine import Request, RolloutsLost
from .client import Client, Completion, ServerError
from .liveness import Liveness

logger = logging.getLogger(__name__)

TICK = 0.2
LONGEST_BACK_OFF = 30.0


@dataclass
class Group:
    """Samples of one prompt with consecutive seeds: one request to one server."""

    places: list[int]
    """The samples' places in the list of requests."""
    requests: list[Request]


def groups_of(requests: list[Request]) -> list[Group]:
    """Cut `requests` into groups; consecutive requests of one prompt stay together."""
    groups: list[Group] = []
    for place, request in enumerate(requests):
        last = groups[-1].requests[-1] if groups else None
        same = last is not None and (last.prompt_id, last.seed + 1) == (request.prompt_id, request.seed)
        if same and last.prompt_ids == request.prompt_ids:
            groups[-1].places.append(place)
            groups[-1].requests.append(request)
        else:
            groups.append(Group([place], [request]))
    return groups


@dataclass
class ServerState:
    """One server as this rank sees it."""

    name: str
    client: Client | None = None
    """None while the server is not up."""
    liveness: Liveness | None = None
    """Of the client."""
    version: str | None = None
    """The weights that it last reported; None if it has not answered since it failed."""
    trusted: bool = True
    in_flight: int = 0
    """Samples asked of it and not yet answered."""
    failures: int = 0
    """In a row."""
    not_before: float = 0.0
    """On the clock of `time.monotonic`, as the following."""
    last_heard: float = -math.inf
    """When it last answered: a group, or a probe since when no request has failed."""
    last_finished: float = -math.inf
    """When it last finished a group."""
    last_trusted: float = -math.inf
    """When it was last known to be in order: a probe of it says little while every request fails."""
    last_doubted: float = -math.inf
    last_error: str = "never came up"
    tasks: set[asyncio.Task] = field(default_factory=set)
    awake: set[str] = field(default_factory=set)
    """What it is known to hold in its memory, of `weights` and `kv_cache`; it may have been left asleep."""

    def heard(self) -> None:
        """It has answered a probe."""
        self.last_heard = time.monotonic()

    def succeeded(self) -> None:
        """It has finished a group."""
        self.trusted, self.failures = True, 0
        self.last_heard = self.last_finished = time.monotonic()

    def doubted(self, error: ServerError) -> None:
        """A request failed: try it with one group at a time, after a pause that is twice as long each time."""
        self.last_doubted = time.monotonic()
        if self.trusted:
            self.last_trusted = self.last_doubted
        self.trusted, self.last_heard = False, self.last_trusted
        self.not_before = self.last_doubted + min(LONGEST_BACK_OFF, 0.5 * 2**self.failures)
        self.failures += 1
        self.last_error = str(error)

    def failed(self, error: ServerError) -> None:
        """The server itself fails: take it out, and cancel its requests."""
        self.doubted(error)
        self.version = None
        self.awake.clear()
        logger.warning("server %s is taken out: %s", self.name, error)
        for task in self.tasks:
            task.cancel()

    def last_progress(self) -> float:
        """When it was last seen to finish a group, or to compute for anybody."""
        return max(self.last_finished, self.liveness.last_computed if self.liveness else -math.inf)

    def ready(self, version: str) -> bool:
        return self.client is not None and self.version == version and time.monotonic() >= self.not_before


class Dispatcher:
    """Sends groups to servers until each one is answered.

    Args:
        servers: The servers; they may change during `run`.
        ask: Sends one group to one client and gives its completions; raises `ServerError`.
        max_concurrent_requests: This rank's samples at one server at a time; the others wait here, where they can
            still be moved.
        request_timeout: Seconds without progress of its server after which a group is sent again.
        no_server_timeout: Seconds without an answer of any server after which `run` gives up.
        counts: Where failures by kind and re-sent groups are counted.
    """

    def __init__(
        self,
        servers: dict[str, ServerState],
        ask: Callable[[Client, Group], Coroutine[Any, Any, list[Completion]]],
        max_concurrent_requests: int,
        request_timeout: float,
        no_server_timeout: float,
        counts: Counter,
    ):
        self.servers = servers
        self.ask = ask
        self.max_concurrent_requests = max_concurrent_requests
        self.request_timeout = request_timeout
        self.no_server_timeout = no_server_timeout
        self.counts = counts

    async def run(self, groups: list[Group], version: str) -> AsyncIterator[tuple[Group, list[Completion]]]:
        """Each group with its completions, in the order in which they are finished.

        Raises `RolloutsLost` when no server has been heard for `no_server_timeout` seconds.
        """
        waiting = deque(groups)
        running: dict[asyncio.Task, tuple[Group, ServerState, float]] = {}
        late: set[asyncio.Task] = set()
        in_order = time.monotonic()
        try:
            while waiting or running:
                while waiting and (server := self._choose(version, len(waiting[0].requests))):
                    group = waiting.popleft()
                    task = asyncio.create_task(self.ask(server.client, group))
                    server.in_flight += len(group.requests)
                    server.tasks.add(task)
                    running[task] = (group, server, time.monotonic())
                if running:
                    done, _ = await asyncio.wait(running, timeout=TICK, return_when=asyncio.FIRST_COMPLETED)
                else:
                    done = await asyncio.sleep(TICK, set())
                for task in done:
                    group, server, asked = running.pop(task)
                    server.in_flight -= len(group.requests)
                    server.tasks.discard(task)
                    completions = self._outcome(task, server, asked, task in late)
                    late.discard(task)
                    if completions is None:
                        self.counts["resent"] += 1
                        waiting.appendleft(group)
                    else:
                        yield group, completions
                now = time.monotonic()
                for task, (_, server, asked) in running.items():
                    if now - max(asked, server.last_progress()) > self.request_timeout:
                        late.add(task)
                        task.cancel()
                if any(server.trusted and server.ready(version) for server in self.servers.values()):
                    in_order = now
                if now - max(in_order, *(s.last_heard for s in self.servers.values())) > self.no_server_timeout:
                    raise RolloutsLost(self._no_server_message())
        finally:
            for task, (group, server, _) in running.items():
                task.cancel()
                server.in_flight -= len(group.requests)
                server.tasks.discard(task)

    def _choose(self, version: str, samples: int) -> ServerState | None:
        def has_room(server: ServerState) -> bool:
            most = self.max_concurrent_requests if server.trusted else 0
            return server.in_flight == 0 or server.in_flight + samples <= most

        fitting = [server for server in self.servers.values() if server.ready(version) and has_room(server)]
        # One group at a time goes to a server on trial, however much room the others have: else it would stay there.
        return min(fitting, key=lambda server: (server.trusted, server.in_flight), default=None)

    def _outcome(self, task: asyncio.Task, server: ServerState, asked: float, late: bool) -> list[Completion] | None:
        error: BaseException | None
        if task.cancelled():
            if not late:  # by `ServerState.failed`
                return None
            error = ServerError("late", f"no progress for {self.request_timeout:g} s (rollout.request_timeout)")
        else:
            error = task.exception()
        if error is None:
            server.succeeded()
            return task.result()
        if not isinstance(error, ServerError):
            raise error
        self.counts[f"errors/{error.kind}"] += 1
        logger.warning("server %s fails a request: %s", server.name, error)
        works = error.kind == "late" and server.last_finished > asked  # at others; this one took longer
        if not works and server.last_doubted < asked:  # one doubt for all that was asked before it
            server.doubted(error)
        if error.kind != "late":  # it may be another process by now
            server.version = None
        return None

    def _no_server_message(self) -> str:
        state = "; ".join(f"{server.name}: {server.last_error}" for server in self.servers.values())
        seconds = f"{self.no_server_timeout:g} s (rollout.no_server_timeout)"
        return f"no server could be used for {seconds}. {state or 'There is none.'}"
