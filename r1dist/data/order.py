"""Which prompts each generation asks, as a function of the seed, the epoch and the pass rates."""

import random
from collections import deque
from collections.abc import Iterator

from torch.utils.data import Sampler
from trl.trainer.utils import RepeatSampler

from .curriculum import PassRateFilter


class PromptOrder(Sampler):
    """TRL's sampler, shuffled by seed + epoch.

    TRL's own shuffles each epoch with the generator state that the one before left, which a run resumed in a later
    epoch does not have. The first epoch's order is TRL's.

    Prompts that `pass_rate_filter` drops are replaced by ones that it keeps, which then come more than once in an
    epoch, but not twice in one optimizer step, where both would draw the same samples. If none is left, the prompt
    stays.

    Args:
        per_step: Generations of an optimizer step, where it has several.
    """

    def __init__(self, sampler: RepeatSampler, per_step: int = 1):
        self.sampler = sampler
        self.per_step = per_step
        self.epoch = 0
        self.pass_rate_filter = PassRateFilter()
        self._cached: tuple[int, PassRateFilter, list[int]] | None = None

    @property
    def generations(self) -> int:
        """Of an epoch."""
        return self.sampler.num_samples // self.sampler.batch_size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices(self.epoch))

    def __len__(self) -> int:
        return len(self.sampler)

    def indices(self, epoch: int) -> list[int]:
        """The dataset's indices in the order of an epoch, each rollout's own, repeated for each micro-step."""
        if self._cached is None or self._cached[:2] != (epoch, self.pass_rate_filter):
            if self.sampler.shuffle:
                self.sampler.generator.manual_seed(self.sampler.seed + epoch)
            order = list(self.sampler)
            order = self._replace_dropped(order, epoch) if self.pass_rate_filter.keep else order
            self._cached = (epoch, self.pass_rate_filter, order)
        return self._cached[2]

    def generation(self, number: int) -> list[int]:
        """The indices of the rollouts of a generation, over all ranks; counted from the run's beginning."""
        rollouts = self.sampler.batch_size * self.sampler.mini_repeat_count
        epoch, place = divmod(number, self.generations)
        first = place * rollouts * self.sampler.repeat_count
        return self.indices(epoch)[first : first + rollouts]

    def _replace_dropped(self, order: list[int], epoch: int) -> list[int]:
        keep = self.pass_rate_filter.keep
        spare = deque(random.Random(f"{self.sampler.seed}:{epoch}").sample(keep, len(keep)))
        size = self.sampler.batch_size * self.sampler.mini_repeat_count * self.sampler.repeat_count * self.per_step
        found = []
        for start in range(0, len(order), size):
            places = order[start : start + size]
            present, replacement = set(places), {}
            for place in dict.fromkeys(places):
                if place not in self.pass_rate_filter.drop:
                    continue
                if (free := next((p for p in spare if p not in present), None)) is not None:
                    spare.remove(free)
                    spare.append(free)
                    present.add(free)
                    replacement[place] = free
            found += [replacement.get(place, place) for place in places]
        return found
