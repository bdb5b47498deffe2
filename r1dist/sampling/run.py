"""`launch/sample.py`: draw what is missing, then choose among all that was drawn."""

import hashlib
import json
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path

from ..config import SampleRun
from ..config.loader import as_tree
from ..data.prompts import prompt_dataset
from ..data.sources import load_conversations
from ..data.templates import load_template
from ..errors import RunStopped, UserError, VerifiersBroken
from ..files import RUN_FILE, check_folder, lock_run_dir, write_json, write_run_file
from ..generation.engine import RolloutsLost, Sampling
from ..generation.inference import engine_when_needed
from ..generation.vllm.limits import Demand
from ..generation.vllm.start import check_servers
from ..models import load_model_config
from ..rewards import verifiers_of
from ..rewards.golds import check_answers
from ..rewards.pool import Pool
from ..run.process import set_up_process
from ..run.resume import check_same, data_digests
from .draw import SamplingJob, draw
from .select import Tally, filters_text, mixed, select
from .select_prompts import PromptTally, select_prompts
from .shards import shards

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
        contaminated: list[dict] = []
        jobs = _jobs(run, pool, contaminated)
        if not (folder / RUN_FILE).exists():  # later, nothing may be missing, and no server be needed
            for number, job in enumerate(jobs):
                demand = _demand(run, number, job)
                check_servers(run.rollout, demand, demand.model.dtype, trainers=0)
        with _ours(run, folder):
            with _turn(run, folder):
                _begin(run, folder, contaminated)
            try:
                journals = {job.name: _draw(run, number, job, pool) for number, job in enumerate(jobs)}
            except (RolloutsLost, VerifiersBroken) as error:
                raise RunStopped(f"{error}\nThe samples so far are kept; the same command continues.") from error
            with _turn(run, folder):
                return _chosen_by_another(run, folder) or _choose(run, folder, journals, jobs)


def _jobs(run: SampleRun, pool: Pool, contaminated: list[dict]) -> list[SamplingJob]:
    """What each generator draws; what decontamination drops is added to `contaminated`.

    Raises `UserError` for data that cannot be used, `mix` included.
    """
    if run.mix:
        load_conversations(run.mix, run.seed)
    jobs = []
    for number in range(len(run.generators)):
        jobs.append(sampling_job(run, number, contaminated))
        if run.filters.correct:
            check_answers(jobs[-1].prompts, pool, f"generators.{number}.data.sources")
    return jobs


def sampling_job(run: SampleRun, number: int, contaminated: list[dict] | None = None) -> SamplingJob:
    """What `run.generators[number]` draws; what its `data.decontaminate` drops is added to `contaminated`."""
    generator = run.generators[number]
    model, data, prompting, asked = generator.model, generator.data, generator.prompting, generator.sampling
    template = load_template(model, data.template, prompting.prefill)
    if run.filters.format and run.pass_rate is None:
        template.require_thoughts("filters.format keeps replies that think")
    context = load_model_config(model).max_position_embeddings
    prompts = prompt_dataset(data, template, context, asked.max_tokens, prompting, run.seed, contaminated)
    sampling = Sampling(asked.max_tokens, asked.temperature, asked.top_p)
    return SamplingJob(generator.name, prompts, template, sampling, asked.samples, run.seed, stream=number)


def _demand(run: SampleRun, number: int, job: SamplingJob) -> Demand:
    model = run.generators[number].model
    return Demand(model, job.template.tokenizer, job.longest, job.sampling.max_tokens, trains=False)


def _draw(run: SampleRun, number: int, job: SamplingJob, pool: Pool) -> list[Path]:
    folder = Path(run.output_dir) / SAMPLES
    logs = folder / f"{socket.gethostname()}-{os.getpid()}" if run.shard else folder
    with engine_when_needed(run.rollout, _demand(run, number, job), job.template, logs) as engine:
        return draw(job, shards(folder, job.name, len(job.prompts), run.shard), run.rollout, engine, pool)


def _ours(run: SampleRun, folder: Path) -> AbstractContextManager:
    """The folder is this process's alone, unless shards are shared out."""
    return lock_run_dir(folder) if run.shard is None else nullcontext()


def _turn(run: SampleRun, folder: Path) -> AbstractContextManager:
    """What only one of several processes does at a time."""
    return nullcontext() if run.shard is None else lock_run_dir(folder, wait=True)


def _begin(run: SampleRun, folder: Path, contaminated: Sequence[dict] = ()) -> None:
    tree, data = as_tree(run), data_digests(as_tree(run))
    if (folder / RUN_FILE).exists():
        check_same(folder, SampleRun, tree, data)
    else:
        check_folder(folder, resume=False)
    write_run_file(folder, "sample", tree, data, contaminated)
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


def _choose(run: SampleRun, folder: Path, journals: dict[str, list[Path]], jobs: list[SamplingJob]) -> dict:
    keeps_prompts = run.pass_rate is not None
    tallies = {generator.name: PromptTally() if keeps_prompts else Tally() for generator in run.generators}
    what, field = ("prompt", "pass_rate") if keeps_prompts else ("sample", "filters")
    further: dict[str, int] = {}

    def rows() -> Iterator[dict]:
        seen: set[str] = set()
        for generator, job in zip(run.generators, jobs, strict=True):
            drawn, tally = journals[generator.name], tallies[generator.name]
            if keeps_prompts:
                yield from select_prompts(run, generator, drawn, job.prompts, seen, tally)
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
