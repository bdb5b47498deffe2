"""Draws samples, verifies each, and keeps all of them in a journal.

A journal has one line for a prompt, with all of its samples, written when the last of them is there. Killed
at any moment and started again, it continues with the missing prompts.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from tqdm import tqdm

from ..config import Rollout as RolloutSettings
from ..data.templates import Template
from ..files import append_lines
from ..generation.engine import Engine, Request, Rollout, Sampling, sample_seed
from ..rewards.golds import verifier_of
from ..rewards.pool import Pool
from .shards import Shard, claim

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SamplingJob:
    """`samples` completions of each of `prompts`, as a model is asked for them."""

    name: str
    prompts: Dataset
    """Rows of `prompt_dataset`."""
    template: Template
    sampling: Sampling
    samples: int
    seed: int
    """Of the run."""
    stream: int = 0
    """Jobs of a run with other numbers draw other samples, see `sample_seed`."""
    verified: bool = True
    """Whether the answers are checked against the rows' gold answers or tests."""
    measure: Callable[[str], dict[str, float | None]] | None = None
    """Further scores of a completion's text, by name."""

    @property
    def longest(self) -> list[int]:
        """The longest prompt's token ids."""
        return max(self.prompts["prompt_ids"], key=len)

    def requests(self, row: dict) -> list[Request]:
        return [
            Request(row["prompt_ids"], row["prompt_id"], index,
                    sample_seed(self.seed, self.stream, row["prompt_id"], index))
            for index in range(self.samples)
        ]  # fmt: skip


def draw(
    job: SamplingJob, parts: list[Shard], rollout: RolloutSettings, engine: Callable[[], Engine], pool: Pool
) -> list[Path]:
    """Complete the journals of `parts`, which divide `job.prompts`, and return them.

    `engine` is called once something is missing. `pool` verifies.
    """
    for shard, done in claim(parts):
        asked = job.prompts.select(range(shard.begin, shard.end))
        logger.info("%s: %d of %d prompts to go", shard.journal.stem, len(asked) - len(done), len(asked))
        total = (len(asked) - len(done)) * job.samples
        with tqdm(total=total, desc=job.name, unit="sample", leave=False) as progress:
            for line in lines(job, asked, rollout, engine(), pool, done):
                append_lines(shard.journal, [line])
                progress.update(job.samples)
    return [shard.journal for shard in parts]


def lines(
    job: SamplingJob, prompts: Dataset, rollout: RolloutSettings, engine: Engine, pool: Pool, done: set[int]
) -> Iterator[dict]:
    """A line of the journal for each of `prompts` that is not `done`, when its last sample is verified."""
    for batch in _batches(prompts, job.samples, rollout, done):
        rows = {row["prompt_id"]: row for row in batch}
        requests = [request for row in batch for request in job.requests(row)]
        for rollouts in _groups(engine.stream(requests, job.sampling), job.samples):
            row = rows[rollouts[0].request.prompt_id]
            if row["prompt_id"] not in done:
                yield _line(job, row, rollouts, pool)


def _batches(prompts: Dataset, samples: int, rollout: RolloutSettings, done: set[int]) -> Iterator[list[dict]]:
    """The rows to ask for at a time.

    Servers take all that is missing at once. In this process, the last bits of a logit depend on what else
    is in the batch, so batches are the same whatever was done before: then samples are, too.
    """
    if rollout.engine == "vllm":
        yield [row for row in prompts if row["prompt_id"] not in done]
        return
    size = max(1, rollout.batch_size // samples)
    for begin in range(0, len(prompts), size):
        batch = [prompts[place] for place in range(begin, min(begin + size, len(prompts)))]
        if any(row["prompt_id"] not in done for row in batch):
            yield batch


def _groups(arriving: Iterator[tuple[int, Rollout]], samples: int) -> Iterator[list[Rollout]]:
    """All samples of a prompt, as soon as the last of them is there."""
    groups = defaultdict(list)
    for _, rollout in arriving:
        group = groups[rollout.request.prompt_id]
        group.append(rollout)
        if len(group) == samples:
            yield sorted(groups.pop(rollout.request.prompt_id), key=lambda r: r.request.sample_index)


def _line(job: SamplingJob, row: dict, rollouts: list[Rollout], pool: Pool) -> dict:
    texts = [job.template.text(rollout.token_ids) for rollout in rollouts]
    right = _verified(row, texts, pool) if job.verified else [None] * len(texts)
    return {
        "prompt_id": row["prompt_id"],
        "problem": row["problem"],
        "earlier": row["earlier"],
        "answer": row["answer"],
        "source": row["source"],
        "kind": row["kind"],
        "samples": [
            {
                "seed": rollout.request.seed,
                "text": text,
                "tokens": len(rollout.token_ids),
                "finished": rollout.finish_reason == "stop",
                "accuracy": score,
                **(job.measure(text) if job.measure else {}),
            }
            for rollout, text, score in zip(rollouts, texts, right, strict=True)
        ],
    }


def _verified(row: dict, texts: list[str], pool: Pool) -> list[float | None]:
    """1 for a right answer or a program that passes all of its tests, else 0; None where the row cannot be scored."""
    verifier = verifier_of(row)
    scores = pool.scores(verifier, texts, [row] * len(texts))
    return scores if verifier != "code" else [None if score is None else float(score == 1) for score in scores]
