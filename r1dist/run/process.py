"""What a process of this project sets up before anything else."""

import ctypes
import os
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers.utils import logging as transformers_logging

from ..errors import UserError
from ..logs import set_up_logging
from .driver import require_usable_gpu
from .extensions import check_locks

T = TypeVar("T")

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def set_up_process(use_cpu: bool = False) -> None:
    """Quiet libraries, our own log from rank 0, and what CPU runs need.

    Raises `UserError` where there is a GPU that torch cannot use, unless `use_cpu`, and where DeepSpeed would wait
    for a build that was cut off.
    """
    require_usable_gpu(use_cpu)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        check_locks()
    set_up_logging()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # DeepSpeed's ZeRO 3 calls something deprecated at each gathering, which a user can do nothing about.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))  # a fork has torch with its parent's number
    if not torch.cuda.is_available():
        # Left to guess, DeepSpeed finds the CPU as well, with a warning.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.serialization.register_package(0, lambda storage: None, _restore_to_cpu)
        _reuse_freed_memory()


def _reuse_freed_memory() -> None:
    """Have glibc keep what tensors free.

    By itself it gives every block of more than 32 MiB back to the system, which clears each page of the next one:
    a quarter of the training phase of a model of 135M parameters.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_MMAP_MAX, 0)


def _restore_to_cpu(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage | None:
    """Several CPU processes save tensors as on "cpu:0", a place that torch cannot load back to by itself."""
    return storage if location.startswith("cpu:") else None


def choose_default(by_memory: dict[float, Path], without_gpu: Path) -> Path:
    """The recipe of a launch without `--config`; prints which one and why, once, before anything else.

    Args:
        by_memory: Least GiB of the first GPU -> the recipe for it. A smaller GPU gets the one for the least.
    """
    if torch.cuda.is_available():
        gib = torch.cuda.get_device_properties(0).total_memory / 2**30
        chosen = by_memory[max((least for least in by_memory if least <= gib), default=min(by_memory))]
        why = f"found {torch.cuda.get_device_name(0)} with {gib:.1f} GiB"
    else:
        chosen, why = without_gpu, "found no GPU"
    if os.environ.get("RANK", "0") == "0":
        print(f"No --config given and {why}: running {os.path.relpath(chosen)}", flush=True)
    return chosen


def on_first_rank(function: Callable[[], T]) -> T:
    """What `function` returns on the first rank, given to every rank. A collective; all raise its `UserError`."""
    found: list = [None, None]
    if PartialState().is_main_process:
        try:
            found[0] = function()
        except UserError as error:
            found[1] = str(error)
    result, refused = broadcast_object_list(found)
    if refused is not None:
        raise UserError(refused)
    return result
