"""Scores from worker processes: an answer that hangs, fills memory or kills its process costs its own limit only.

Every worker has its own pipe and thread. If one dies, only its current item is lost, and that item is verified again.
(In pools that share a queue, a worker killed while it holds the queue's lock breaks them all.) A score depends on the
item alone, not on the order or the number of workers.

Three outcomes: a score; None for what cannot be scored; `VerifiersBroken` when verification itself does not work:
that must not become a batch of zeros.
"""

import multiprocessing
import os
import queue
import resource
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from typing import Any, NamedTuple

from ..config import Verify
from ..errors import VerifiersBroken

DEATHS = 3  # an item that was being verified when this many workers died has killed them
BACK_OFF = 15.0  # seconds between two tries, at most, while nothing can be verified
START_SECONDS = 120.0
SLOW_AT_FIRST = ("accuracy", "language", "task")
"""Verifiers that are slow at first: the fork server imports a module `warm_*`, which does what takes so long."""
MIB = 2**20

Verifier = Callable[..., float | None]
"""Called with a completion, its row, and by name with what parameters it takes."""


class Item(NamedTuple):
    """What a worker is asked: the score of `completion` by the verifier `name`; for a function of the user's, the
    scores of several."""

    name: str
    completion: str | list[str]
    row: dict | list[dict]
    parameters: dict[str, Any]
    of_user: bool = False


class Died(Exception):
    """The worker is gone, and not by our hand."""


class Overran(Exception):
    """The item took more than its seconds or its memory."""


