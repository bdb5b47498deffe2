"""Child processes of launchers: how they are asked to stop, end with their parent, and report their end."""

import ctypes
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import psutil

from ..files import ENDED, STOP
from ..signals import SAME, SIGNALS

LAST_LINES = 8


class Child(Protocol):
    """A process that can be asked to end."""

    def terminate(self) -> None: ...


def forget(folder: Path) -> None:
    """Remove what an earlier start, killed with its launcher, has left in a training's `folder`: how it ended, and
    a stop file that is older than this process."""
    (folder / ENDED).unlink(missing_ok=True)
    stop_file = folder / STOP
    if stop_file.exists() and stop_file.stat().st_mtime < psutil.Process().create_time():
        stop_file.unlink()


@contextmanager
def handing_on(name: str, process: Child, folder: Path | None, came: list[int] | None = None) -> Iterator[list[int]]:
    """Ask `process` to stop when we are asked to; yields the signals that came, after those of `came`.

    A second one, not the first one's echo, ends us at once.

    A training is asked by a file in its `folder`: launchers in between do not pass on every signal.
    Without a folder it is sent SIGTERM.
    """
    came = [] if came is None else came
    when = 0.0

    def hand_on() -> None:
        print(f"{signal.Signals(came[0]).name}: waiting for `{name}` to save and stop.", flush=True)
        if folder is None:
            process.terminate()
        else:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / STOP).touch()

    def hear(number: int, frame) -> None:
        nonlocal when
        if came and time.monotonic() - when < SAME:
            return
        came.append(number)
        when = time.monotonic()
        if len(came) > 1:
            os._exit(128 + number)  # the kernel ends the child with us
        hand_on()

    before = {number: signal.signal(number, hear) for number in SIGNALS}
    try:
        if came:
            when = when or time.monotonic()
            hand_on()
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came and folder is not None:
            (folder / STOP).unlink(missing_ok=True)  # it ended without having seen it


def end_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent dies, however it dies (Linux). For `preexec_fn`."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


def code_noted(folder: Path | None, code: int) -> int:
    """The exit code that a training wrote to its folder: its launcher's own is 1 in any case."""
    noted = None if folder is None else folder / ENDED
    return json.loads(noted.read_text())["code"] if noted is not None and noted.exists() else code


def last_words(*logs: tuple[Path, int]) -> list[str]:
    """Why the command that wrote `logs` ended; else the logs' last lines. The numbers are bytes to skip."""
    texts = (log.read_bytes()[skip:].decode(errors="replace") for log, skip in logs if log.exists())
    # torchrun puts `[default0]:` before what its processes print
    lines = [re.sub(r"^\[\w+\]:\s?", "", line) for text in texts for line in text.splitlines()]
    reasons = [line for line in lines[-200:] if line.startswith(("error: ", "stopped: "))]
    return (list(dict.fromkeys(reasons)) or lines)[-LAST_LINES:]  # several processes end for the same reason
