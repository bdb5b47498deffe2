"""What every trainer of this project decides about TRL's arguments."""

import importlib.util
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..config import GRPORun, Lora, SFTRun
from ..errors import UserError
from ..files import claim
from ..parse import as_tree


def hardware_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Where the YAML is silent: CPU without a GPU, and bfloat16 only where a GPU has it."""
    gpu = torch.cuda.is_available()
    bf16 = gpu and torch.cuda.is_bf16_supported()
    return {"use_cpu": not gpu, "bf16": bf16, "dataloader_pin_memory": gpu, **values}


def computing_dtype(arguments: TrainingArguments, weights: str) -> str:
    """What the trainer computes in, whatever its weights are kept in."""
    return "bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else weights


def lora_config(lora: Lora | None) -> Any:
    """PEFT's configuration of the adapters, or None; raises `UserError` where PEFT is not installed."""
    if lora is None:
        return None
    if importlib.util.find_spec("peft") is None:
        raise UserError("model.lora: peft is not installed in this environment; `pip install -e '.[lora]'` adds it.")
    from peft import LoraConfig

    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        task_type="CAUSAL_LM",
    )


def trl_arguments(config_class: type, **values: Any) -> Any:
    """Build TRL's configuration; what it refuses, it refuses as a `UserError` before anything is written."""
    try:
        return config_class(**values)
    except ValueError as error:
        raise UserError(f"{config_class.__name__}: {' '.join(str(error).split())}") from error


def open_folder(run: GRPORun | SFTRun, launcher: str) -> str | None:
    """Claim the run's folder; with `resume`, return its newest checkpoint.

    All ranks wait for the first one's claim: a file that another rank wrote before it would look like
    somebody else's. Call it after TRL's arguments are built, which join the process group. Raises `UserError`.
    """
    folder = run.trl["output_dir"]
    claim(folder, launcher, as_tree(run), run.resume)
    PartialState().wait_for_everyone()
    if not run.resume:
        return None
    checkpoint = get_last_checkpoint(folder)
    if checkpoint is None:
        raise UserError(f"output_dir {folder} holds no checkpoint yet. Remove it and start again without --resume.")
    return checkpoint
