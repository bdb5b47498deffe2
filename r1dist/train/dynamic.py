"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): groups that teach nothing give way to other prompts'.

Where all rewards of a group are alike its advantages are zero. Simplified: as many groups as the neediest rank lacks
are made on every rank, and each rank uses its own.
"""

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from accelerate.utils import gather_object

from .microbatch import Batch, joined, rows_of

if TYPE_CHECKING:
    from .grpo import GRPOTrainer


def alike(rows: Sequence[Batch], size: int) -> list[int]:
    """The groups of `size` rows each whose advantages are all 0."""
    return [
        first // size
        for first in range(0, len(rows), size)
        if not any(row["advantages"].item() for row in rows[first : first + size])
    ]


def others(prompt_ids: Sequence[int], known: set[int], wanted: int, seed: str) -> list[int]:
    """Places in the dataset of up to `wanted` prompts that are not `known`, drawn by `seed`."""
    free = [place for place, prompt in enumerate(prompt_ids) if prompt not in known]
    return random.Random(seed).sample(free, min(wanted, len(free)))


class Resampler:
    """Replaces groups of a generation.

    Args:
        times: Generations at most that are made for that, each of no more groups than are wanted.
    """

    def __init__(self, trainer: "GRPOTrainer", times: int):
        self.trainer = trainer
        self.times = times

    def fill(self, asked: list[dict], scored: Batch, generate: Callable[[list[dict]], Batch]) -> Batch:
        """`scored`, as TRL makes it of the dataset's rows `asked`, with groups in place of those that are alike.

        `generate` scores other rows. A collective; every rank holds whole groups, and as many rows as before.
        """
        trainer, size = self.trainer, self.trainer.num_generations
        rows = rows_of(scored)
        known = set(gather_object([row["prompt_id"] for row in asked]))
        first, made = None, 0
        for attempt in range(self.times + 1):
            wanting = gather_object([len(alike(rows, size))])
            first = sum(wanting) if first is None else first
            if attempt == self.times or not max(wanting):
                break
            places = self._others(known, max(wanting), attempt)
            if not places:
                break
            fresh = [trainer.train_dataset[place] for place in places for _ in range(size)]
            known |= set(gather_object([row["prompt_id"] for row in fresh]))
            found = rows_of(generate(fresh))
            useless = set(alike(found, size))
            useful = [found[size * i : size * (i + 1)] for i in range(len(places)) if i not in useless]
            for group, replacement in zip(alike(rows, size), useful, strict=False):
                rows[size * group : size * (group + 1)] = replacement
            made += len(fresh)
        trainer.note("dynamic/alike", first * size / len(asked) / trainer.args.world_size)
        trainer.note("dynamic/left", sum(wanting) * size / len(asked) / trainer.args.world_size)
        trainer.note("dynamic/extra", made / len(asked))
        return self._batch(rows, scored) if made else scored

    def _others(self, known: set[int], each: int, attempt: int) -> list[int]:
        """This rank's share of new prompts; on every rank as many."""
        arguments, step = self.trainer.args, self.trainer.state.global_step
        ranks, rank = arguments.world_size, arguments.process_index
        seed = f"{arguments.seed}:{step}:{self.trainer.generation}:{attempt}"
        places = others(self.trainer.train_dataset["prompt_id"], known, each * ranks, seed)
        each = len(places) // ranks
        return places[rank * each : (rank + 1) * each]

    def _batch(self, rows: list[Batch], like: Batch) -> Batch:
        batch = joined(rows, self.trainer.grouping.pad_id, like["completion_ids"].device)
        tokens = self.trainer.accelerator.gather(batch["completion_mask"].sum()).sum()
        whole = {name: value for name, value in like.items() if not value.ndim}
        return {**batch, **whole, "num_items_in_batch": tokens}  # TRL takes the first for one of a row each
