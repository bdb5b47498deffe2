"""Prompts shared out among any number of processes, on any machines that see the same folder.

A shard is a range of prompts with a journal of its own. A process that holds the journal's lock works on it; the
kernel (or the file server) releases the lock when that process dies, and another continues after the last line.
No clock is used, and the number of processes need not be known. The file system must have locks that hold between
machines: NFS has, Lustre when mounted with `flock`.
"""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..files import mend_lines, read_lines

POLL_SECONDS = 1.0


@dataclass
class Shard:
    """The prompts from `begin` up to, not including, `end`."""

    begin: int
    end: int
    journal: Path
    whole: bool = False
    """As far as this process knows; a shard that is whole stays so."""

    def done(self) -> set[int]:
        """The ids of the prompts whose samples are in the journal."""
        mend_lines(self.journal)
        done = {line["prompt_id"] for line in read_lines(self.journal)}
        self.whole = len(done) == self.end - self.begin
        return done

    @contextmanager
    def held(self) -> Iterator[bool]:
        """Whether this process has the shard for as long as the context lasts."""
        with self.journal.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True


def shards(folder: Path, name: str, prompts: int, size: int | None) -> list[Shard]:
    """The shards of the generator `name`; a single one, in one file, if `size` is None."""
    if size is None:
        return [Shard(0, prompts, folder / f"{name}.jsonl")]
    starts = range(0, prompts, size)
    return [Shard(at, min(at + size, prompts), folder / f"{name}.{at // size:05d}.jsonl") for at in starts]


def claim(all_shards: list[Shard]) -> Iterator[tuple[Shard, set[int]]]:
    """Each shard that is incomplete and not claimed, with what is done of it; ends when all of them are whole.

    Waits while others hold what is left: one of them may die.
    """
    while missing := [shard for shard in all_shards if not shard.whole]:
        worked = False
        for shard in missing:
            with shard.held() as mine:
                if mine:
                    worked = True
                    done = shard.done()
                    if not shard.whole:
                        yield shard, done
                        shard.done()
        if not worked:
            time.sleep(POLL_SECONDS)
