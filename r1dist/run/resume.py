"""Finding the newest good checkpoint to resume from, and refusing one of another configuration."""

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

from accelerate import PartialState

from ..config.tree import changed_on_resume, differences, flat, may_change
from ..errors import UserError
from ..files import EVALUATIONS, METRICS, RUN_FILE, TRACES, sha256
from .checkpoints import STAGING, damage, read_state, step_of
from .process import on_first_rank

logger = logging.getLogger(__name__)

DATA = re.compile(r"(?:^|\.)(?:(?:sources|against|holdout|mix)\.\d+\.path|prompting\.examples)$")


def data_digests(tree: dict) -> dict[str, str]:
    """Field -> SHA-256 of each local file or folder with data that a configuration names."""
    named = {field: Path(str(value)) for field, value in flat(tree).items() if DATA.search(field)}
    return {field: _digest(path) for field, path in named.items() if path.exists()}


def _digest(path: Path) -> str:
    """Of a folder: without what is hidden, and what `datasets` leaves there."""
    if path.is_file():
        return sha256(path)
    files = sorted(file.relative_to(path) for file in path.rglob("*") if file.is_file())
    files = [name for name in files if not name.name.startswith("cache-") and "/." not in f"/{name}"]
    parts = [f"{name}:{sha256(path / name)}" for name in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def check_same(folder: Path, run_class: type, tree: dict, data: dict[str, str], field: str = "output_dir") -> None:
    """Raises `UserError`, which names the fields, if the run in `folder` has another configuration or other data.

    Args:
        tree: This configuration.
        data: Its `data_digests`. A run that recorded none is not checked for them.
        field: Which names the folder.
    """
    recorded = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    if changed := changed_on_resume(run_class, recorded["config"], tree):
        shown = ", ".join(f"{name} was {old}, is {new}" for name, (old, new) in list(changed.items())[:5])
        raise UserError(
            f"{field} {folder} holds a run of another configuration: {shown}.\n"
            f"Restore these fields, or choose another {field}. docs/configuration_reference.md says what may change."
        )
    others = [name for name in differences(recorded.get("data", data), data) if not may_change(run_class, name)]
    if others:
        values = flat(tree)
        shown = ", ".join(f"{values[name]} (`{name}`)" if name in values else f"`{name}`" for name in others[:5])
        raise UserError(
            f"{field} {folder} holds a run with other data: {shown} has changed since it began.\n"
            f"Restore it, or choose another {field}."
        )


def newest_checkpoint(folder: Path, batch: dict[str, int]) -> str | None:
    """The newest good checkpoint of `folder` that this number of processes can resume from; every rank calls it.

    The first rank removes what is newer: checkpoints (damaged ones are renamed), and lines of metrics and traces,
    which the run will write again.

    Args:
        batch: The run's `run.setup.batch_shape`.

    Raises `UserError` if this run's batch or number of processes fits no checkpoint.
    """
    return on_first_rank(lambda: _choose(folder, batch))


def _choose(folder: Path, batch: dict[str, int]) -> str | None:
    shutil.rmtree(folder / STAGING, ignore_errors=True)
    for leftover in folder.glob(".old-checkpoint-*"):
        shutil.rmtree(leftover)
    chosen = None
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        wrong = damage(checkpoint)
        if wrong is not None:
            renamed = checkpoint.with_name(f"damaged-{checkpoint.name}")
            shutil.rmtree(renamed, ignore_errors=True)
            checkpoint.rename(renamed)
            logger.warning("%s is damaged: %s. It is now %s; an older one is used.", checkpoint, wrong, renamed.name)
        elif chosen is None and _fits(checkpoint, batch):
            chosen = checkpoint
        elif chosen is None:
            shutil.rmtree(checkpoint)  # newer than the one that the run resumes from
    step = 0 if chosen is None else step_of(chosen)
    for answers in (folder / EVALUATIONS).glob("*.jsonl"):
        _keep_lines(answers, lambda line: line["step"] <= step)
    _keep_lines(folder / METRICS, lambda line: line["step"] <= step and "train_runtime" not in line)
    if chosen is None or read_state(chosen)["processes"] != PartialState().num_processes:
        for trace in (folder / TRACES).glob("*.jsonl"):
            _keep_lines(trace, lambda line: line["step"] < step)
    return None if chosen is None else str(chosen)


def _fits(checkpoint: Path, batch: dict[str, int]) -> bool:
    """Whether these processes can resume from a checkpoint; raises `UserError` if from none of its run."""
    state, processes = read_state(checkpoint), PartialState().num_processes
    for name, size in batch.items():
        if state["batch"][name] != size:
            what = "its steps had" if name == "rows" else "its generations had"
            raise UserError(
                f"{checkpoint}: {what} {state['batch'][name]} rows, {size} now, with {processes} processes instead of "
                f"{state['processes']}.\nSet gradient_accumulation_steps, per_device_train_batch_size or "
                "steps_per_generation so that the rows of all processes add up to the same."
            )
    if state["processes"] == processes:
        return True
    if state["deepspeed"]:
        raise UserError(
            f"{checkpoint} was saved by {state['processes']} processes under DeepSpeed, which splits the optimizer "
            f"into as many parts; there are {processes}.\nStart as many. (Simplified: the parts are not merged.)"
        )
    if state["in_generation"]:
        logger.warning("%s is between the steps of a generation of %d processes; an older one is used.",
                       checkpoint, state["processes"])  # fmt: skip
        return False
    logger.warning("%d processes instead of %d: prompts and their order are the same, the rounding of sums is not.",
                   processes, state["processes"])  # fmt: skip
    return True


def _keep_lines(path: Path, keep) -> None:
    """Keep the lines for which `keep` is true. A last line without its end was never written completely."""
    if not path.exists():
        return
    kept = path.with_name(f".{path.name}")
    with path.open(encoding="utf-8") as old, kept.open("w", encoding="utf-8") as new:
        new.writelines(line for line in old if line.endswith("\n") and keep(json.loads(line)))
    os.replace(kept, path)
