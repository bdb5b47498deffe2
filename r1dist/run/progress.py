"""One line a step in the terminal, and every logged number in `metrics.jsonl`."""

import json
import re
import time
from pathlib import Path

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from ..files import METRICS
from .trackers import TrackerLinks

EVALUATED = re.compile(r"^eval_")
MEASURED = re.compile(r"eval/(.*/)?accuracy|eval/loss")


class StepLine(TrainerCallback):
    """Prints `columns` (shown name -> logged key) at each log, with the time left.

    A column whose key is not in the log, or has no value there, is left out of the line.
    """

    def __init__(self, output_dir: str, columns: dict[str, str]):
        self.metrics = Path(output_dir) / METRICS
        self.columns = columns
        self.began: tuple[float, int] | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = (time.monotonic(), state.global_step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        logs = {EVALUATED.sub("eval/", name): value for name, value in logs.items()}  # as trackers are given them
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **logs}) + "\n")
        columns = self.columns | {name: name for name in logs if MEASURED.fullmatch(name)}
        shown = [f"{name} {logs[key]:.3g}" for name, key in columns.items() if logs.get(key) is not None]
        if not shown:
            return
        start, first = self.began
        elapsed, done = time.monotonic() - start, state.global_step - first
        left = elapsed / max(1, done) * (state.max_steps - state.global_step)
        line = f"step {state.global_step}/{state.max_steps}  {'  '.join(shown)}"
        print(f"{line}  {_clock(elapsed)} gone, {_clock(left)} left", flush=True)


def show_progress(trainer: Trainer, columns: dict[str, str]) -> None:
    """Replace transformers' progress callbacks by a `StepLine`, and say where `report_to` shows the run."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(StepLine(trainer.args.output_dir, columns))
    trainer.add_callback(TrackerLinks(trainer))


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
