"""The dataset's rows of each generation, and the requests for their rollouts, as one rank asks them."""

import random
from dataclasses import dataclass

from datasets import Dataset

from ..data.order import PromptOrder
from ..generation.engine import Request, sample_seed
from ..generation.lookahead import Generation
from ..run.schedule import GenerationSchedule


@dataclass(frozen=True)
class Prompts:
    """Rows with `prompt`, `prompt_ids` and `prompt_id`; a group is the rollouts of one prompt."""

    dataset: Dataset
    order: PromptOrder
    schedule: GenerationSchedule
    last_step: int
    """Nothing is generated for this optimizer step and later ones."""
    group: int
    """Rollouts of a group (`num_generations`)."""
    rollouts: int
    """Of a generation, on this rank."""
    seed: int
    rank: int
    ranks: int

    def generation(self, number: int) -> Generation | None:
        """The generation of that number, counted from the run's beginning; None after the last one."""
        if self.schedule.step_of(number) >= self.last_step:
            return None
        first = self.rollouts * self.rank
        return self.plan(number, self._rows(self.order.generation(number)[first : first + self.rollouts]))

    def plan(self, number: int, rows: list[dict]) -> Generation:
        """The generation of `rows`, one for each rollout; groups follow one another over the ranks."""
        step, first = self.schedule.step_of(number), self.rank * len(rows)
        requests = []
        for place, row in enumerate(rows, start=first):
            index = place % self.group
            seed = sample_seed(self.seed, step, row["prompt_id"], index)
            requests.append(Request(row["prompt_ids"], row["prompt_id"], index, seed))
        return Generation(number, step, rows, requests)

    def ids_for_step(self, step: int) -> set[int]:
        """The prompts, of all ranks, that the order has for an optimizer step."""
        places = [place for number in self.schedule.generations_of(step) for place in self.order.generation(number)]
        return {row["prompt_id"] for row in self._rows(places)}

    def unused(self, used: set[int], groups: int, number: int, attempt: int) -> list[dict]:
        """This rank's rows of up to `groups` prompts not in `used`, as many on every rank, drawn by the seed."""
        free = [place for place, prompt in enumerate(self.dataset["prompt_id"]) if prompt not in used]
        draw = random.Random(f"{self.seed}:{self.schedule.step_of(number)}:{number}:{attempt}")
        places = draw.sample(free, min(groups * self.ranks, len(free)))
        each = len(places) // self.ranks
        mine = places[self.rank * each : (self.rank + 1) * each]
        return self._rows([place for place in mine for _ in range(self.group)])

    def _rows(self, places: list[int]) -> list[dict]:
        distinct = list(dict.fromkeys(places))
        rows = dict(zip(distinct, self.dataset.select(distinct), strict=True))
        return [rows[place] for place in places]
