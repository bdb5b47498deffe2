"""The order of prompts, as a function of the seed and the epoch."""

from collections.abc import Iterator

from torch.utils.data import Sampler
from trl.trainer.utils import RepeatSampler


class SeededOrder(Sampler):
    """TRL's sampler, shuffled by seed + epoch.

    By itself it shuffles each epoch with what the one before left of its generator, so a run that is taken up in a
    later epoch would see the first one's order again. The first epoch's order is TRL's.
    """

    def __init__(self, theirs: RepeatSampler):
        self.theirs = theirs
        self.epoch = 0
        self._known: tuple[int, list[int]] = (-1, [])

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.theirs.shuffle:
            self.theirs.generator.manual_seed(self.theirs.seed + self.epoch)
        return iter(self.theirs)

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

    def __len__(self) -> int:
        return len(self.theirs)
