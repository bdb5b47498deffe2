"""The order of prompts, as a function of the seed, the epoch, and how the prompts went before."""

import random
from collections import deque
from collections.abc import Iterator

from torch.utils.data import Sampler
from trl.trainer.utils import RepeatSampler

from .curriculum import Verdict


class SeededOrder(Sampler):
    """TRL's sampler, shuffled by seed + epoch.

    By itself it shuffles each epoch with what the one before left of its generator, so a run that is taken up in a
    later epoch would see the first one's order again. The first epoch's order is TRL's.

    Prompts that are `verdict.unfit` give way to fit ones, which then come more than once in an epoch, but never twice
    in one generation: there both would draw the same samples. Where there is none left, the unfit prompt stays.
    """

    def __init__(self, theirs: RepeatSampler):
        self.theirs = theirs
        self.epoch = 0
        self.verdict = Verdict()
        self._known: tuple[int, list[int]] = (-1, [])

    @property
    def generations(self) -> int:
        """Of an epoch."""
        return self.theirs.num_samples // self.theirs.batch_size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.theirs.shuffle:
            self.theirs.generator.manual_seed(self.theirs.seed + self.epoch)
        return self._replaced(list(self.theirs)) if self.verdict.fit else iter(self.theirs)

    def rows_of(self, generation: int, rows: int) -> list[int]:
        """The indices of the generation of that number, counted from the run's beginning; `rows` over all ranks."""
        each = rows * self.theirs.repeat_count
        epoch, place = divmod(generation * each, len(self))
        if epoch != self._known[0]:
            before = self.theirs.generator.get_state() if self.theirs.shuffle else None
            epoch_now, self.epoch = self.epoch, epoch
            self._known = (epoch, list(self))
            self.epoch = epoch_now
            if before is not None:
                self.theirs.generator.set_state(before)
        return self._known[1][place : place + rows]

    def _replaced(self, order: list[int]) -> Iterator[int]:
        verdict, theirs = self.verdict, self.theirs
        fit = deque(random.Random(f"{theirs.seed}:{self.epoch}").sample(verdict.fit, len(verdict.fit)))
        generation = theirs.batch_size * theirs.mini_repeat_count * theirs.repeat_count
        for start in range(0, len(order), generation):
            places = order[start : start + generation]
            present, instead = set(places), {}
            for place in dict.fromkeys(places):
                if place in verdict.unfit and (free := next((p for p in fit if p not in present), None)) is not None:
                    fit.remove(free)
                    fit.append(free)
                    present.add(free)
                    instead[place] = free
            yield from (instead.get(place, place) for place in places)

    def __len__(self) -> int:
        return len(self.theirs)
