"""Rollouts that servers are making, as the trainer's thread takes them."""

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future

from ..engine import Rollout


class QueueHandle:
    """A `GenerationHandle` over a queue that the engine's thread fills.

    `weights`: A lock that the caller holds, released while it waits.
    """

    def __init__(self, producer: Future, finished: queue.SimpleQueue, weights: threading.Lock):
        self._producer = producer
        self._finished = finished
        self._weights = weights
        self.done = False
        """Whether nothing more will come."""

    def __iter__(self) -> Iterator[tuple[int, Rollout]]:
        while not self.done:
            self._weights.release()
            try:
                item = self._finished.get()
            finally:
                self._weights.acquire()
            yield from self._received(item)
        self._producer.result()

    def arrived(self) -> Iterator[tuple[int, Rollout]]:
        """Those that have arrived; does not wait, raises nothing."""
        while not self.done:
            try:
                item = self._finished.get_nowait()
            except queue.Empty:
                return
            yield from self._received(item)

    def cancel(self) -> None:
        self._producer.cancel()

    def _received(self, item: tuple[int, Rollout] | None) -> Iterator[tuple[int, Rollout]]:
        if item is None:
            self.done = True
        else:
            yield item
