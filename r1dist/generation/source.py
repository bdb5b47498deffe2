"""Complete generations, made when they are needed or ahead of the training."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from statistics import fmean
from typing import Any

from accelerate.utils import gather_object

from ..run.metrics import memory_gib
from ..run.reporting import Reporting
from .engine import Rollout, RolloutsLost, Sampling
from .lookahead import Generation, Lookahead


class GenerationSource:
    """Asks the engine for generations, and gives it the policy's weights.

    Args:
        engine: An `Engine`; an `AsyncEngine` where `max_staleness` is not 0.
        max_staleness: Generations that it may be ahead of the training.
        plan: The generation of that number, not yet made; None after the last one.
        arrived: Called with each rollout as it arrives, its generation and its place.
    """

    def __init__(
        self, engine: Any, sampling: Sampling, max_staleness: int, plan: Callable[[int], Generation | None],
        arrived: Callable[[Generation, int, Rollout], None], reporting: Reporting,
    ):  # fmt: skip
        self.engine = engine
        self.sampling = sampling
        self.plan = plan
        self.arrived = arrived
        self.reporting = reporting
        self._synced: int | None = None  # the optimizer step whose weights the engine has
        self._lookahead: Lookahead | None = None
        if max_staleness:
            self._lookahead = Lookahead(engine, sampling, max_staleness, plan, self._receive, self._sync)

    def take(self, number: int) -> Generation:
        """Generation `number` with all its rollouts. A collective.

        Where one rank gets no rollouts, every rank raises `RolloutsLost`.
        """
        if self._lookahead is None:
            generation = self.plan(number)
            if self._synced != generation.step:
                self._sync(generation.step)
            return self.generate(generation)
        generation = self._lookahead.take(number)
        self._collect(generation)
        ages = [generation.step - rollout.policy_version for rollout in generation.rollouts.values()]
        self.reporting.log("rollout/staleness", fmean(ages))
        self._lookahead.advance(generation)
        return generation

    def generate(self, generation: Generation) -> Generation:
        """`generation` with all its rollouts, made now with the weights that the engine has. Raises as `take`."""
        generation.arriving = self.engine.stream(generation.requests, self.sampling)
        self._collect(generation)
        return generation

    @contextmanager
    def with_weights(self, step: int) -> Iterator[Any]:
        """The engine with the policy's weights of optimizer step `step`, to ask for other rollouts. A collective.

        Not for a source with `max_staleness`.
        """
        if self._synced != step:
            self._sync(step)
        yield self.engine
        self.engine.end_generation()

    def poll(self, current: int) -> None:
        """Receive what has arrived of the generations after `current`."""
        if self._lookahead is not None:
            self._lookahead.poll(current)

    def end(self) -> None:
        """Nothing more is generated before the next `take`, unless ahead of the training."""
        if self._lookahead is None:
            self.engine.end_generation()

    def close(self) -> None:
        if self._lookahead is not None:
            self._lookahead.close()
        self.engine.close()

    def _sync(self, step: int) -> None:
        with self.reporting.clock.phase("sync"):
            self.engine.sync_weights(step)
        self._synced = step

    def _receive(self, generation: Generation, arrived: Iterable[tuple[int, Rollout]]) -> None:
        for place, rollout in arrived:
            generation.rollouts[place] = rollout
            self.arrived(generation, place, rollout)

    def _collect(self, generation: Generation) -> None:
        lost, log = None, self.reporting.log
        with self.reporting.clock.phase("generate"):
            try:
                self._receive(generation, generation.arriving)
            except RolloutsLost as error:
                lost = str(error)
            outcomes = gather_object([(lost, self.engine.metrics())])
        log("memory/generate", memory_gib())
        reasons = [reason for reason, _ in outcomes if reason is not None]
        if reasons:
            raise RolloutsLost(reasons[0])
        for name in sorted({name for _, metrics in outcomes for name in metrics}):
            log(name, sum(metrics.get(name, 0.0) for _, metrics in outcomes))
