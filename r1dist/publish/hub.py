"""`push_to_hub`: the hub is asked before a model is loaded; then checkpoints and the final model are uploaded.

transformers' own upload is not used: it takes the run's whole folder, in which checkpoints are being written, rollouts
lie, and TRL's arguments with their secrets. Here the files to be uploaded are named, and linked into a folder of their
own, so that a checkpoint may be deleted meanwhile. Uploads during training run in a thread, and a failed one is only
logged: the next checkpoint's, or the last one, makes up for it.
"""

import logging
import shutil
import threading
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HTTPError
from transformers import Trainer

from ..config import GRPORun, RewardModelRun, SFTRun
from ..config.trl_fields import trl_value
from ..errors import RunStopped, UserError
from ..files import CARD, CHECKSUMS, DECONTAMINATED, ENDED, REFERENCE, link, model_files
from ..run.process import on_first_rank
from .account import make_repository, one_line
from .card import model_card

logger = logging.getLogger(__name__)

Run = GRPORun | SFTRun | RewardModelRun
STAGED = ".uploading"
LAST_CHECKPOINT = "last-checkpoint"  # transformers' name for it in the repository
NOT_UPLOADED = (CHECKSUMS, DECONTAMINATED, ENDED, REFERENCE, "state.json")


def hub_repository(run: Run) -> str | None:
    """The id of the repository that `run` is uploaded to, made where there is none; None without `push_to_hub`.

    A collective; the first rank asks. Raises `UserError` as `require_account`, and where the repository is refused.
    """
    if not run.trl.get("push_to_hub"):
        return None
    return on_first_rank(lambda: make_repository(run.trl))


class Publication:
    """The model card of a run, and its uploads. Of the first rank; the others do nothing.

    Args:
        repository: The hub's id of the repository; None: only the card is written.
    """

    def __init__(self, run: Run, trainer: Trainer, repository: str | None):
        self.run, self.repository = run, repository
        self.folder = Path(trainer.args.output_dir)
        self.strategy = trl_value(run, "hub_strategy")
        self.first = trainer.is_world_process_zero()
        self._upload: threading.Thread | None = None
        if repository is not None and self.first:
            shutil.rmtree(self.folder / STAGED, ignore_errors=True)  # of a start that was killed
            print(f"hub: {constants.ENDPOINT}/{repository}", flush=True)
            if self.strategy != "end":
                trainer.on_saved = self.upload_checkpoint

    def upload_checkpoint(self, checkpoint: Path) -> None:
        """Upload a whole checkpoint's model in the background, unless the upload before is still going on."""
        before = self._upload
        if before is not None and before.is_alive() and not trl_value(self.run, "hub_always_push"):
            logger.warning("%s is not uploaded: the upload before it is still going on", checkpoint.name)
            return
        step = int(checkpoint.name.rpartition("-")[2])
        staged = self.folder / STAGED / checkpoint.name
        try:
            _link_files(_uploaded(checkpoint), checkpoint, staged)
            model_card(self.folder, self.repository, step).save(staged / CARD)
            if self.strategy != "every_save":
                place = LAST_CHECKPOINT if self.strategy == "checkpoint" else checkpoint.name
                _link_files({f for f in checkpoint.rglob("*") if f.is_file()}, checkpoint, staged / place)
        except (OSError, UserError) as error:
            logger.warning("%s is not uploaded: %s", checkpoint.name, error)
            return
        self._upload = threading.Thread(target=self._upload_staged, args=(staged, step, before), daemon=True)
        self._upload.start()

    def _upload_staged(self, staged: Path, step: int, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        stale = f"{LAST_CHECKPOINT}/*" if self.strategy == "checkpoint" else None
        try:
            self._send(staged, f"Training in progress, step {step}", stale)
        except (HTTPError, OSError, ValueError, RuntimeError) as error:
            logger.warning("the upload of step %d to %s failed: %s", step, self.repository, one_line(error))
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def finish(self) -> None:
        """Write the final model's card, and upload both.

        Call it when the model is saved and no other rank waits: an upload may take longer than a collective may.
        Raises `RunStopped` if the upload fails.
        """
        if not self.first:
            return
        model_card(self.folder, self.repository).save(self.folder / CARD)
        if self.repository is None:
            return
        if self._upload is not None:
            self._upload.join()
        staged = self.folder / STAGED / "final"
        files = _uploaded(self.folder) | {self.folder / CARD, *self.folder.glob("runs/*/events.out.tfevents.*")}
        _link_files(files, self.folder, staged)
        merged = self.run.model.lora is not None and self.run.model.lora.save == "merged"
        try:
            self._send(staged, "End of training", "adapter_*" if merged else None)
        except (HTTPError, OSError, ValueError, RuntimeError) as error:
            raise RunStopped(
                f"The model is saved in {self.folder}, but its upload to {self.repository} failed: {one_line(error)}\n"
                f"What was to be uploaded lies in {staged}: `hf upload {self.repository} {staged}` does it."
            ) from error
        shutil.rmtree(staged.parent)

    def _send(self, staged: Path, message: str, stale: str | None) -> None:
        HfApi().upload_folder(
            repo_id=self.repository, folder_path=staged, commit_message=message, delete_patterns=stale,
            revision=self.run.trl.get("hub_revision"),
        )  # fmt: skip


def _uploaded(folder: Path) -> set[Path]:
    """The model's files, those of SentencePiece tokenizers included."""
    return {file for file in (*model_files(folder), *folder.glob("*.model")) if file.name not in NOT_UPLOADED}


def _link_files(files: set[Path], source: Path, target: Path) -> None:
    for file in files:
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        link(file, place)
