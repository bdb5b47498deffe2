"""Scores on problems with known answers: every sample is kept as it is made, so that a killed evaluation continues."""

import functools
import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from datasets import Dataset

from ..config import EvaluateRun, Source
from ..config.loader import as_tree
from ..data.templates import Template, load_template
from ..errors import RunStopped, VerifiersBroken
from ..files import RUN_FILE, lock_run_dir, read_lines, samples_folder, sha256, write_json, write_run_file
from ..generation.engine import RolloutsLost, Sampling
from ..generation.inference import engine_when_needed
from ..generation.vllm.limits import Demand
from ..generation.vllm.start import check_servers
from ..models import load_model_config, model_path
from ..rewards import verifiers_of
from ..rewards.pool import Pool
from ..run.process import set_up_process
from ..run.resume import check_same, data_digests
from ..sampling.draw import SamplingJob, draw
from ..sampling.shards import shards
from .problems import ProblemReader, Problems
from .requests import request_dataset, score_replies
from .scores import measures, scores_of

OWN, REQUESTS = "data", "requests"
"""What the problems of `data.sources`, and general requests, are called in the names of journals."""


def evaluate(run: EvaluateRun) -> dict:
    """The scores of `data.sources` (`greedy`, `sampled`), of each of `benchmarks`, and of `requests`.

    They are written to `run.output` if that is set, and the samples to a folder beside it, see `files.samples_folder`.
    Raises `UserError`, and `RunStopped` where no server is left.
    """
    set_up_process()
    template = load_template(run.model, run.data.template, run.prompting.prefill)
    share = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    with Pool(verifiers_of((), _sources(run)), run.verify, share) as pool:
        problems, asked = _read(run, template, pool)
        jobs = {(p.name, mode): _job(run, template, p, mode) for p in problems for mode in run.modes}
        if asked is not None:
            greedy = Sampling(run.requests.max_tokens, temperature=0)
            name = f"{REQUESTS}-greedy"
            jobs[REQUESTS, "greedy"] = SamplingJob(name, asked, template, greedy, 1, run.seed, verified=False)
        lines = _draw(run, template, list(jobs.values()), pool)
        result: dict = {"model": run.model.path, "seed": run.seed}
        found = {name: {} for name, _ in jobs if name not in (OWN, REQUESTS)}
        for (name, mode), job in jobs.items():
            if name != REQUESTS:
                (result if name == OWN else found[name])[mode] = asdict(scores_of(lines[job.name], pool))
    result |= {"benchmarks": found} if found else {}
    if asked is not None:
        result["requests"] = asdict(score_replies(run, asked, lines[f"{REQUESTS}-greedy"]))
    if run.output:
        write_json(Path(run.output), result)
    return result


def _sources(run: EvaluateRun) -> list[Source]:
    return [*run.data.sources, *(source for benchmark in run.benchmarks for source in benchmark.sources)]


def _read(run: EvaluateRun, template: Template, pool: Pool) -> tuple[list[Problems], Dataset | None]:
    """All that is asked: problems, and requests if there are any. Raises `UserError` for what cannot be scored."""
    context = load_model_config(run.model).max_position_embeddings
    reader = ProblemReader(run.data.template, template, run.prompting, context, run.sampling.max_tokens, pool)
    problems = reader.benchmarks(run.benchmarks, "benchmarks")
    if run.data.sources:
        problems.insert(0, Problems(OWN, reader.read(run.data.sources, "data.sources"), run.sampling.samples))
    return problems, None if run.requests is None else request_dataset(run, template, context)


def _job(run: EvaluateRun, template: Template, problems: Problems, mode: str) -> SamplingJob:
    sampled = mode == "sampled"
    how = (run.sampling.temperature, run.sampling.top_p) if sampled else (0.0, 1.0)
    return SamplingJob(
        name=f"{problems.name}-{mode}",
        prompts=problems.rows,
        template=template,
        sampling=Sampling(run.sampling.max_tokens, *how),
        samples=problems.samples if sampled else 1,
        seed=run.seed,
        measure=functools.partial(measures, target=run.target_language),
    )


def _draw(run: EvaluateRun, template: Template, jobs: list[SamplingJob], pool: Pool) -> dict[str, list[dict]]:
    """Complete what is missing; the lines of each job's journal, by its name, in the order of its prompts."""
    longest = max(jobs, key=lambda job: len(job.longest) + job.sampling.max_tokens)
    demand = Demand(run.model, template.tokenizer, longest.longest, longest.sampling.max_tokens, trains=False)
    with TemporaryDirectory() as scratch:
        folder = samples_folder(Path(run.output)) if run.output else Path(scratch)
        if not (folder / RUN_FILE).exists():  # later, nothing may be missing, and no server be needed
            check_servers(run.rollout, demand, run.model.dtype, trainers=0)
        logs = folder / f"{socket.gethostname()}-{os.getpid()}" if run.shard else folder / "servers"
        # What is not kept is nobody else's, and no later start's.
        ours = _ours(run, folder) if run.output else nullcontext()
        with ours, engine_when_needed(run.rollout, demand, template, logs) as engine:
            try:
                journals = {
                    job.name: draw(
                        job, shards(folder, job.name, len(job.prompts), run.shard), run.rollout, engine, pool
                    )
                    for job in jobs
                }
            except (RolloutsLost, VerifiersBroken) as error:
                kept = "\nThe samples so far are kept; the same command continues." if run.output else ""
                raise RunStopped(f"{error}{kept}") from error
        return {name: _lines(parts) for name, parts in journals.items()}


def _lines(journals: list[Path]) -> list[dict]:
    return sorted((line for journal in journals for line in read_lines(journal)), key=lambda line: line["prompt_id"])


@contextmanager
def _ours(run: EvaluateRun, folder: Path) -> Iterator[None]:
    """The folder is this evaluation's: it is begun, or holds samples of the same model, asked the same.

    It is this process's alone, unless shards are shared out. Raises `UserError`.
    """
    tree, data = as_tree(run), data_digests(as_tree(run)) | {"model.path": _weights_digest(run)}
    with ExitStack() as lock:
        lock.enter_context(lock_run_dir(folder, wait=run.shard is not None))
        if (folder / RUN_FILE).exists():
            check_same(folder, EvaluateRun, tree, data, field="output")
        else:
            write_run_file(folder, "evaluate", tree, data)
        if run.shard is not None:
            lock.close()
        yield


def _weights_digest(run: EvaluateRun) -> str:
    """SHA-256 of the model's weights, by their files' names; of a hub's model, of its name."""
    files = sorted(Path(model_path(run.model)).glob("*.safetensors"))
    named = [f"{file.name}:{sha256(file)}" for file in files] or [run.model.path]
    return hashlib.sha256("\n".join(named).encode()).hexdigest()
