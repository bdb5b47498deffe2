"""Files that are whole or absent, and a run's folder, which belongs to one run."""

import json
import os
from importlib.metadata import version
from pathlib import Path

from .errors import UserError

MARK = "run.json"
PACKAGES = ("torch", "transformers", "trl", "accelerate", "deepspeed", "datasets", "math-verify")


def claim(output_dir: str, launcher: str, config: dict, resume: bool) -> None:
    """Mark `output_dir` as this run's on rank 0, with its resolved configuration and the versions in use.

    Raises `UserError` if the folder holds another run and `resume` is off, or holds none and it is on.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    folder = Path(output_dir)
    mark = folder / MARK
    if resume:
        if not mark.exists():
            raise UserError(f"output_dir {folder} holds no run to resume. Leave out --resume to start one.")
        return
    if mark.exists() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(
            f"output_dir {folder} already holds a run or other files.\n"
            "Pass --resume to go on with it, or choose another --output_dir."
        )
    folder.mkdir(parents=True, exist_ok=True)
    record = {"launcher": launcher, "config": config, "versions": {name: version(name) for name in PACKAGES}}
    write_json(mark, record)


def write_json(path: Path, content: dict, mode: int = 0o644) -> None:
    """Write `content` to `path` so that a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.touch(mode)
    beside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, path)
