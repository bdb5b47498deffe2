"""Folders of weights in memory that many share: each is named after its process, so that none is left behind."""

import os
import secrets
import shutil
import socket
from pathlib import Path

import psutil

EVERYBODYS = "r1dist-weights-"
PREFIX = f"{EVERYBODYS}{socket.gethostname()}"


def own_folder(parent: Path) -> Path:
    """A name in `parent` that belongs to this process."""
    return parent / f"{PREFIX}-{os.getpid()}-{secrets.token_hex(4)}"


def sweep(folder: Path) -> None:
    """Remove what this machine's runs that were killed have left in `folder`."""
    for left in folder.glob(f"{PREFIX}-*"):
        pid = int(left.name.split("-")[-2])
        if left.stat().st_uid == os.getuid() and not psutil.pid_exists(pid):
            shutil.rmtree(left, ignore_errors=True)


def clear(folder: Path) -> None:
    """Remove what any machine has left in `folder`, which belongs to one run that is not at work."""
    for left in folder.glob(f"{EVERYBODYS}*"):
        shutil.rmtree(left)
