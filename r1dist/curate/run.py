"""`launch/sample.py`: draw what is missing, then choose among all that was drawn."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

from ..config import SampleRun
from ..errors import RunStopped, UserError, VerifiersBroken
from ..files import MARK, check_folder, owned, sign, write_json
from ..parse import as_tree
from ..process import set_up_process
from ..rewards import VERIFIERS
from ..rewards.pool import Pool
from ..rollout.protocol import RolloutsLost
from .draw import draw
from .select import Tally, filters_said, mixed, select

logger = logging.getLogger(__name__)

ROWS, REPORT, SAMPLES = "rows.jsonl", "report.json", "samples"
# What may change from one start to the next: it decides about samples that are there already, or how they come.
FREE = {"filters", "rows", "mix", "rollout", "verify", "dry_run", "output_dir", "refine", "per_prompt", "share"}
INDIFFERENT = {"rollout", "verify", "dry_run", "output_dir"}  # to which rows are chosen


def sample(run: SampleRun) -> dict:
    """Draw, verify and choose; leaves `rows.jsonl` and `report.json` in `output_dir` and returns the report.

    Raises `UserError` if nothing is left, if the folder's samples were drawn otherwise, or if another process
    is at work there.
    """
    set_up_process()
    _check(run)
    folder = Path(run.output_dir)
    with _ours(run, folder), Pool(VERIFIERS, run.verify) as pool:
        with _turn(run, folder):
            _begin(run, folder)
        journals = {}
        for number, way in enumerate(run.ways):
            try:
                journals[way.name] = draw(run, number, folder / SAMPLES, pool)
            except (RolloutsLost, VerifiersBroken) as error:
                raise RunStopped(f"{error}\nThe samples so far are kept; the same command goes on.") from error
        with _turn(run, folder):
            return _chosen_by_another(run, folder) or _choose(run, folder, journals)


def _ours(run: SampleRun, folder: Path) -> AbstractContextManager:
    """The folder is this process's alone, unless shards are shared out."""
    return owned(folder) if run.shard is None else nullcontext()


def _turn(run: SampleRun, folder: Path) -> AbstractContextManager:
    """What only one of several processes does at a time."""
    return nullcontext() if run.shard is None else owned(folder, wait=True)


def _begin(run: SampleRun, folder: Path) -> None:
    if (folder / MARK).exists():
        _check_same(folder / MARK, run)
    else:
        check_folder(folder, resume=False)
    sign(folder, "sample", as_tree(run))
    (folder / SAMPLES).mkdir(exist_ok=True)


def _chosen_by_another(run: SampleRun, folder: Path) -> dict | None:
    """The report of a process that took part and was faster."""
    if run.shard is None or not (folder / ROWS).exists():
        return None
    report = json.loads((folder / REPORT).read_text())
    return report if report["settings"] == _settings(run) else None


def _settings(run: SampleRun) -> str:
    """A digest of what decides which rows are chosen."""
    tree = {field: value for field, value in as_tree(run).items() if field not in INDIFFERENT}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _choose(run: SampleRun, folder: Path, journals: dict[str, list[Path]]) -> dict:
    tallies = {way.name: Tally() for way in run.ways}
    further: dict[str, int] = {}

    def rows() -> Iterator[dict]:
        seen: set[str] = set()
        for way in run.ways:
            yield from select(run, way, journals[way.name], seen, tallies[way.name])
        if not any(tally.kept for tally in tallies.values()):
            raise UserError(f"filters: no sample is left. {filters_said(tallies)}.")
        for row in mixed(run):
            further[row["source"]] = further.get(row["source"], 0) + 1
            yield row

    beside = folder / f".{ROWS}"
    with beside.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows())
        file.flush()
        os.fsync(file.fileno())
    report = {
        "rows": sum(tally.kept for tally in tallies.values()) + sum(further.values()),
        "ways": {name: asdict(tally) for name, tally in tallies.items()},
        "mixed": further,
        "settings": _settings(run),
    }
    write_json(folder / REPORT, report)
    os.replace(beside, folder / ROWS)
    logger.info("%d rows in %s; %s", report["rows"], folder / ROWS, filters_said(tallies))
    return report


def _check(run: SampleRun) -> None:
    names = [way.name for way in run.ways]
    if len(set(names)) < len(names):
        raise UserError("ways: two of them have the same `name`; each needs its own.")
    if run.rows is None and any(way.share < 1 for way in run.ways):
        raise UserError("ways: a `share` below 1 needs `rows`, the number that it is a share of.")


def _check_same(mark: Path, run: SampleRun) -> None:
    """Refuse to go on with samples that were drawn otherwise."""
    before, now = (_drawing(tree) for tree in (json.loads(mark.read_text())["config"], as_tree(run)))
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if changed:
        key = changed[0]
        raise UserError(
            f"output_dir {mark.parent} holds samples that were drawn with `{key}` {before.get(key)!r}, now it is "
            f"{now.get(key)!r}.\nChoose another --output_dir, or remove that one."
        )


def _drawing(tree: dict, prefix: str = "") -> dict:
    """The fields that decide what is drawn, by their dotted names."""
    flat = {}
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if key in FREE:
            continue
        if isinstance(value, dict | list) and value:
            flat |= _drawing(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
