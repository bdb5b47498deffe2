"""The record of each step's inputs, settings and outputs, with digests that show whether it is up to date."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ..config.tree import flat
from ..errors import UserError
from ..files import model_files, sha256, write_json
from ..tiny import EMBEDDED
from .graph import Step

MANIFEST = "manifest.json"
# Fields that change nothing about what a step leaves.
INDIFFERENT = ("output_dir", "output", "dry_run", "resume", "verify.workers", "verify.retry_timeout",
               "train.stall_timeout", "rollout.engine", "report_to", "run_name", "project", "push_to_hub",
               "hub_model_id", "hub_private_repo", "hub_strategy", "hub_always_push", "hub_revision")  # fmt: skip


class Manifest:
    """The record of each step, by its name; every change is on the disk at once, whole.

    Raises `UserError` for a damaged file.
    """

    def __init__(self, folder: Path):
        self.path = folder / MANIFEST
        self.steps: dict[str, dict] = {}
        if self.path.exists():
            try:
                self.steps = json.loads(self.path.read_text(encoding="utf-8"))["steps"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self.path} is damaged. Put back a copy; or remove it, and the stages' folders with it, "
                    "to start again."
                ) from error

    def write(self, name: str, record: dict) -> None:
        self.steps[name] = record
        write_json(self.path, {"steps": self.steps})


def digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder's model (all files of a folder that holds none)."""
    if path.is_file():
        return sha256(path)
    files = model_files(path) or {f for f in path.rglob("*") if f.is_file()}
    parts = [f"{file.relative_to(path)}:{digest(file)}" for file in sorted(files)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def inputs_of(step: Step) -> dict[str, str]:
    """The digest of each file or folder that the step's configuration names, by the field that names it."""
    fields = _settings(step)
    named = {field: Path(value) for field, value in fields.items() if _is_path(field, value)}
    named |= {
        field: EMBEDDED[value] for field, value in fields.items() if field.endswith("model.path") and value in EMBEDDED
    }
    if step.accelerate is not None:
        named["accelerate"] = Path(step.accelerate)
    return {field: digest(path) for field, path in named.items()}


def settings_of(step: Step, inputs: dict[str, str]) -> dict[str, Any]:
    """The configuration's other fields, by their dotted names."""
    return {field: value for field, value in _settings(step).items() if field not in inputs}


def _is_path(field: str, value: Any) -> bool:
    # Where rollouts come from changes nothing about what is asked, and /dev/shm is no input.
    if not isinstance(value, str) or field.startswith("rollout."):
        return False
    return ("/" in value or "." in value) and Path(value).exists()


def _settings(step: Step) -> dict[str, Any]:
    fields = flat(step.config).items()
    without = ("placement.", "report_to.")  # the latter's entries
    return {field: value for field, value in fields if field not in INDIFFERENT and not field.startswith(without)}
