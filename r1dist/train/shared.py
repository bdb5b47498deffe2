"""What every trainer of this project decides about TRL's arguments."""

from typing import Any

import torch
from transformers.trainer_utils import get_last_checkpoint

from ..config import GRPORun, SFTRun
from ..errors import UserError


def hardware_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Where the YAML is silent: CPU without a GPU, and bfloat16 only where a GPU has it."""
    gpu = torch.cuda.is_available()
    bf16 = gpu and torch.cuda.is_bf16_supported()
    return {"use_cpu": not gpu, "bf16": bf16, "dataloader_pin_memory": gpu, **values}


def trl_arguments(config_class: type, run_class_name: str, **values: Any) -> Any:
    """Build TRL's configuration; what it refuses, it refuses as a `UserError` before anything is written."""
    try:
        return config_class(**values)
    except ValueError as error:
        raise UserError(f"{run_class_name}: {' '.join(str(error).split())}") from error


def checkpoint_to_resume(run: GRPORun | SFTRun) -> str | None:
    """The newest checkpoint of the run's folder if `resume` is set; raises `UserError` if there is none."""
    if not run.resume:
        return None
    folder = run.trl["output_dir"]
    checkpoint = get_last_checkpoint(folder)
    if checkpoint is None:
        raise UserError(f"output_dir {folder} holds no checkpoint yet. Remove it and start again without --resume.")
    return checkpoint
