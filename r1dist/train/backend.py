"""Where TRL's trainer asks for completions: our engine answers, at once or from what was begun before.

With `rollout.max_staleness: n` generations are made ahead of the training. Weights reach the servers only between
two generations; one is begun while it is at most n later than the one whose weights the servers hold.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object

from ..rollout.protocol import Engine, Request, Rollout, RolloutsLost

if TYPE_CHECKING:
    from .grpo import GRPOTrainer


@dataclass
class _Generation:
    """One that is being made, or was and waits for its turn."""

    number: int
    step: int
    """The optimizer step that it is for."""
    rows: list[dict]
    requests: list[Request]
    flight: Iterable[tuple[int, Rollout]]
    """A `Flight` where it is made ahead."""
    taken: dict[int, Rollout] = field(default_factory=dict)


class EngineBackend:
    """Stands where TRL keeps its vLLM client, and hands the work to the trainer's engine."""

    def __init__(self, trainer: "GRPOTrainer", engine: Engine, max_staleness: int):
        self.trainer = trainer
        self.engine = engine
        self.max_staleness = max_staleness
        self._ahead: deque[_Generation] = deque()
        self._holds = -1  # the generation before which the weights were synced

    def sync_weights(self) -> None:
        """TRL calls it before `generate` if the policy has moved."""
        if not self.max_staleness:
            self._sync()

    def generate(self, prompts: list[list[int]], images: Any, num_generations: int, profiler: Any) -> tuple:
        """TRL's order: prompt ids, completion ids, logprobs [B][T][1], and their ids (unused)."""
        trainer = self.trainer
        step, rows = trainer.state.global_step, trainer.generation_rows
        requests = trainer.requests(prompts, rows, num_generations, step)
        with profiler:
            if self.max_staleness and trainer.model.training and not trainer.resampling:
                rollouts = self._in_turn(step, rows, requests)
            else:
                stream = self.engine.stream(requests, trainer.sampling)
                rollouts = self._all_or_none(_Generation(trainer.generation, step, rows, requests, stream))
                if not self.max_staleness:
                    self.engine.rest()
        trainer.generated = rollouts
        completions = [rollout.token_ids for rollout in rollouts]
        logprobs = [[[logprob] for logprob in rollout.logprobs] for rollout in rollouts]
        return prompts, completions, logprobs, None

    def look(self) -> None:
        """Take in what has arrived of the generations ahead, so that its rewards begin, and begin the next one."""
        for generation in self._ahead:
            self._take(generation, generation.flight.arrived())
        self._depart()

    def close(self) -> None:
        for generation in self._ahead:
            generation.flight.cancel()
        self.engine.close()

    def _sync(self) -> None:
        with self.trainer.clock.phase("sync"):
            self.engine.sync_weights(self.trainer.state.global_step)
        self._holds = self.trainer.generation

    def _in_turn(self, step: int, rows: list[dict], requests: list[Request]) -> list[Rollout]:
        """This generation's rollouts; those of the next ones are under way when it returns."""
        trainer = self.trainer
        known = bool(self._ahead) and self._ahead[0].requests == requests
        if not all(gather_object([known])):  # at the beginning, and after a resume
            for generation in self._ahead:
                generation.flight.cancel()
            self._ahead.clear()
            self._sync()
            flight = self.engine.depart(requests, trainer.sampling)
            self._ahead.append(_Generation(trainer.generation, step, rows, requests, flight))
        rollouts = self._all_or_none(self._ahead.popleft())
        trainer.note("rollout/staleness", fmean(step - rollout.policy_version for rollout in rollouts))
        # Another rank may still be busy with a later one, which must end under the weights it began with.
        if self._holds < trainer.generation and all(gather_object([self._idle()])):
            self._sync()
        self._depart()
        return rollouts

    def _idle(self) -> bool:
        return not self._ahead or self._ahead[-1].flight.landed

    def _depart(self) -> None:
        """Begin the next generation, if the last is done and the weights are new enough for it."""
        trainer = self.trainer
        number = self._ahead[-1].number + 1 if self._ahead else trainer.generation + 1
        if not self.max_staleness or not self._idle() or number - self._holds > self.max_staleness:
            return
        if (rows := trainer.rows_of(number)) is None:
            return
        step = trainer.step_of(number)
        requests = trainer.requests(trainer.prompt_ids_of(rows), rows, trainer.num_generations, step)
        flight = self.engine.depart(requests, trainer.sampling)
        self._ahead.append(_Generation(number, step, rows, requests, flight))

    def _take(self, generation: _Generation, rollouts: Iterable[tuple[int, Rollout]]) -> None:
        for place, rollout in rollouts:
            generation.taken[place] = rollout
            self.trainer.begin_rewards(generation.step, generation.rows[place], rollout)

    def _all_or_none(self, generation: _Generation) -> list[Rollout]:
        """This rank's rollouts. Where one rank gets none, every rank raises `RolloutsLost`."""
        trainer, lost = self.trainer, None
        with trainer.clock.phase("generate"):
            try:
                self._take(generation, generation.flight)
            except RolloutsLost as error:
                lost = str(error)
            trainer.note_memory("generate")
            outcomes = gather_object([(lost, self.engine.metrics())])
        reasons = [reason for reason, _ in outcomes if reason is not None]
        if reasons:
            raise RolloutsLost(reasons[0])
        for name in sorted({name for _, metrics in outcomes for name in metrics}):
            trainer.note(name, sum(metrics.get(name, 0.0) for _, metrics in outcomes))
        return [generation.taken[place] for place in range(len(generation.requests))]
