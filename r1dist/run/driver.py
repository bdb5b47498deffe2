"""NVIDIA's driver on this machine: which GPUs it sees, and whether this torch can use them."""

import csv
import os
import subprocess
from dataclasses import dataclass

import torch

from ..errors import UserError

# The oldest driver for Linux of each major CUDA version, by NVIDIA's table of minor-version compatibility.
OLDEST_DRIVER = {"11": "450.80.02", "12": "525.60.13", "13": "580.65.06"}
SECONDS = 30


@dataclass(frozen=True)
class Card:
    """A GPU as the driver sees it."""

    driver: str
    name: str
    total_gib: float
    free_gib: float


def driver_cards() -> list[Card]:
    """The GPUs that `nvidia-smi` lists; none where it is not installed or finds no driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version,name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=SECONDS)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return []
    if done.returncode:
        return []
    rows = [row for row in csv.reader(done.stdout.splitlines(), skipinitialspace=True) if len(row) == 4]
    return [Card(driver, name, _gib(total), _gib(free)) for driver, name, total, free in rows]


def needed_driver() -> str | None:
    """The oldest driver that this torch can use; None for a build without CUDA, or of an unknown CUDA."""
    return OLDEST_DRIVER.get((torch.version.cuda or "").partition(".")[0])


def unusable_gpu() -> str | None:
    """Why torch cannot use a GPU that the driver sees, and the mend, in two lines; None where there is no such GPU."""
    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    cards = driver_cards()
    if not cards:
        return None
    card, needed = cards[0], needed_driver()
    if torch.version.cuda is None:
        why, mend = f"torch {torch.__version__} is built without CUDA", "`make setup GPU=1` installs one with CUDA"
    elif needed is not None and _parts(card.driver) < _parts(needed):
        why = f"the driver {card.driver} is too old for its CUDA {torch.version.cuda}, which needs {needed} or newer"
        mend = "Update the driver"
    else:
        why, mend = _torch_s_reason(), f"The driver is {card.driver}; look at what `nvidia-smi` says"
    return (
        f"nvidia-smi finds {card.name}, but torch {torch.__version__} cannot use it: {why}.\n"
        f"{mend}. Or work on CPUs: `use_cpu: true` for a training, else an empty CUDA_VISIBLE_DEVICES."
    )


def require_usable_gpu(use_cpu: bool = False) -> None:
    """Raises `UserError` where the driver sees a GPU that torch cannot use, unless CPUs are asked for."""
    reason = None if use_cpu else unusable_gpu()
    if reason is not None:
        raise UserError(reason)


def _torch_s_reason() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0].rstrip(".")
    return "it finds none"


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _gib(mib: str) -> float:
    return round(int(mib) / 1024, 1) if mib.isdigit() else 0.0  # `[N/A]` where memory is the host's own
