"""Locks that builds of DeepSpeed's extensions have left behind."""

import os
import time
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

from ..errors import UserError

BUILD_SECONDS = 900.0
"""Longer than any of DeepSpeed's extensions takes to build."""


def check_locks() -> None:
    """Raises `UserError` for a lock that is too old to be a build's: torch would wait for it, for ever and in silence.

    torch leaves it behind where a build is killed.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in (*root.glob("*/lock"), *root.glob("*/*/lock")):
        try:
            seconds = time.time() - lock.stat().st_mtime
        except FileNotFoundError:  # that build has just ended
            continue
        if seconds > BUILD_SECONDS:
            raise UserError(
                f"A build of DeepSpeed's extension {lock.parent.name} was cut off {seconds // 60:.0f} minutes ago and "
                f"left its lock, for which this run would wait for ever.\nDelete {lock}"
            )
