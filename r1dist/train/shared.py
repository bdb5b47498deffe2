"""What every trainer of this project decides about TRL's arguments."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments

from ..config import GRPORun, Lora, RewardModelRun, SFTRun
from ..errors import UserError
from ..files import check_folder, owned, sign
from ..parse import as_tree
from .checkpoints import go_back


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


@contextmanager
def run_folder(run: GRPORun | SFTRun | RewardModelRun, launcher: str) -> Iterator[str | None]:
    """The run's folder, claimed for as long as the context lasts; with `resume`, yields its newest checkpoint.

    All ranks wait for the first one's claim: a file that another rank wrote before it would look like
    somebody else's. Enter it after TRL's arguments are built, which join the process group. Raises `UserError`.
    """
    folder = Path(run.trl["output_dir"])
    first = PartialState().is_main_process
    if first:
        check_folder(folder, run.resume)
    with owned(folder) if first else nullcontext():
        if first and not run.resume:
            sign(folder, launcher, as_tree(run))
        PartialState().wait_for_everyone()
        checkpoint = go_back(folder) if run.resume else None
        if run.resume and checkpoint is None:
            raise UserError(f"output_dir {folder} holds no whole checkpoint. Remove it; start again without --resume.")
        yield checkpoint
