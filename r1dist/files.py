"""Atomic files, and the folder of a run, which belongs to one run."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from .errors import UserError

RUN_FILE, LOCK = "run.json", ".lock"
DECONTAMINATED = "decontaminated.json"  # the rows that `data.decontaminate` dropped
METRICS = "metrics.jsonl"  # a line for each logged step
CHECKSUMS = "checksums.json"  # the last file of a checkpoint: with it, it is whole
ENDED = "ended.json"  # why a run stopped before its end
STOP = "stop"  # put there, it asks the run to save and stop, as a signal does
REFERENCE = "reference.safetensors"  # the reference model, once it was reset
EVALUATIONS = "evaluations"  # folder: what evaluations during training were answered, a file for each benchmark
TRACES = "traces"  # folder: a line for each rollout, one file for each rank
JUDGEMENTS = "judgements"  # folder: what judges said of completions, one file for each judge and rank
CARD = "README.md"  # the model card
LOGS, SERVERS = "logs", "servers"  # folders that may be there before the run begins
# The files that make up a model; checkpoints, traces and logs do not count.
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "merges.txt", "vocab.txt")
# Written by every run next to its model: a record of the run, not a part of its output.
RECORDS = (RUN_FILE, METRICS, "report.json", "trainer_state.json")
PACKAGES = ("torch", "transformers", "trl", "accelerate", "deepspeed", "datasets", "math-verify")
OPTIONAL_PACKAGES = {"reasoning_gym": "reasoning-gym"}  # module -> distribution


def check_folder(folder: Path, resume: bool) -> None:
    """Raises `UserError` if `folder` holds another run and `resume` is off, or holds none and it is on."""
    if resume:
        if not (folder / RUN_FILE).exists():
            raise UserError(f"output_dir {folder} holds no run to resume. Leave out --resume to start one.")
    elif folder.is_dir() and any(path.name not in (LOCK, STOP, LOGS, SERVERS) for path in folder.iterdir()):
        raise UserError(
            f"output_dir {folder} already holds a run or other files.\n"
            "Pass --resume to continue it, or choose another --output_dir."
        )


def model_files(folder: Path) -> set[Path]:
    """The files of the model in `folder`."""
    return {file for pattern in MODEL_FILES for file in folder.glob(pattern) if file.name not in RECORDS}


def write_run_file(
    folder: Path, launcher: str, config: dict, data: dict[str, str], contaminated: Sequence[dict] = (),
    processes: int = 1,
) -> None:  # fmt: skip
    """Record the configuration, the digests of its data, the versions and the `contaminated` rows in `folder`."""
    if contaminated:
        write_json(folder / DECONTAMINATED, {"dropped": contaminated})
    record = {"launcher": launcher, "config": config, "data": data, "versions": versions(), "processes": processes}
    write_json(folder / RUN_FILE, record)


def versions() -> dict[str, str]:
    """The versions of the packages that affect a run's result."""
    optional = [name for module, name in OPTIONAL_PACKAGES.items() if find_spec(module) is not None]
    return {name: version(name) for name in (*PACKAGES, *optional)}


def samples_folder(output: Path) -> Path:
    """Where the samples of the evaluation in the file `output` are.

    A file for each of `data`, the benchmarks and `requests` in each of the modes (`gsm8k-greedy.jsonl`), with a line
    for each problem: `problem`, `answer`, and `samples` with their `text`, `tokens` and scores.
    """
    return output.with_suffix(".samples")


def greedy_answers(output: Path) -> Iterator[dict]:
    """`problem`, `answer`, `kind` and `text` of an evaluation's greedy samples, of `data.sources` and `requests`."""
    for name in ("data", "requests"):
        path = samples_folder(output) / f"{name}-greedy.jsonl"
        for line in sorted(read_lines(path), key=lambda line: line["prompt_id"]) if path.exists() else []:
            about = {field: line[field] for field in ("problem", "answer", "kind")}
            yield {**about, "text": line["samples"][0]["text"]}


def write_json(path: Path, content: dict, mode: int = 0o644) -> None:
    """Write `content` to `path` so that a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.touch(mode)
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


@contextmanager
def lock_run_dir(folder: Path, wait: bool = False) -> Iterator[None]:
    """Create `folder` and lock it until the end of the context or of this process.

    If another process holds the lock, waits for it, or raises `UserError`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a+")
    except OSError as error:
        raise UserError(f"output_dir {folder} cannot be written to: {error.strerror}. Choose another.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise UserError(
                f"output_dir {folder}: process {lock.read().strip()} is at work there. Wait for it, or stop it."
            ) from error
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def sha256(path: Path) -> str:
    """The digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def append_lines(path: Path, rows: list[dict]) -> None:
    """Append `rows` as JSON lines that are on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        file.flush()
        os.fsync(file.fileno())


def mend_lines(path: Path) -> None:
    """Remove an incomplete last line."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        whole = 0
        for line in file:
            whole += len(line) if line.endswith(b"\n") else 0
        file.truncate(whole)


def read_lines(path: Path) -> Iterator[dict]:
    """The JSON lines of `path`, one after another; raises `UserError` for a damaged one."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}: line {number} is damaged. Remove that line and start again.") from error


def link(source: Path, target: Path) -> None:
    """`target` becomes the same file as `source`, or a copy where a file system has no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
