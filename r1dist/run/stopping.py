"""Stopping a run: signals that all ranks agree on, and a watchdog for a run that makes no progress."""

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

GRACE = 30.0  # seconds, at most, in which a run that stalled may make progress again and save


class StopRequest:
    """Whether this run was asked to stop, by a signal or by the file `stop_file`, which one rank looks for.

    `agreed` is the signal's name, once all ranks know of it.
    """

    def __init__(self, stop_file: Path | None):
        self.agreed: str | None = None
        self._stop_file = stop_file
        self._signal = 0
        self._received_at = 0.0
        # A group of its own, on the CPU: asking a GPU would make it wait after every micro-step.
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if several else None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside the context, in the main thread."""
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def agree(self) -> bool:
        """Whether any rank was asked to stop. A collective, of one number."""
        if self._stop_file is not None and self._stop_file.exists():
            self.request(signal.SIGTERM)
            self._stop_file.unlink()
        received = self._signal
        if self._group is not None:
            largest = torch.tensor([received])
            dist.all_reduce(largest, dist.ReduceOp.MAX, self._group)
            received = int(largest)
        if received:
            self.agreed = signal.Signals(received).name
        return bool(received)

    def request(self, number: int) -> None:
        self._signal = self._signal or number

    def _handle(self, number: int, frame) -> None:
        now = time.monotonic()
        if self._signal and now - self._received_at > SAME:
            os._exit(128 + number)
        if not self._signal:
            self._received_at = now
            name = signal.Signals(number).name
            print(f"{name}: finishing this step, then saving. Once more to end at once.", file=sys.stderr, flush=True)
        self.request(number)


class Watchdog:
    """Ends this process when there was no `heartbeat` for `seconds`: a hung collective, server or disk.

    Every rank has its own, and writes the stacks of all its threads to a file in `folder`. A run that makes progress
    again within `GRACE` seconds (or `seconds`, if fewer) saves a checkpoint and stops; otherwise the process exits.
    """

    def __init__(self, seconds: float, folder: Path, rank: int, stop: StopRequest):
        self.seconds = seconds
        self.path = folder / f"stacks-rank{rank}.txt"
        self.stop = stop
        self._last = time.monotonic()
        self._over = threading.Event()

    def heartbeat(self) -> None:
        self._last = time.monotonic()

    @contextmanager
    def watching(self) -> Iterator[None]:
        self.heartbeat()
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
        message = f"stopped: no progress for {self.seconds:g} s; {self.path} holds the stacks of all threads."
        print(message, file=sys.stderr, flush=True)
        self.stop.request(signal.SIGTERM)
        if not self._over.wait(min(GRACE, self.seconds)):
            os._exit(EXIT_STALLED)
