"""Stopping a run from outside: signals that all ranks agree on, and a watchdog for one that stands still."""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from ..errors import EXIT_STALLED
from ..signals import SAME, SIGNALS

GRACE = 30.0  # seconds, at most, that a run which stood still is given to stir again and save


class StopRequest:
    """Whether this run was asked to stop, by a signal or by the file `asked`, which one rank looks for.

    `agreed` is the signal's name, once all ranks know of it.
    """

    def __init__(self, asked: Path | None):
        self.agreed: str | None = None
        self._asked = asked
        self._heard = 0
        self._when = 0.0
        # Of its own, on the CPU: asking a GPU would make it wait after every micro-step.
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if several else None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear the signals for as long as the context lasts, in the main thread."""
        before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def agree(self) -> bool:
        """Whether any rank was asked to. A collective, of one number."""
        if self._asked is not None and self._asked.exists():
            self.request(signal.SIGTERM)
            self._asked.unlink()
        heard = self._heard
        if self._group is not None:
            largest = torch.tensor([heard])
            dist.all_reduce(largest, dist.ReduceOp.MAX, self._group)
            heard = int(largest)
        if heard:
            self.agreed = signal.Signals(heard).name
        return bool(heard)

    def request(self, number: int) -> None:
        self._heard = self._heard or number

    def _hear(self, number: int, frame) -> None:
        now = time.monotonic()
        if self._heard and now - self._when > SAME:
            os._exit(128 + number)
        if not self._heard:
            self._when = now
            name = signal.Signals(number).name
            print(f"{name}: finishing this step, then saving. Once more to end at once.", file=sys.stderr, flush=True)
        self.request(number)


class Watchdog:
    """Ends this process when `beat` was not called for `seconds`: a hung collective, server or disk.

    The stacks of all threads go into `folder`, one file for each rank, which all have their own watchdog. A run that
    stirs again within `GRACE` seconds, or as long again, saves a checkpoint and stops; otherwise the process exits.
    """

    def __init__(self, seconds: float, folder: Path, rank: int, stop: StopRequest):
        self.seconds = seconds
        self.path = folder / f"stacks-rank{rank}.txt"
        self.stop = stop
        self._last = time.monotonic()
        self._over = threading.Event()

    def beat(self) -> None:
        self._last = time.monotonic()

    @contextmanager
    def watching(self) -> Iterator[None]:
        self.beat()
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() - self._last > self.seconds:
                return self._end()

    def _end(self) -> None:
        with self.path.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        said = f"stopped: nothing happened for {self.seconds:g} s; {self.path} holds what every thread was at."
        print(said, file=sys.stderr, flush=True)
        self.stop.request(signal.SIGTERM)
        if not self._over.wait(min(GRACE, self.seconds)):
            os._exit(EXIT_STALLED)
