"""What every trainer of this project decides about TRL's arguments."""

import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from ..config import GRPORun, Lora, RewardModelRun, SFTRun
from ..errors import RunStopped, UserError
from ..files import ENDED, MARK, check_folder, owned, sign, write_json
from ..parse import as_tree, trl_value
from .resume import check_same, go_back


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
    """The run's folder, claimed for as long as the context lasts; yields the checkpoint to go on from, if any.

    All ranks wait for the first one's claim: a file that another rank wrote before it would look like
    somebody else's. Enter it after TRL's arguments are built, which join the process group. A `RunStopped` is noted
    in the folder for launchers, whose own launchers keep exit codes to themselves. Raises `UserError`.
    """
    folder = Path(run.trl["output_dir"])
    first = PartialState().is_main_process
    # The first rank looks before it writes.
    resume = broadcast_object_list([run.resume is True or (run.resume == "auto" and (folder / MARK).exists())])[0]
    if first:
        check_folder(folder, resume)
        if resume:
            check_same(folder, as_tree(run))
    with owned(folder) if first else nullcontext():
        if first:
            sign(folder, launcher, as_tree(run))
            (folder / ENDED).unlink(missing_ok=True)
        PartialState().wait_for_everyone()
        checkpoint = go_back(folder, rows_of(run)) if resume else None
        if run.resume is True and checkpoint is None:
            raise UserError(f"output_dir {folder} holds no whole checkpoint; --resume auto starts from the beginning.")
        try:
            yield checkpoint
        except RunStopped as stopped:
            if first:
                write_json(folder / ENDED, {"code": stopped.code, "reason": str(stopped)})
            raise


def rows_of(run: GRPORun | SFTRun | RewardModelRun) -> int:
    """The rows of an optimizer step, over all ranks and accumulated micro-batches."""
    fields = ("per_device_train_batch_size", "gradient_accumulation_steps")
    return math.prod(trl_value(run, name) for name in fields) * PartialState().num_processes
