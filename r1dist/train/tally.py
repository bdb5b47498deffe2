"""What ranks log of a step, brought together once.

TRL's loss asks all ranks for each of its metrics, for each micro-batch, and waits. Here each rank keeps its own sums
until the optimizer step is over. TRL also hands all prompts and completions to every rank, wanted or not.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from trl.trainer import grpo_trainer

LOWEST, HIGHEST = ("_min", "/min"), ("_max", "/max")
"""How the name of a metric ends that is an extreme. All others are means."""


@dataclass
class Tally:
    """Sums with counts, and extremes, by name."""

    sums: dict[str, list[torch.Tensor]] = field(default_factory=lambda: defaultdict(list))
    """Pairs (sum, count), [2] each."""
    values: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, name: str, total: torch.Tensor, count: torch.Tensor) -> None:
        self.sums[name].append(torch.stack([total.detach().float(), count.detach().float()]))

    def settle(self) -> dict[str, float]:
        """Over all ranks and since the last call: means weighted by their counts, and extremes. A collective."""
        sums = {name: torch.stack(pairs).sum(0).tolist() for name, pairs in self.sums.items()}
        ranks = gather_object([(sums, dict(self.values))])
        self.sums.clear()
        self.values.clear()
        found = {}
        for name in {name: None for theirs, _ in ranks for name in theirs}:
            total, count = map(sum, zip(*(theirs[name] for theirs, _ in ranks if name in theirs), strict=True))
            found[name] = total / max(count, 1.0)
        for name in {name: None for _, values in ranks for name in values}:
            known = [x for _, values in ranks for x in values.get(name, []) if x == x]
            join = min if name.endswith(LOWEST) else max if name.endswith(HIGHEST) else _mean
            found[name] = join(known) if known else float("nan")
        return found

    @contextmanager
    def instead_of(self, accelerator: Accelerator, metrics: dict[str, Any]) -> Iterator[None]:
        """Within, TRL's loss writes its metrics here and waits for nobody.

        It writes `metrics["train"][name].append(f(accelerator.reduce([sum, count])))`: the name is looked up before
        its value is asked for. `gather` serves its extremes only.
        """
        theirs, kept = metrics["train"], _Names()

        def reduce(pair: torch.Tensor, reduction: str = "mean", **_: Any) -> torch.Tensor:
            self.add(kept.last, *pair)
            kept.summed.add(kept.last)
            return pair

        metrics["train"] = kept
        accelerator.reduce, accelerator.gather = reduce, lambda tensor: tensor
        try:
            yield
        finally:
            metrics["train"] = theirs
            del accelerator.reduce, accelerator.gather
        for name, values in kept.items():
            if name not in kept.summed:
                self.values[name] += values


@contextmanager
def texts_gathered(wanted: bool) -> Iterator[None]:
    """Within, TRL gathers prompts and completions only if they are `wanted`: its `log_completions` reads them."""
    theirs = grpo_trainer.gather_object
    grpo_trainer.gather_object = theirs if wanted else list
    try:
        yield
    finally:
        grpo_trainer.gather_object = theirs


class _Names(defaultdict):
    """Lists by name; knows the name that was asked for last, and which are sums."""

    def __init__(self):
        super().__init__(list)
        self.last = ""
        self.summed: set[str] = set()

    def __getitem__(self, name: str) -> list[float]:
        self.last = name
        return super().__getitem__(name)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
