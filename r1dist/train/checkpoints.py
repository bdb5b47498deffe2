"""Checkpoints that are there or not, from which a run comes to the very weights it would have come to.

transformers writes into a folder beside; while training goes on, a thread of the first rank syncs what is there,
notes its checksums and renames it. So a `checkpoint-N` is whole, whatever killed the run. Simplified: all checksums
are taken by the first rank, which reads what the others wrote.
"""

import errno
import json
import os
import random
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import Trainer, TrainerCallback

from ..errors import Interrupted
from ..files import STOP, SUMS, sha256, write_json
from .stopping import StopRequest, Watchdog

BESIDE = ".saving"
STATE = "state.json"
FULL_BELOW = 2**20  # bytes left on a disk on which a failed write is the disk's fault


class ResumableTrainer(Trainer):
    """What the trainers of this project add to transformers' checkpoints, and to their end.

    A checkpoint holds beside transformers' own files `rank<r>.pt`, what each rank needs to go on (see `position`),
    and `state.json`. On SIGTERM, SIGUSR1 or SIGINT all ranks finish the micro-step, save and raise `Interrupted`. In
    the middle of an optimizer step, what is saved is its beginning, or the end of the generation that began it.
    """

    _beside = False
    _finishing: Future | None = None
    _save_seconds: float | None = None
    _begun: "_Place | None" = None
    _frozen: "_Place | None" = None

    def __init__(self, *args, stall_timeout: float, **kwargs):
        super().__init__(*args, **kwargs)
        self._finisher = ThreadPoolExecutor(1, "checkpoint")
        folder = Path(self.args.output_dir)
        self.stop = StopRequest(folder / STOP if self.args.process_index == 0 else None)
        self.watchdog = Watchdog(stall_timeout, folder, self.args.process_index, self.stop)
        self.add_callback(_StepCallback(self))

    def position(self) -> dict[str, Any]:
        """Of this rank, what a checkpoint must hold beside the weights, the optimizer and the random states."""
        # TRL counts tokens in its trainers and begins at 0 after a resume; transformers' Trainer has no such count.
        return {"tokens": getattr(self, "_total_train_tokens", 0)}

    def take_position(self, position: dict[str, Any]) -> None:
        """Go on from what `position` gave."""
        self._total_train_tokens = position["tokens"]

    def restore(self, checkpoint: Path) -> None:
        """Go on from what `checkpoint` holds for all ranks, beside what transformers restores."""

    def write_more(self, checkpoint: Path) -> None:
        """Write what `restore` reads; the first rank calls it."""

    def in_generation(self) -> bool:
        """Whether rollouts are held that were not trained on yet."""
        return False

    def note_position(self) -> None:
        """Remember this place: should the run be stopped in the middle of the step, it goes on from here."""
        self._begun = self._place()

    def note_generation(self) -> None:
        """`note_position`, if the rollouts that were just made belong to the beginning of this optimizer step."""
        if self._begun.position["micro_steps"] == self.position()["micro_steps"]:
            self.note_position()

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        if resume_from_checkpoint is not None:
            checkpoint = Path(resume_from_checkpoint)
            self.restore(checkpoint)
            if read_state(checkpoint)["processes"] == self.args.world_size:
                mine = checkpoint / f"rank{self.args.process_index}.pt"
                self.take_position(torch.load(mine, map_location=self.args.device, weights_only=True))
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
        self.watchdog.beat()
        last = self.accelerator.gradient_state.sync_gradients
        if self.stop.agree() and not last:
            self.save_where_it_began()
            raise self._interrupted()
        return loss

    def log(self, logs: dict[str, float], *args, **kwargs):
        if self._save_seconds is not None:
            logs["seconds/save"], self._save_seconds = self._save_seconds, None
        super().log(logs, *args, **kwargs)

    def finish_saving(self) -> None:
        """Wait until the checkpoint is whole that was written last. Raises what went wrong with it."""
        if self._finishing is not None:
            finishing, self._finishing = self._finishing, None
            finishing.result()

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, BESIDE) if self._beside else folder

    def _save_checkpoint(self, model, trial):
        began = time.monotonic()
        self.finish_saving()
        whole = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if whole.exists():  # stopped right after it was saved
            return
        beside = whole.parent / BESIDE / whole.name
        if self.args.should_save:
            shutil.rmtree(beside.parent, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        place = self._frozen or self._place()
        self._beside = True
        try:
            super()._save_checkpoint(model, trial)
            torch.save(place.position, beside / f"rank{self.args.process_index}.pt")
        except Exception as error:
            named = _named(error, whole)
            shutil.rmtree(beside.parent, ignore_errors=True)
            raise named from error
        finally:
            self._beside = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.write_more(beside)
            write_json(beside / STATE, self._state(place))
            self._finishing = self._finisher.submit(finish, beside, whole, self.args.save_total_limit)
        self.watchdog.beat()
        self._save_seconds = time.monotonic() - began

    def _place(self) -> "_Place":
        return _Place(_random_states(), self.position(), self.in_generation())

    def _state(self, place: "_Place") -> dict[str, Any]:
        return {
            "step": self.state.global_step,
            "processes": self.args.world_size,
            "rows": self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
            "deepspeed": self.is_deepspeed_enabled,
            "in_generation": place.in_generation,
        }

    def save_where_it_began(self) -> None:
        """Save the step that was begun as it was then: its gradients are of no use to a checkpoint.

        Before the first step there is nothing to save.
        """
        if self.state.global_step == 0:
            return
        self._frozen = self._begun
        _set_random_states(self._frozen.random_states)
        self._save_checkpoint(self.model, trial=None)
        self.finish_saving()

    def _interrupted(self) -> Interrupted:
        step = self.state.global_step
        kept = f"step {step} is saved in {self.args.output_dir}" if step else "no step was finished, nothing is saved"
        return Interrupted(f"{self.stop.agreed}: {kept}. The same command with --resume auto goes on.")


@dataclass(frozen=True)
class _Place:
    """Where a rank is, beside its weights and its optimizer."""

    random_states: tuple
    position: dict[str, Any]
    in_generation: bool


class _StepCallback(TrainerCallback):
    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        # A checkpoint brings its own `save_steps` and `logging_steps` along: those of now are meant.
        state.compute_steps(args, state.max_steps)

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.note_position()

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.stop.agreed is not None:
            control.should_save = control.should_training_stop = True


def finish(beside: Path, whole: Path, keep: int | None) -> None:
    """Bring `beside` to the disk, with the checksums of all its files, as `whole`; then drop the oldest but `keep`."""
    sums = {}
    for path in sorted(path for path in beside.rglob("*") if path.is_file()):
        _sync(path)
        sums[str(path.relative_to(beside))] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_json(beside / SUMS, sums)
    for path in (beside / SUMS, *(path for path in beside.rglob("*") if path.is_dir()), beside):
        _sync(path)
    os.rename(beside, whole)
    beside.parent.rmdir()
    _sync(whole.parent)
    if keep is not None:
        for old in sorted(checkpoints(whole.parent), key=step_of)[:-keep]:
            # Renamed first: half a checkpoint must not look like one.
            shutil.rmtree(old.rename(old.with_name(f".old-{old.name}")))


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None. Reads all of it."""
    try:
        sums = json.loads((checkpoint / SUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{SUMS} cannot be read ({error.__class__.__name__})"
    for name, noted in sums.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != noted["bytes"]:
            return f"{name} has {path.stat().st_size} of {noted['bytes']} bytes"
        if sha256(path) != noted["sha256"]:
            return f"{name} is not what was written"
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run that were written to their end."""
    return [mark.parent for mark in folder.glob(f"checkpoint-*/{SUMS}")]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The step a checkpoint was saved at, by how many processes, with how many rows a step."""
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
    """torch and safetensors have exceptions of their own for a full disk."""
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
