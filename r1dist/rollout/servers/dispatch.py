"""Which server makes which group, and what happens when one fails: no HTTP, no weights, only decisions.

A server is *trusted* once it has answered, and until it fails; it is *tried* with one group at a time after a
failure, when its back-off is over and it holds the right weights. Groups go to the trusted server with the
fewest samples in flight.
"""

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from ..protocol import Request, RolloutsLost
from .client import Client, Completion, ServerError

logger = logging.getLogger(__name__)

TICK = 0.2
LONGEST_BACK_OFF = 30.0


@dataclass
class Group:
    """Samples of one prompt with consecutive seeds: one request to one server."""

    places: list[int]
    """Where the samples stand in the list that was asked for."""
    requests: list[Request]


def groups_of(requests: list[Request]) -> list[Group]:
    """Cut `requests` into groups; what lies side by side of one prompt stays together."""
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
class Lane:
    """One server as this rank sees it."""

    name: str
    client: Client | None = None
    """None while the server is not up."""
    version: str | None = None
    """What it last said its weights are; None if it has not answered since it failed."""
    trusted: bool = True
    in_flight: int = 0
    """Samples asked of it and not yet answered."""
    failures: int = 0
    """In a row."""
    not_before: float = 0.0
    """On the clock of `time.monotonic`."""
    last_error: str = "never came up"
    tasks: set[asyncio.Task] = field(default_factory=set)

    def succeeded(self) -> None:
        self.trusted, self.failures = True, 0

    def failed(self, error: ServerError) -> None:
        """Take it out, for twice as long each time, and let go of what it was asked for."""
        self.trusted, self.version = False, None
        self.not_before = time.monotonic() + min(LONGEST_BACK_OFF, 0.5 * 2**self.failures)
        self.failures += 1
        self.last_error = str(error)
        logger.warning("server %s is taken out: %s", self.name, error)
        for task in self.tasks:
            task.cancel()

    def ready(self, version: str) -> bool:
        return self.client is not None and self.version == version and time.monotonic() >= self.not_before


class Dispatcher:
    """Sends groups to servers until each one is answered.

    Args:
        lanes: The servers; they may come and go while `run` goes on.
        ask: Sends one group to one client and gives its completions; raises `ServerError`.
        most_in_flight: Samples at one server at a time; the rest waits here, where it can still be moved.
        patience: Seconds without a trusted server after which `run` gives up.
        counts: Where failures by kind and re-sent groups are counted.
    """

    def __init__(
        self,
        lanes: dict[str, Lane],
        ask: Callable[[Client, Group], Awaitable[list[Completion]]],
        most_in_flight: int,
        patience: float,
        counts: Counter,
    ):
        self.lanes = lanes
        self.ask = ask
        self.most_in_flight = most_in_flight
        self.patience = patience
        self.counts = counts

    async def run(self, groups: list[Group], version: str) -> AsyncIterator[tuple[Group, list[Completion]]]:
        """Each group with its completions, in the order in which they are finished.

        Raises `RolloutsLost` when no server has been trusted for `patience` seconds.
        """
        waiting = deque(groups)
        running: dict[asyncio.Task, tuple[Group, Lane]] = {}
        hope_until = time.monotonic() + self.patience
        try:
            while waiting or running:
                while waiting and (lane := self._choose(version, len(waiting[0].requests))):
                    group = waiting.popleft()
                    task = asyncio.create_task(self.ask(lane.client, group))
                    lane.in_flight += len(group.requests)
                    lane.tasks.add(task)
                    running[task] = (group, lane)
                if running:
                    done, _ = await asyncio.wait(running, timeout=TICK, return_when=asyncio.FIRST_COMPLETED)
                else:
                    done = await asyncio.sleep(TICK, set())
                for task in done:
                    group, lane = running.pop(task)
                    lane.in_flight -= len(group.requests)
                    lane.tasks.discard(task)
                    completions = self._outcome(task, lane)
                    if completions is None:
                        self.counts["resent"] += 1
                        waiting.appendleft(group)
                    else:
                        yield group, completions
                now = time.monotonic()
                if any(lane.trusted and lane.ready(version) for lane in self.lanes.values()):
                    hope_until = now + self.patience
                elif now > hope_until:
                    raise RolloutsLost(self._farewell())
        finally:
            for task, (group, lane) in running.items():
                task.cancel()
                lane.in_flight -= len(group.requests)
                lane.tasks.discard(task)

    def _choose(self, version: str, samples: int) -> Lane | None:
        def has_room(lane: Lane) -> bool:
            most = self.most_in_flight if lane.trusted else 0
            return lane.in_flight == 0 or lane.in_flight + samples <= most

        fitting = [lane for lane in self.lanes.values() if lane.ready(version) and has_room(lane)]
        # One group at a time goes to a server on trial, however much room the others have: else it would stay there.
        return min(fitting, key=lambda lane: (lane.trusted, lane.in_flight), default=None)

    def _outcome(self, task: asyncio.Task, lane: Lane) -> list[Completion] | None:
        if task.cancelled():  # by `Lane.failed`
            return None
        error = task.exception()
        if error is None:
            lane.succeeded()
            return task.result()
        if not isinstance(error, ServerError):
            raise error
        self.counts[f"errors/{error.kind}"] += 1
        lane.failed(error)
        return None

    def _farewell(self) -> str:
        state = "; ".join(f"{lane.name}: {lane.last_error}" for lane in self.lanes.values())
        return f"no server could be used for {self.patience:g} s (rollout.timeout). {state or 'There is none.'}"
