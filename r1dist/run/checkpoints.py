"""Atomic checkpoints with bit-exact resume.

transformers writes into a staging folder; while training goes on, a thread of the first rank syncs the files to the
disk, writes their checksums and renames the folder. So a `checkpoint-N` is complete, whatever killed the run.
Simplified: the first rank computes all checksums, and reads what the others wrote.
"""

import errno
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy
import torch
from transformers import Trainer, TrainerCallback

from ..errors import Interrupted
from ..files import CHECKSUMS, STOP, sha256, write_json
from .stopping import StopRequest, Watchdog

STAGING = ".saving"
STATE = "state.json"
FULL_BELOW = 2**20  # bytes left on a disk below which a failed write is taken for a full disk


class ResumableTrainer(Trainer):
    """What the trainers of this project add to transformers' checkpoints, and to the end of a run.

    A checkpoint also holds `rank<r>.pt`, each rank's `state_dict`, and `state.json`. On SIGTERM, SIGUSR1 or SIGINT all
    ranks finish the micro-step, save and raise `Interrupted`. In the middle of an optimizer step the saved state is
    that of the step's beginning, or that after the generation at its beginning.
    """

    _staging = False
    _finishing: Future | None = None
    _save_seconds: float | None = None
    _step_start: "_RankState | None" = None
    _saved_instead: "_RankState | None" = None
    on_saved: Callable[[Path], None] | None = None
    """Called by a thread of the first rank with a checkpoint that is complete, unless the run was asked to stop."""

    def __init__(self, *args, stall_timeout: float, **kwargs):
        super().__init__(*args, **kwargs)
        self._finisher = ThreadPoolExecutor(1, "checkpoint")
        folder = Path(self.args.output_dir)
        self.stop = StopRequest(folder / STOP if self.args.process_index == 0 else None)
        self.watchdog = Watchdog(stall_timeout, folder, self.args.process_index, self.stop)
        self.add_callback(_StepCallback(self))

    def state_dict(self) -> dict[str, Any]:
        """What this rank needs to resume, besides the weights, the optimizer and the random states."""
        # TRL's SFT and reward trainers count tokens from 0 after a resume; transformers' Trainer has no such count.
        return {"tokens": getattr(self, "_total_train_tokens", 0)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._total_train_tokens = state["tokens"]

    def load_shared(self, checkpoint: Path | None) -> None:
        """Load what `save_shared` wrote; None: the run begins anew. Every rank calls it."""

    def save_shared(self, checkpoint: Path) -> None:
        """Write what all ranks need besides transformers' files. The first rank calls it."""

    def in_generation(self) -> bool:
        """Whether rollouts are held that were not trained on yet."""
        return False

    def batch_shape(self) -> dict[str, int]:
        """What a run may not change on resume, see `run.setup.batch_shape`."""
        return {"rows": self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size}

    def begin_training(self) -> None:
        """Called when the first step of this start is known. Every rank calls it."""

    def begin_epoch(self, epoch: int) -> None:
        """Called before an epoch's first micro-step. Every rank calls it."""

    def measure(self) -> dict[str, float]:
        """`eval_<score>` of the model as it is; `evaluate` logs it. Every rank calls it.

        Here `eval_loss` on `eval_dataset`, what `compute_metrics` finds there, and the means of what TRL's trainers
        count.
        """
        loss_only = self.compute_metrics is None
        found = self.evaluation_loop(self.get_eval_dataloader(), "Evaluation", loss_only).metrics
        counted = getattr(self, "_metrics", {}).get("eval", {})
        means = {f"eval_{name}": fmean(values) for name, values in counted.items()}
        counted.clear()
        return means | found

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """Log what `measure` finds. Training goes on as if it had not been called. A collective."""
        # Of a run that is resumed after it, with `eval_on_start`.
        for line in self.state.log_history:
            if line["step"] == self.state.global_step and any(name.startswith("eval_") for name in line):
                return line
        self.mark_step_start()  # should there be nobody to generate, this state is saved
        self.model.eval()
        metrics = self.measure()
        self.model.train()
        _set_random_states(self._step_start.random_states)
        Trainer.log(self, metrics)  # TRL's would take what it has collected of the next step for this one's
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def end_step(self) -> None:
        """Called after each optimizer step, before it is logged and saved. Every rank calls it."""

    def mark_step_start(self) -> None:
        """Remember this state: a run that is stopped in the middle of the step resumes from it."""
        self._step_start = self._rank_state()

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        checkpoint = None if resume_from_checkpoint is None else Path(resume_from_checkpoint)
        self.load_shared(checkpoint)
        if checkpoint is not None and read_state(checkpoint)["processes"] == self.args.world_size:
            path = checkpoint / f"rank{self.args.process_index}.pt"
            self.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        with self.stop.listening(), self.watchdog.watching():
            try:
                output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            finally:
                self.finish_saving()
        if self.stop.agreed is not None:
            raise self._interrupted()
        return output

    def _run_epoch(self, *args, **kwargs):
        # transformers asks whether it is done after a step: resumed at its last, a run would take one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.end_micro_step()
        return loss

    def end_micro_step(self) -> None:
        """Save, and raise `Interrupted`, if a rank was asked to stop in the middle of a step. A collective."""
        self.watchdog.heartbeat()
        last = self.accelerator.gradient_state.sync_gradients
        if self.stop.agree() and not last:
            self.save_step_start()
            raise self._interrupted()

    def log(self, logs: dict[str, float], *args, **kwargs):
        if self._save_seconds is not None:
            logs["seconds/save"], self._save_seconds = self._save_seconds, None
        super().log(logs, *args, **kwargs)

    def finish_saving(self) -> None:
        """Wait until the last checkpoint is complete. Raises what went wrong with it."""
        if self._finishing is not None:
            finishing, self._finishing = self._finishing, None
            finishing.result()

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, STAGING) if self._staging else folder

    def _save_checkpoint(self, model, trial):
        began = time.monotonic()
        self.finish_saving()
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if checkpoint.exists():  # stopped right after it was saved
            return
        staged = checkpoint.parent / STAGING / checkpoint.name
        if self.args.should_save:
            shutil.rmtree(staged.parent, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        state = self._saved_instead or self._rank_state()
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
            torch.save(state.state_dict, staged / f"rank{self.args.process_index}.pt")
        except Exception as error:
            named = _named(error, checkpoint)
            shutil.rmtree(staged.parent, ignore_errors=True)
            raise named from error
        finally:
            self._staging = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.save_shared(staged)
            write_json(staged / STATE, self._description(state))
            limit, best = self.args.save_total_limit, self.state.best_global_step
            self._finishing = self._finisher.submit(self._finish, staged, checkpoint, limit, best)
        self.watchdog.heartbeat()
        self._save_seconds = time.monotonic() - began

    def _finish(self, staged: Path, checkpoint: Path, limit: int | None, best: int | None) -> None:
        finish(staged, checkpoint, limit, best)
        if self.on_saved is not None and self.stop.agreed is None:
            self.on_saved(checkpoint)

    def create_model_card(self, *args, **kwargs) -> None:
        """TRL's is not written: see `publish.card`."""

    def _load_best_model(self) -> None:
        self.finish_saving()
        best = f"checkpoint-{self.state.best_global_step}"
        # What transformers remembers is the folder in which it was staged.
        self.state.best_model_checkpoint = os.path.join(self.args.output_dir, best)
        self.accelerator.wait_for_everyone()
        super()._load_best_model()

    def _rank_state(self) -> "_RankState":
        return _RankState(_random_states(), self.state_dict(), self.in_generation())

    def _description(self, state: "_RankState") -> dict[str, Any]:
        return {
            "step": self.state.global_step,
            "processes": self.args.world_size,
            "batch": self.batch_shape(),
            "deepspeed": self.is_deepspeed_enabled,
            "in_generation": state.in_generation,
        }

    def save_step_start(self) -> None:
        """Save the state at the beginning of the current step: a checkpoint cannot hold half a step's gradients.

        Before the first step there is nothing to save.
        """
        if self.state.global_step == 0:
            return
        self._saved_instead = self._step_start
        _set_random_states(self._saved_instead.random_states)
        self._save_checkpoint(self.model, trial=None)
        self.finish_saving()
        self.accelerator.wait_for_everyone()  # once one has ended, their launcher ends the others

    def save_before_stopping(self) -> str:
        """`save_step_start`, unless no step was finished; returns where it is, in a sentence."""
        if (step := self.state.global_step) == 0:
            return "No step was finished, so there is nothing to save."
        self.save_step_start()
        return f"Step {step} is saved in {self.args.output_dir}; --resume continues from there."

    def _interrupted(self) -> Interrupted:
        step = self.state.global_step
        saved = f"step {step} is saved in {self.args.output_dir}" if step else "no step was finished, nothing is saved"
        return Interrupted(f"{self.stop.agreed}: {saved}. The same command with --resume auto continues.")


@dataclass(frozen=True)
class _RankState:
    """Of a rank, besides its weights and its optimizer."""

    random_states: tuple
    state_dict: dict[str, Any]
    in_generation: bool


class _StepCallback(TrainerCallback):
    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        # A checkpoint brings its own `save_steps` and `logging_steps`: those of this start count.
        state.compute_steps(args, state.max_steps)
        self.trainer.begin_training()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.begin_epoch(int(state.epoch or 0))

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.mark_step_start()

    def on_prediction_step(self, args, state, control, **kwargs):
        self.trainer.watchdog.heartbeat()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.end_step()
        if self.trainer.stop.agreed is not None:
            control.should_save = control.should_training_stop = True


def finish(staged: Path, checkpoint: Path, limit: int | None, best: int | None = None) -> None:
    """Sync `staged` to the disk with the checksums of its files, and rename it.

    All but the newest `limit` and that of the step `best` are deleted.
    """
    checksums = {}
    for path in sorted(path for path in staged.rglob("*") if path.is_file()):
        _sync(path)
        checksums[str(path.relative_to(staged))] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_json(staged / CHECKSUMS, checksums)
    for path in (staged / CHECKSUMS, *(path for path in staged.rglob("*") if path.is_dir()), staged):
        _sync(path)
    os.rename(staged, checkpoint)
    staged.parent.rmdir()
    _sync(checkpoint.parent)
    if limit is not None:
        for old in sorted(checkpoints(checkpoint.parent), key=step_of)[:-limit]:
            if step_of(old) != best:
                # Renamed first: a half deleted checkpoint must not look complete.
                shutil.rmtree(old.rename(old.with_name(f".old-{old.name}")))


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Reads all of it."""
    try:
        checksums = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{CHECKSUMS} cannot be read ({error.__class__.__name__})"
    for name, expected in checksums.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} of {expected['bytes']} bytes"
        if sha256(path) != expected["sha256"]:
            return f"{name} is not what was written"
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run."""
    return [path.parent for path in folder.glob(f"checkpoint-*/{CHECKSUMS}")]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """`state.json`: the step, how many processes saved it, and their batch."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _named(error: Exception, checkpoint: Path) -> Exception:
    """`error`, as an `OSError` if the disk is full, for which torch and safetensors have exceptions of their own."""
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    if full or shutil.disk_usage(checkpoint.parent).free < FULL_BELOW or "os error 28" in str(error):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(checkpoint))
    return error


def _random_states() -> tuple:
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), numpy.random.get_state(), torch.get_rng_state(), gpus


def _set_random_states(states: tuple) -> None:
    python, numpys, torchs, gpus = states
    random.setstate(python)
    numpy.random.set_state(numpys)
    torch.set_rng_state(torchs)
    torch.cuda.set_rng_state_all(gpus)
