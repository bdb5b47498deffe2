"""Scores of a policy while it is trained: on each rank's share of the problems, by the engine that the trainer has."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate.utils import gather_object

from ..config import Data, GRPORun, Prompting, SFTRun, Source
from ..config.trl_fields import trl_value
from ..config.validate import EVALUATED
from ..data.templates import Template
from ..files import EVALUATIONS
from ..generation.engine import Engine, Sampling
from ..models import load_model_config
from ..rewards.pool import Pool
from ..sampling.draw import SamplingJob, lines_of
from .problems import ProblemReader
from .scores import Scores, measures, scores_of

LANGUAGE = "en"


class TrainingEvaluation:
    """Measures a policy on `jobs`, the same ones each time.

    Args:
        folder: Where the first rank adds the samples to a file for each job, with the step.
        pool: Verifies.
    """

    def __init__(self, jobs: Sequence[SamplingJob], pool: Pool, folder: Path, rank: int, ranks: int):
        self.jobs, self.pool, self.folder = jobs, pool, folder
        self.rank, self.ranks = rank, ranks

    @property
    def longest(self) -> list[list[int]]:
        """The token ids of each job's longest prompt."""
        return [job.longest for job in self.jobs]

    def measure(self, engine: Engine, step: int, heartbeat: Callable[[], None]) -> dict[str, float]:
        """`eval_<name>/<score>` of each job, with the bounds of the accuracy's 95 % interval. A collective."""
        found: dict[str, float] = {}
        for job in self.jobs:
            own = list(job.prompts.select(range(self.rank, len(job.prompts), self.ranks)))
            lines = []
            for line in lines_of(job, own, engine, self.pool):  # each rank asks once: weights may have to be gathered
                lines.append(line)
                heartbeat()
            lines = sorted(gather_object(lines), key=lambda line: line["prompt_id"])
            if self.rank == 0:
                self._write(job.name, step, lines)
            found |= _logged(job.name, scores_of(lines, self.pool))
        return found

    def _write(self, name: str, step: int, lines: list[dict]) -> None:
        self.folder.mkdir(exist_ok=True)
        with (self.folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step, **line}, ensure_ascii=False) + "\n" for line in lines)


def _logged(name: str, scores: Scores) -> dict[str, float]:
    found = {score: getattr(scores, score) for score in EVALUATED}
    found |= dict(zip(("accuracy_low", "accuracy_high"), scores.ci95, strict=True))
    found |= {f"pass_at_{k}": value for k, value in (scores.pass_at_k or {}).items() if k != "1"}
    return {f"eval_{name}/{score}": value for score, value in found.items()}


def evaluation_sources(data: Data) -> list[Source]:
    """Of `data.eval`."""
    return [source for benchmark in data.eval for source in benchmark.sources]


def training_evaluation(
    run: GRPORun | SFTRun, template: Template, pool: Pool, rank: int, ranks: int
) -> TrainingEvaluation | None:
    """The evaluation that `run.data.eval` asks for, read and checked; None if it asks for none. Raises `UserError`."""
    if not run.data.eval:
        return None
    max_tokens = trl_value(run, "max_completion_length") if isinstance(run, GRPORun) else run.eval_max_tokens
    prompting = run.prompting if isinstance(run, GRPORun) else Prompting()
    context = load_model_config(run.model).max_position_embeddings
    reader = ProblemReader(run.data.template, template, prompting, context, max_tokens, pool)
    jobs = [
        SamplingJob(
            problems.name, problems.rows, template,
            Sampling(max_tokens, temperature=0.0 if problems.samples == 1 else 1.0),
            problems.samples, trl_value(run, "seed"), measure=functools.partial(measures, target=LANGUAGE),
        )
        for problems in reader.benchmarks(run.data.eval, "data.eval")
    ]  # fmt: skip
    return TrainingEvaluation(jobs, pool, Path(run.trl["output_dir"]) / EVALUATIONS, rank, ranks)
