"""What a process of this project sets up before anything else."""

import logging
import os

import datasets
import torch
from transformers.utils import logging as transformers_logging

LOG_FORMAT = "%(asctime)s %(name)s %(levelname)s %(message)s"


def set_up_process() -> None:
    """Logging from rank 0 only, and the process group of CPU runs under DeepSpeed.

    DeepSpeed would set up its own backend on a CPU and see a world of one; asked first for gloo, it joins
    the world that `accelerate launch` made.
    """
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR
    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT, datefmt="%H:%M:%S")
    logging.getLogger("r1dist").setLevel(level)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            import deepspeed

            logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
            deepspeed.init_distributed("gloo", verbose=False)
