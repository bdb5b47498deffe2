"""What every trainer of this project decides about TRL's arguments."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainingArguments, get_scheduler

from ..config import GRPORun, RewardModelRun, SFTRun
from ..config.loader import as_tree
from ..config.trl_fields import micro_steps_per_generation, trl_value
from ..errors import Interrupted, RunStopped, UserError
from ..files import ENDED, RUN_FILE, check_folder, lock_run_dir, write_json, write_run_file
from .resume import check_same, data_digests, newest_checkpoint
from .trackers import require_trackers

logger = logging.getLogger(__name__)

NEED_THE_MODEL = ("galore", "apollo", "lomo", "adalomo")  # optimizers that cannot be looked at without it


def hardware_defaults(values: dict[str, Any], weights: str = "float32") -> dict[str, Any]:
    """TRL's fields `values`; where they are silent, the CPU without a GPU, and the 16 bits that the GPU computes in.

    Emulated bfloat16 is slow, and vLLM refuses it. `fp16` scales the loss, which needs `weights` in float32.
    """
    gpu = torch.cuda.is_available() and not values.get("use_cpu")
    native = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    bf16 = native and not values.get("fp16")
    fp16 = gpu and not native and not values.get("bf16") and weights == "float32"
    if fp16 and "fp16" not in values:
        logger.warning("computing in float16 (`fp16`): this GPU has no bfloat16 (compute capability below 8)")
    return {"use_cpu": not gpu, "bf16": bf16, "fp16": fp16, "dataloader_pin_memory": gpu, **values}


def computing_dtype(arguments: TrainingArguments, weights: str) -> str:
    """The dtype of the trainer's computation."""
    return "bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else weights


def trl_arguments(config_class: type, **values: Any) -> Any:
    """Build TRL's configuration; what it refuses, it refuses as a `UserError` before anything is written.

    So is an optimizer, a schedule or a tracker that transformers would only miss once the model is loaded. Of
    `push_to_hub` it is not told, since it would upload checkpoints while they are written: see `publish.hub`.
    """
    try:
        arguments = config_class(**{**values, "push_to_hub": False})
    except ValueError as error:
        raise UserError(f"{config_class.__name__}: {' '.join(str(error).split())}") from error
    # One process that sees several GPUs would train on all of them, by `nn.DataParallel`, which TRL refuses.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    for field, build in {"report_to": require_trackers, "optim": _optimizer, "lr_scheduler_kwargs": _schedule}.items():
        try:
            build(arguments)
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            raise UserError(f"`{field}`: {' '.join(str(error).split())}") from error
    return arguments


def _optimizer(arguments: TrainingArguments) -> None:
    if not arguments.optim.startswith(NEED_THE_MODEL):
        Trainer.get_optimizer_cls_and_kwargs(arguments)


def _schedule(arguments: TrainingArguments) -> None:
    steps = 1000
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
    warmup = arguments.get_warmup_steps(steps)
    get_scheduler(arguments.lr_scheduler_type, optimizer, warmup, steps, arguments.lr_scheduler_kwargs)


@contextmanager
def run_folder(
    run: GRPORun | SFTRun | RewardModelRun,
    launcher: str,
    contaminated: Sequence[dict] = (),
    sources: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[str | None]:
    """The run's folder, locked inside the context; yields the checkpoint to resume from, if any.

    All ranks wait for the first one's lock: a file that another rank wrote before it would look like
    another run's. Enter it after TRL's arguments are built, which join the process group. A `RunStopped` is
    written to `ended.json`, since `accelerate launch` and `torchrun` do not pass exit codes on. `contaminated`, the
    rows that decontamination dropped, are listed in a file of their own. `sources`: fields with the digests of the
    source files that they name, which a resumed run must have, too. Raises `UserError`.
    """
    folder = Path(run.trl["output_dir"])
    first = PartialState().is_main_process
    # The first rank looks before it writes.
    resume = broadcast_object_list([run.resume is True or (run.resume == "auto" and (folder / RUN_FILE).exists())])[0]
    if first:
        check_folder(folder, resume)
        data = data_digests(as_tree(run)) | sources
        if resume:
            check_same(folder, type(run), as_tree(run), data)
    with lock_run_dir(folder) if first else nullcontext():
        if first:
            write_run_file(folder, launcher, as_tree(run), data, contaminated, PartialState().num_processes)
            (folder / ENDED).unlink(missing_ok=True)
        PartialState().wait_for_everyone()
        checkpoint = newest_checkpoint(folder, batch_shape(run)) if resume else None
        if run.resume is True and checkpoint is None:
            raise UserError(f"output_dir {folder} holds no whole checkpoint; --resume auto starts from the beginning.")
        try:
            yield checkpoint
        except RunStopped as stopped:
            if first:
                write_json(folder / ENDED, {"code": stopped.code, "reason": str(stopped)})
            if isinstance(stopped, Interrupted):  # all ranks are; once one has ended, their launcher ends the others
                PartialState().wait_for_everyone()
            raise


def check_rows(run: GRPORun | SFTRun | RewardModelRun, rows: int, blocks: int | None = None) -> None:
    """Raises `UserError` if `rows` are too few for one step; `blocks`: into which SFT packs them.

    Call it once TRL's arguments are built, which join the process group.
    """
    shape, there = batch_shape(run), rows if blocks is None else blocks
    if isinstance(run, GRPORun):
        group = trl_value(run, "num_generations")
        needed = max(shape.values()) // group
        what = f"one step needs {needed} prompts ({needed * group} rollouts, `num_generations` {group})"
        mend = "`per_device_train_batch_size`, `gradient_accumulation_steps` or `steps_per_generation`"
    elif trl_value(run, "dataloader_drop_last"):
        needed = shape["rows"] // trl_value(run, "gradient_accumulation_steps")
        what = f"with `dataloader_drop_last` one batch of all processes needs {needed}"
        mend = "`per_device_train_batch_size`, or leave `dataloader_drop_last` out"
    else:
        return
    if there >= needed:
        return
    field = "sources" if isinstance(run, RewardModelRun) else "data.sources"
    packed, enough = "", f"at least {needed} rows"
    if blocks is not None:
        packed = f", packed into {blocks} blocks of `max_length` {trl_value(run, 'max_length')} tokens"
        enough = f"about {math.ceil(rows * needed / blocks)} rows"
    raise UserError(f"{field}: {rows} rows are left{packed}; {what}.\nGive {enough}, or lower {mend}.")


def batch_shape(run: GRPORun | SFTRun | RewardModelRun) -> dict[str, int]:
    """The rows of an optimizer step and, in RL, of a generation, over all ranks: a resume may not change them."""
    processes = PartialState().num_processes
    each, accumulated = (trl_value(run, f) for f in ("per_device_train_batch_size", "gradient_accumulation_steps"))
    shape = {"rows": each * accumulated * processes}
    if isinstance(run, GRPORun):
        shape["generation_rows"] = each * micro_steps_per_generation(run, processes) * processes
    return shape
