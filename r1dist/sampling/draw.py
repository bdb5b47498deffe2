"""Draws the samples of one generator, verifies each, and keeps all of them in a journal.

A journal has one line for a prompt, with all of its samples, written when the last of them is there. Killed
at any moment and started again, it continues with the missing prompts.
"""

import logging
import os
import socket
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from datasets import Dataset
from tqdm import tqdm

from ..config import Generator, SampleRun
from ..data.prompts import prompt_dataset
from ..data.templates import Template, load_template
from ..files import append_lines
from ..generation.engine import Engine, Request, Rollout, Sampling, sample_seed
from ..generation.inference import fixed_engine
from ..generation.vllm.limits import Demand
from ..generation.vllm.start import check_servers
from ..models import load_model_config
from ..rewards.pool import Pool
from .shards import claim, shards

logger = logging.getLogger(__name__)


def check_servers_of(run: SampleRun, generator: Generator, prompts: Dataset) -> None:
    """Raises `UserError` where `run`'s servers cannot do what `generator` will ask of them."""
    if run.rollout.engine == "vllm":
        template = generator_template(generator)
        check_servers(run.rollout, _demand(generator, template, prompts), generator.model.dtype, trainers=0)


def draw(run: SampleRun, number: int, prompts: Dataset, folder: Path, pool: Pool) -> list[Path]:
    """Complete the journals of `run.generators[number]`, which asks `prompts`, in `folder`, and return them.

    `pool` verifies.
    """
    generator = run.generators[number]
    template = generator_template(generator)
    parts = shards(folder, generator.name, len(prompts), run.shard)
    demand = _demand(generator, template, prompts)
    with ExitStack() as stack:
        engine = None
        for shard, done in claim(parts):
            if engine is None:  # where nothing is missing, no model is loaded
                logs = folder / f"{socket.gethostname()}-{os.getpid()}" if run.shard else folder
                check_servers(run.rollout, demand, generator.model.dtype, trainers=0)
                engine = stack.enter_context(fixed_engine(run.rollout, generator.model, template, demand.tokens, logs))
            asked = prompts.select(range(shard.begin, shard.end))
            logger.info("%s: %d of %d prompts to go", shard.journal.stem, len(asked) - len(done), len(asked))
            fill(run, number, asked, engine, template, shard.journal, done, pool)
    return [shard.journal for shard in parts]


def generator_template(generator: Generator) -> Template:
    """The template by which `generator` is asked."""
    return load_template(generator.model, generator.data.template, generator.prompting.prefill)


def generator_prompts(run: SampleRun, generator: Generator, template: Template) -> Dataset:
    """What `generator`, one of `run`'s, asks."""
    context = load_model_config(generator.model).max_position_embeddings
    completion = generator.sampling.max_tokens
    return prompt_dataset(generator.data, template, context, completion, generator.prompting, run.seed)


def fill(
    run: SampleRun,
    number: int,
    prompts: Dataset,
    engine: Engine,
    template: Template,
    journal: Path,
    done: set[int],
    pool: Pool,
) -> None:
    """Ask for what is not `done` and append it to `journal`, each prompt when its last sample is verified."""
    generator = run.generators[number]
    samples = generator.sampling.samples
    total = (len(prompts) - len(done)) * samples
    with tqdm(total=total, desc=generator.name, unit="sample", leave=False) as progress:
        for batch in _batches(run, generator, prompts, done):
            rows = {row["prompt_id"]: row for row in batch}
            for rollouts in _groups(engine, requests_of(run, number, batch), generator):
                row = rows[rollouts[0].request.prompt_id]
                if row["prompt_id"] not in done:
                    append_lines(journal, [_line(row, rollouts, template, pool)])
                    progress.update(samples)


def requests_of(run: SampleRun, number: int, rows: Iterable[dict]) -> list[Request]:
    """All samples of `rows`, as `run.generators[number]` asks for them."""
    generator = run.generators[number]
    return [
        Request(row["prompt_ids"], row["prompt_id"], index, sample_seed(run.seed, number, row["prompt_id"], index))
        for row in rows
        for index in range(generator.sampling.samples)
    ]


def _demand(generator: Generator, template: Template, prompts: Dataset) -> Demand:
    longest = max(prompts["prompt_ids"], key=len)
    return Demand(generator.model, template.tokenizer, longest, generator.sampling.max_tokens, trains=False)


def _batches(run: SampleRun, generator: Generator, prompts: Dataset, done: set[int]) -> Iterator[list[dict]]:
    """The rows to ask for at a time.

    Servers take all that is missing at once. In this process, the last bits of a logit depend on what else
    is in the batch, so batches are the same whatever was done before: then samples are, too.
    """
    if run.rollout.engine == "vllm":
        yield [row for row in prompts if row["prompt_id"] not in done]
        return
    size = max(1, run.rollout.batch_size // generator.sampling.samples)
    for begin in range(0, len(prompts), size):
        batch = [prompts[place] for place in range(begin, min(begin + size, len(prompts)))]
        if any(row["prompt_id"] not in done for row in batch):
            yield batch


def _groups(engine: Engine, requests: list[Request], generator: Generator) -> Iterator[list[Rollout]]:
    """All samples of a prompt, as soon as the last of them is there."""
    sampling = Sampling(generator.sampling.max_tokens, generator.sampling.temperature, generator.sampling.top_p)
    groups = defaultdict(list)
    for _, rollout in engine.stream(requests, sampling):
        group = groups[rollout.request.prompt_id]
        group.append(rollout)
        if len(group) == generator.sampling.samples:
            yield sorted(groups.pop(rollout.request.prompt_id), key=lambda r: r.request.sample_index)


def _line(row: dict, rollouts: list[Rollout], template: Template, pool: Pool) -> dict:
    texts = [template.text(rollout.token_ids) for rollout in rollouts]
    right = pool.scores("accuracy", texts, [row] * len(texts))
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
            }
            for rollout, text, score in zip(rollouts, texts, right, strict=True)
        ],
    }
