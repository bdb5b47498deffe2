"""`launch/sample.py`: draw what is missing, then choose among all that was drawn."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

from datasets import Dataset

from ..config import SampleRun
from ..config.loader import as_tree
from ..data.sources import load_conversations
from ..errors import RunStopped, UserError, VerifiersBroken
from ..files import RUN_FILE, check_folder, lock_run_dir, write_json, write_run_file
from ..generation.engine import RolloutsLost
from ..rewards import verifiers_of
from ..rewards.golds import check_golds
from ..rewards.pool import Pool
from ..run.process import set_up_process
from ..run.resume import check_same, data_digests
from .draw import check_servers_of, draw, generator_prompts, generator_template
from .select import Tally, filters_text, mixed, select
from .select_prompts import PromptTally, select_prompts

logger = logging.getLogger(__name__)

ROWS, REPORT, SAMPLES = "rows.jsonl", "report.json", "samples"
INDIFFERENT = {"rollout", "verify", "placement", "dry_run", "output_dir"}  # to which rows are chosen


def sample(run: SampleRun) -> dict:
    """Draw, verify and choose; leaves `rows.jsonl` and `report.json` in `output_dir` and returns the report.

    Raises `UserError` if nothing is left, if the folder's samples were drawn otherwise, or if another process
    is at work there.
    """
    set_up_process()
    folder = Path(run.output_dir)
    verifiers = verifiers_of((), [source for generator in run.generators for source in generator.data.sources])
    with Pool(verifiers, run.verify, share=int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) as pool:
        asked = _prompts(run, pool)
        if not (folder / RUN_FILE).exists():  # later, nothing may be missing, and no server be needed
            for generator, prompts in zip(run.generators, asked, strict=True):
                check_servers_of(run, generator, prompts)
        with _ours(run, folder):
            with _turn(run, folder):
                _begin(run, folder)
            journals = {}
            for number, generator in enumerate(run.generators):
                try:
                    journals[generator.name] = draw(run, number, asked[number], folder / SAMPLES, pool)
                except (RolloutsLost, VerifiersBroken) as error:
                    raise RunStopped(f"{error}\nThe samples so far are kept; the same command continues.") from error
            with _turn(run, folder):
                return _chosen_by_another(run, folder) or _choose(run, folder, journals, asked)


def _prompts(run: SampleRun, pool: Pool) -> list[Dataset]:
    """What each generator asks. Raises `UserError` for data that cannot be used, `mix` included."""
    if run.mix:
        load_conversations(run.mix, run.seed)
    asked = []
    for number, generator in enumerate(run.generators):
        template = generator_template(generator)
        if run.filters.format and run.pass_rate is None:
            template.require_thoughts("filters.format keeps replies that think")
        asked.append(generator_prompts(run, generator, template))
        if run.filters.correct:
            check_golds("accuracy", asked[-1], pool, f"generators.{number}.data.sources")
    return asked


def _ours(run: SampleRun, folder: Path) -> AbstractContextManager:
    """The folder is this process's alone, unless shards are shared out."""
    return lock_run_dir(folder) if run.shard is None else nullcontext()


def _turn(run: SampleRun, folder: Path) -> AbstractContextManager:
    """What only one of several processes does at a time."""
    return nullcontext() if run.shard is None else lock_run_dir(folder, wait=True)


def _begin(run: SampleRun, folder: Path) -> None:
    tree, data = as_tree(run), data_digests(as_tree(run))
    if (folder / RUN_FILE).exists():
        check_same(folder, SampleRun, tree, data)
    else:
        check_folder(folder, resume=False)
    write_run_file(folder, "sample", tree, data)
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
    return hashlib.sha256(json.dumps([tree, data_digests(tree)], sort_keys=True).encode()).hexdigest()


def _choose(run: SampleRun, folder: Path, journals: dict[str, list[Path]], asked: list[Dataset]) -> dict:
    keeps_prompts = run.pass_rate is not None
    tallies = {generator.name: PromptTally() if keeps_prompts else Tally() for generator in run.generators}
    what, field = ("prompt", "pass_rate") if keeps_prompts else ("sample", "filters")
    further: dict[str, int] = {}

    def rows() -> Iterator[dict]:
        seen: set[str] = set()
        for generator, prompts in zip(run.generators, asked, strict=True):
            drawn, tally = journals[generator.name], tallies[generator.name]
            if keeps_prompts:
                yield from select_prompts(run, generator, drawn, prompts, seen, tally)
            else:
                yield from select(run, generator, drawn, seen, tally)
        if not any(tally.kept for tally in tallies.values()):
            raise UserError(f"{field}: no {what} is left. {filters_text(tallies, what)}.")
        for row in mixed(run):
            further[row["source"]] = further.get(row["source"], 0) + 1
            yield row

    partial = folder / f".{ROWS}"
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows())
        file.flush()
        os.fsync(file.fileno())
    report = {
        "rows": sum(tally.kept for tally in tallies.values()) + sum(further.values()),
        "generators": {name: asdict(tally) for name, tally in tallies.items()},
        "mixed": further,
        "settings": _settings(run),
    }
    write_json(folder / REPORT, report)
    os.replace(partial, folder / ROWS)
    logger.info("%d rows in %s; %s", report["rows"], folder / ROWS, filters_text(tallies, what))
    return report
