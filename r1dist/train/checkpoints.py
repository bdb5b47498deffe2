"""Checkpoints that count only when they are whole, and going back to the last of them."""

import json
import os
import shutil
from pathlib import Path

from accelerate import PartialState
from transformers import Trainer

from ..files import WHOLE
from ..report.progress import METRICS
from ..report.traces import FOLDER as TRACES


class WholeCheckpoints(Trainer):
    """Marks each checkpoint once all ranks have written their part."""

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / WHOLE).touch()


def go_back(folder: Path) -> str | None:
    """The newest whole checkpoint of `folder`; every rank calls it.

    What the first rank finds of later steps is removed: unfinished checkpoints, and the lines of metrics and
    traces, so that the run writes them once.
    """
    whole = {_step(mark.parent): mark.parent for mark in folder.glob(f"checkpoint-*/{WHOLE}")}
    newest = max(whole, default=None)
    if PartialState().is_main_process:
        for checkpoint in folder.glob("checkpoint-*"):
            if not (checkpoint / WHOLE).exists():
                shutil.rmtree(checkpoint)
        if newest is not None:
            _cut(folder / METRICS, lambda line: line["step"] <= newest)
            for trace in (folder / TRACES).glob("*.jsonl"):
                _cut(trace, lambda line: line["step"] < newest)
    PartialState().wait_for_everyone()
    return None if newest is None else str(whole[newest])


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _cut(path: Path, keep) -> None:
    """Keep the lines for which `keep` holds. A last line without its end was never written whole."""
    if not path.exists():
        return
    beside = path.with_name(f".{path.name}")
    with path.open(encoding="utf-8") as old, beside.open("w", encoding="utf-8") as new:
        new.writelines(line for line in old if line.endswith("\n") and keep(json.loads(line)))
    os.replace(beside, path)
