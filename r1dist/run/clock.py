"""Seconds by phase of a training step, measured where they are spent, and how much of the machine was idle in them."""

import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


class PhaseClock:
    """Adds up the wall-clock seconds of named phases. A phase inside another is taken out of the outer one.

    On a GPU the work is asynchronous: a phase that ends without reading a result back is shown too short,
    and the next one too long.
    """

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self._idle: dict[str, float] = defaultdict(float)  # seconds of all processors, by phase
        self._open: list[str] = []
        self._since, self._idle_before = 0.0, 0.0

    def start(self, name: str) -> None:
        self._charge()
        self._open.append(name)

    def stop(self, name: str) -> None:
        """End the innermost phase, which must be `name`."""
        self._charge()
        innermost = self._open.pop()
        assert innermost == name, f"phase {name} ends inside {innermost}"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.start(name)
        try:
            yield
        finally:
            self.stop(name)

    def stop_if_running(self, name: str) -> None:
        if self._open and self._open[-1] == name:
            self.stop(name)

    def take(self) -> dict[str, float]:
        """Of the time since the last call, `seconds/<phase>`, and `idle/<phase>`: the share of the processors' time in
        which none of this machine's programs worked."""
        self._charge()
        taken = {f"seconds/{phase}": seconds for phase, seconds in self.seconds.items()}
        for phase, idle in self._idle.items():
            if self.seconds[phase] > 0:
                taken[f"idle/{phase}"] = min(1.0, idle / self.seconds[phase] / os.cpu_count())
        self.seconds, self._idle = defaultdict(float), defaultdict(float)
        return taken

    def _charge(self) -> None:
        now, times = time.perf_counter(), psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
            self._idle[self._open[-1]] += idle - self._idle_before
        self._since, self._idle_before = now, idle
