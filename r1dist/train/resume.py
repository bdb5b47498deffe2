"""Going back to a run's newest good checkpoint, and refusing one that is another run's."""

import json
import logging
import os
import shutil
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..errors import UserError
from ..fields import differences, flat
from ..files import MARK, METRICS
from ..report.traces import FOLDER as TRACES
from .checkpoints import BESIDE, damage, read_state, step_of
from .reference import REFERENCE, link

logger = logging.getLogger(__name__)

MAY_CHANGE = (
    "dry_run",
    "gradient_checkpointing",
    "logging_steps",
    "max_steps",
    "num_train_epochs",
    "output_dir",
    "placement",
    "report_to",
    "resume",
    "rollout",
    "run_name",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "train.stall_timeout",
    "verify",
)
"""Fields, and whole sections, that a run may be resumed with other values of."""
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")
"""These may change with the number of processes, if each step keeps its rows."""


def check_same(folder: Path, tree: dict) -> None:
    """Raises `UserError`, which names the fields, if the run in `folder` has another configuration than `tree`."""
    before = flat(json.loads((folder / MARK).read_text(encoding="utf-8"))["config"])
    now = flat(tree)
    changed = [name for name in differences(before, now) if not _may_change(name)]
    if changed:
        told = ", ".join(f"{name} was {before.get(name)}, is {now.get(name)}" for name in changed[:5])
        raise UserError(
            f"output_dir {folder} holds a run of another configuration: {told}.\n"
            f"Go on with that one, or choose another output_dir. What may change: {', '.join(MAY_CHANGE)}."
        )


def go_back(folder: Path, rows: int) -> str | None:
    """The newest good checkpoint of `folder` that this number of processes can go on from; every rank calls it.

    Args:
        rows: Of an optimizer step, over all ranks and accumulated micro-batches.

    The first rank takes away what is beyond it: checkpoints, which are renamed if they are damaged, and the lines of
    metrics and traces, so that the run writes them once. Raises `UserError` if none fits.
    """
    chosen = [None, None]
    if PartialState().is_main_process:
        try:
            chosen[0] = _choose(folder, rows)
        except UserError as error:
            chosen[1] = str(error)
    checkpoint, refused = broadcast_object_list(chosen)
    if refused is not None:
        raise UserError(refused)
    return checkpoint


def _choose(folder: Path, rows: int) -> str | None:
    shutil.rmtree(folder / BESIDE, ignore_errors=True)
    for leftover in folder.glob(".old-checkpoint-*"):
        shutil.rmtree(leftover)
    chosen = None
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        wrong = damage(checkpoint)
        if wrong is not None:
            aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
            shutil.rmtree(aside, ignore_errors=True)
            checkpoint.rename(aside)
            logger.warning("%s is damaged: %s. It is now %s; an older one is used.", checkpoint, wrong, aside.name)
        elif chosen is None and _fits(checkpoint, rows):
            chosen = checkpoint
        elif chosen is None:
            shutil.rmtree(checkpoint)  # beyond where the run goes on from
    step = 0 if chosen is None else step_of(chosen)
    _cut(folder / METRICS, lambda line: line["step"] <= step and "train_runtime" not in line)
    if chosen is None or read_state(chosen)["processes"] != PartialState().num_processes:
        for trace in (folder / TRACES).glob("*.jsonl"):
            _cut(trace, lambda line: line["step"] < step)
    if chosen is not None and (chosen / REFERENCE).exists():
        link(chosen / REFERENCE, folder / REFERENCE)
    else:
        (folder / REFERENCE).unlink(missing_ok=True)
    return None if chosen is None else str(chosen)


def _fits(checkpoint: Path, rows: int) -> bool:
    """Whether these processes can go on from a checkpoint; raises `UserError` if from none of its run."""
    state, processes = read_state(checkpoint), PartialState().num_processes
    if state["rows"] != rows:
        raise UserError(
            f"{checkpoint}: its steps had {state['rows']} rows, {rows} now, with {processes} processes instead of "
            f"{state['processes']}.\nSet gradient_accumulation_steps (or per_device_train_batch_size) so that "
            "the processes' rows come to the same."
        )
    if state["processes"] == processes:
        return True
    if state["deepspeed"]:
        raise UserError(
            f"{checkpoint} was saved by {state['processes']} processes under DeepSpeed, whose optimizer is in as many "
            f"parts; there are {processes}.\nStart as many. (Simplified: parts are not put together anew.)"
        )
    if state["in_generation"]:
        logger.warning("%s lies between the steps of a generation of %d processes; an older one is used.",
                       checkpoint, state["processes"])  # fmt: skip
        return False
    logger.warning("%d processes instead of %d: the prompts and their order are the same, the sums' rounding is not.",
                   processes, state["processes"])  # fmt: skip
    return True


def _may_change(name: str) -> bool:
    return name in BATCH or any(name == field or name.startswith(f"{field}.") for field in MAY_CHANGE)


def _cut(path: Path, keep) -> None:
    """Keep the lines for which `keep` holds. A last line without its end was never written whole."""
    if not path.exists():
        return
    beside = path.with_name(f".{path.name}")
    with path.open(encoding="utf-8") as old, beside.open("w", encoding="utf-8") as new:
        new.writelines(line for line in old if line.endswith("\n") and keep(json.loads(line)))
    os.replace(beside, path)
