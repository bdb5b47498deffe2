"""Generations that are made ahead of the training (`rollout.max_staleness`).

Weights reach the servers only between two generations. A generation is submitted while it is at most `max_staleness`
later than the one before whose training the servers' weights were synced.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from accelerate.utils import gather_object

from .engine import AsyncEngine, GenerationHandle, Request, Rollout, RolloutId, Sampling


@dataclass
class Generation:
    """The rollouts of one generation on this rank: planned, in the making, or complete."""

    number: int
    step: int
    """The optimizer step that it is made for."""
    rows: list[dict]
    """The dataset's row of each rollout."""
    requests: list[Request]
    arriving: Iterable[tuple[int, Rollout]] = ()
    """Rollouts with their places, as they are finished."""
    rollouts: dict[int, Rollout] = field(default_factory=dict)
    """By place."""
    texts: dict[int, str] = field(default_factory=dict)

    def rollout_id(self, place: int) -> RolloutId:
        request = self.requests[place]
        return self.number, request.prompt_id, request.sample_index


class Lookahead:
    """Submits generations ahead of their turn.

    Args:
        plan: The generation of that number, not yet submitted; None after the last one.
        receive: Called with a generation and the rollouts of it that have arrived.
        sync: Gives the engine the policy's weights of that optimizer step, which is the current one. A collective.
    """

    def __init__(
        self, engine: AsyncEngine, sampling: Sampling, max_staleness: int, plan: Callable[[int], Generation | None],
        receive: Callable[[Generation, Iterable[tuple[int, Rollout]]], None], sync: Callable[[int], None],
    ):  # fmt: skip
        self.engine = engine
        self.sampling = sampling
        self.max_staleness = max_staleness
        self.plan = plan
        self.receive = receive
        self.sync = sync
        self._ahead: deque[tuple[Generation, GenerationHandle]] = deque()
        self._synced_for: int | None = None  # the generation before which the weights were synced

    def take(self, number: int) -> Generation:
        """Generation `number`, submitted before or now; its rollouts may still be arriving. A collective."""
        known = bool(self._ahead) and self._ahead[0][0].number == number
        if not all(gather_object([known])):  # at the beginning, and after a resume
            self.close()
            generation = self.plan(number)
            self._sync(generation)
            self._submit(generation)
        return self._ahead.popleft()[0]

    def advance(self, current: Generation) -> None:
        """Sync weights and submit the next generation, now that `current` has arrived. A collective."""
        # Another rank may still wait for a later generation, which must end under the weights that it began with.
        if self._synced_for != current.number and all(gather_object([self._idle()])):
            self._sync(current)
        self._submit_next(current.number)

    def poll(self, current: int) -> None:
        """Receive what has arrived of generations after `current`, and submit the next one if there is room."""
        for generation, handle in self._ahead:
            self.receive(generation, handle.arrived())
        self._submit_next(current)

    def close(self) -> None:
        for _, handle in self._ahead:
            handle.cancel()
        self._ahead.clear()

    def _idle(self) -> bool:
        return not self._ahead or self._ahead[-1][1].done

    def _sync(self, generation: Generation) -> None:
        self.sync(generation.step)
        self._synced_for = generation.number

    def _submit_next(self, current: int) -> None:
        number = self._ahead[-1][0].number + 1 if self._ahead else current + 1
        fresh_enough = self._synced_for is not None and number - self._synced_for <= self.max_staleness
        if self._idle() and fresh_enough and (generation := self.plan(number)) is not None:
            self._submit(generation)

    def _submit(self, generation: Generation) -> None:
        handle = self.engine.submit(generation.requests, self.sampling)
        generation.arriving = handle
        self._ahead.append((generation, handle))
