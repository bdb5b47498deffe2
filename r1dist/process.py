"""What a process of this project sets up before anything else."""

import logging
import os
import warnings

import datasets
import torch
from transformers.utils import logging as transformers_logging

from .logs import set_up_logging


def set_up_process() -> None:
    """Quiet libraries, our own log from rank 0, and what CPU runs need."""
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR
    set_up_logging(level)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # DeepSpeed's ZeRO 3 calls something deprecated at each gathering, which a user can do nothing about.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if not torch.cuda.is_available():
        # Left to guess, DeepSpeed finds the CPU as well, with a warning.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.serialization.register_package(0, lambda storage: None, _restore_to_cpu)


def _restore_to_cpu(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage | None:
    """Several CPU processes save tensors as on "cpu:0", a place that torch cannot load back to by itself."""
    return storage if location.startswith("cpu:") else None
