"""Verifiers that misbehave on demand, for the pool's workers to import."""

import hashlib
import os
import signal
import time
from pathlib import Path

from r1dist.errors import VerifiersBroken


def digest(completion: str, row: dict) -> float:
    """A number that depends on the item alone, after a moment of work."""
    value = completion
    for _ in range(200):
        value = hashlib.sha256(f"{value}{row}".encode()).hexdigest()
    return int(value[:8], 16) / 16**8


def obey(completion: str, row: dict) -> float | None:
    """Does what the completion says."""
    match completion.split():
        case []:
            return None if row.get("unscorable") else 0.0
        case ["sleep"]:
            time.sleep(600)
        case ["eat"]:
            return float(len(bytearray(4 * 2**30)))
        case ["die"]:
            os.kill(os.getpid(), signal.SIGKILL)
        case ["die", "once", file]:
            if not Path(file).exists():
                Path(file).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        case ["raise"]:
            raise ZeroDivisionError("a bug")
        case ["wait", "for", file]:
            if not Path(file).exists():
                raise VerifiersBroken("the sandbox is down.")
    return 1.0


def slow(completion: str, row: dict) -> float:
    time.sleep(0.5 if completion else 0)
    return 1.0


VERIFIERS = {"digest": digest, "obey": obey}
