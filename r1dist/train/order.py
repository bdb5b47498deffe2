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

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.theirs.shuffle:
            self.theirs.generator.manual_seed(self.theirs.seed + self.epoch)
        return iter(self.theirs)

    def __len__(self) -> int:
        return len(self.theirs)
