"""The metrics of an optimizer step, gathered over the ranks once, at its end."""

import resource
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from accelerate.utils import gather_object


@dataclass
class Metrics:
    """Means and extremes, e.g. of one micro-batch."""

    means: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Name -> (sum, count)."""
    minima: dict[str, torch.Tensor] = field(default_factory=dict)
    maxima: dict[str, torch.Tensor] = field(default_factory=dict)

    def add_mean(self, name: str, values: torch.Tensor, mask: torch.Tensor) -> None:
        """Of `values` [B, T] over the tokens of `mask`, or of values [B, 1] over the sequences."""
        mask = torch.ones_like(values) if values.size(1) == 1 else mask
        self.means[name] = ((values.detach() * mask).sum(), mask.sum())


class StepMetrics:
    """Collects the metrics of all micro-batches of a step."""

    def __init__(self):
        self._means: dict[str, list[torch.Tensor]] = defaultdict(list)  # pairs (sum, count), [2] each
        self._minima: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._maxima: dict[str, list[torch.Tensor]] = defaultdict(list)

    def add(self, metrics: Metrics) -> None:
        for name, pair in metrics.means.items():
            self._means[name].append(torch.stack([value.detach().float() for value in pair]))
        for name, value in metrics.minima.items():
            self._minima[name].append(value)
        for name, value in metrics.maxima.items():
            self._maxima[name].append(value)

    def gather(self) -> dict[str, float]:
        """Over all ranks and since the last call: means weighted by their counts, and extremes. A collective."""
        local = {
            "mean": {name: torch.stack(pairs).sum(0).tolist() for name, pairs in self._means.items()},
            "min": {name: torch.stack(values).min().item() for name, values in self._minima.items()},
            "max": {name: torch.stack(values).max().item() for name, values in self._maxima.items()},
        }
        for collected in (self._means, self._minima, self._maxima):
            collected.clear()
        ranks = gather_object([local])
        found = {}
        for name in _names(ranks, "mean"):
            total, count = map(sum, zip(*(rank["mean"][name] for rank in ranks if name in rank["mean"]), strict=True))
            found[name] = total / max(count, 1.0)
        for kind, best in (("min", min), ("max", max)):
            for name in _names(ranks, kind):
                found[name] = best(rank[kind][name] for rank in ranks if name in rank[kind])
        return found


def _names(ranks: list[dict], kind: str) -> list[str]:
    return list(dict.fromkeys(name for rank in ranks for name in rank[kind]))


def memory_gib() -> float:
    """GiB in use on this GPU by all processes (allocators keep their peak); without a GPU, this process's peak."""
    if not torch.cuda.is_available():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30