class Pool:
    """Scores by `verifiers`, in worker processes.

    Args:
        verifiers: Name -> function, which workers import by its module and name. It may raise `VerifiersBroken`.
        limits: What an item may cost, how many workers, how long to wait for verifiers that are down.
        share: Among how many processes the machine's cores are divided.

    An item beyond its limits scores 0, or None if its row cannot even be scored with an empty completion; a `call`
    raises `Overran`. `counts`
    holds how often an item overran, a worker died, and verifying was broken. Use it as a context, or `close` it.
    """

    def __init__(self, verifiers: dict[str, Verifier], limits: Verify, share: int = 1):
        self.verifiers = verifiers
        self.limits = limits
        self.counts: Counter[str] = Counter()
        self._items: queue.SimpleQueue = queue.SimpleQueue()
        self._broken_since: float | None = None
        self._closed = threading.Event()
        self._context = multiprocessing.get_context("forkserver")
        # What a worker needs is imported once, in the fork server, so that one that replaces another is there at once.
        modules = [verifier.__module__ for verifier in verifiers.values()]
        warm = [f"{__package__}.warm_{name}" for name in verifiers if name in SLOW_AT_FIRST]
        self._context.set_forkserver_preload([__name__, *modules, *warm])
        workers = limits.workers or max(1, len(os.sched_getaffinity(0)) // share)
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; what is still waiting is dropped."""
        self._closed.set()
        while not self._items.empty():
            self._items.get()
        for _ in self._threads:
            self._items.put(None)
        for thread in self._threads:
            thread.join()

    def submit(self, name: str, completion: str, row: dict, **parameters: Any) -> Future:
        """The score to come of `completion`; its `result` raises `VerifiersBroken`, or what the verifier raised."""
        future: Future = Future()
        self._items.put((future, Item(name, completion, row, parameters)))
        return future

    def call(self, name: str, completions: list[str], rows: list[dict], parameters: dict[str, Any]) -> Future:
        """The scores to come by the user's function `name`; `result` raises `Overran`, too."""
        future: Future = Future()
        self._items.put((future, Item(name, completions, rows, parameters, of_user=True)))
        return future

    def scores(
        self, name: str, completions: Sequence[str], rows: Sequence[dict], **parameters: Any
    ) -> list[float | None]:
        """The scores in the order of `completions`. Raises as `submit`'s futures do."""
        futures = [self.submit(name, text, row, **parameters) for text, row in zip(completions, rows, strict=True)]
        return [future.result() for future in futures]

    def _serve(self) -> None:
        """One worker's life, and that of those that follow it."""
        worker = _Worker(self._context, self.verifiers, self.limits)
        while (asked := self._items.get()) is not None:
            future, item = asked
            try:
                future.set_result(self._score(worker, item))
            except Exception as error:  # whatever it is, it belongs to whoever waits for the score
                future.set_exception(error)
        worker.end()

    def _score(self, worker: "_Worker", item: Item) -> float | None:
        waited = 1.0
        while True:
            try:
                score = self._within_limits(worker, item)
                self._broken_since = None
                return score
            except VerifiersBroken as error:
                self.counts["broken"] += 1
                self._broken_since = self._broken_since or time.monotonic()
                tried = time.monotonic() - self._broken_since
                if tried + waited > self.limits.retry_timeout or self._closed.wait(waited):
                    raise VerifiersBroken(f"{error} (tried for {tried:.0f} s)") from error
                waited = min(2 * waited, BACK_OFF)

    def _within_limits(self, worker: "_Worker", item: Item) -> float | None:
        try:
            return self._asked_again(worker, item)
        except Overran:
            self.counts["overran"] += 1
            if item.of_user:  # whether the completion is to blame, or the function, nobody knows
                raise
        try:
            # A row with a gold answer that cannot be parsed is unscorable, not wrong.
            unscorable = self._asked_again(worker, item._replace(completion="")) is None
        except Overran:
            unscorable = True
        return None if unscorable else 0.0

    def _asked_again(self, worker: "_Worker", item: Item) -> float | None:
        for _ in range(DEATHS):
            try:
                return worker.ask(item, self.limits.of(item.name))
            except Died:
                self.counts["died"] += 1
        raise Overran


class _Worker:
    """A process, and another in its place whenever it is gone."""

    def __init__(self, context: Any, verifiers: dict[str, Verifier], limits: Verify):
        self._arguments = (context, verifiers, limits)
        self._process: _Process | None = None
        self._spare: _Process | None = None

    def ask(self, item: Item, seconds: float) -> float | None:
        """The verifier's score. Raises `Died`, `Overran`, `VerifiersBroken`, or what the verifier raised."""
        if self._process is None:
            self._process = self._up()
        try:
            self._process.pipe.send(item)
            if not self._answers(seconds):
                self._drop()
                raise Overran
            score, error = self._process.pipe.recv()
        except (EOFError, OSError) as gone:
            self._drop()
            raise Died from gone
        if isinstance(error, Overran):
            self._drop()  # what is left of its memory is of no use
        if error is not None:
            raise error
        return score

    def end(self) -> None:
        for process in (self._process, self._spare):
            if process is not None:
                process.end()
        self._process = self._spare = None

    def _answers(self, seconds: float) -> bool:
        """Whether an answer comes in time. What has taken half of it mostly takes all: a spare begins to come up."""
        began = time.monotonic()
        if self._process.pipe.poll(seconds / 2):
            return True
        self._spare = self._spare or _Process(*self._arguments)
        return self._process.pipe.poll(max(0.0, began + seconds - time.monotonic()))

    def _drop(self) -> None:
        self._process.end()
        self._process = None

    def _up(self) -> "_Process":
        spare, self._spare = self._spare, None  # which may have been killed while it waited
        for process in (spare, None):
            process = process or _Process(*self._arguments)
            if process.ready():
                return process
            process.end()
        raise VerifiersBroken("a verifier's worker process does not start; see what it wrote above.")


class _Process:
    """A worker process that is coming up, or is up, and our end of its pipe."""

    def __init__(self, context: Any, verifiers: dict[str, Verifier], limits: Verify):
        self.pipe, child_end = context.Pipe()
        self._process = context.Process(target=_work, args=(child_end, verifiers, limits), daemon=True)
        self._process.start()
        child_end.close()

    def ready(self) -> bool:
        """Waits for it to be up; whether it is."""
        try:
            return self.pipe.poll(START_SECONDS) and self.pipe.recv()
        except (EOFError, OSError):
            return False

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _work(pipe: Connection, verifiers: dict[str, Verifier], limits: Verify) -> None:
    """Answer one item after another, until the pipe closes."""
    threading.Thread(target=_end_with_trainer, daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # for the trainer to hear, which still needs its workers
    # The soft limit alone: a sandbox that a verifier starts has limits of its own.
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + limits.memory_mib * MIB, hard))
    pipe.send(True)
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        # Code that holds the interpreter's lock lets no thread run. This clock's signal ends the process all the same.
        signal.setitimer(signal.ITIMER_PROF, 2 * limits.of(item.name))
        try:
            outcome = (verifiers[item.name](item.completion, item.row, **item.parameters), None)
        except (MemoryError, RecursionError):
            outcome = (None, Overran())
        except Exception as error:  # handed on to whoever asked
            outcome = (None, error)
        signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.send(outcome)


def _end_with_trainer() -> None:
    wait_for([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _address_space() -> int:
    """Bytes that this process has mapped."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
