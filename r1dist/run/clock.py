"""Seconds by phase of a training step, measured where they are spent."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class PhaseClock:
    """Adds up the wall-clock seconds of named phases. A phase inside another is taken out of the outer one.

    On a GPU the work is asynchronous: a phase that ends without reading a result back is shown too short,
    and the next one too long.
    """

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

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
        """The seconds since the last call, by phase."""
        self._charge()
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now
