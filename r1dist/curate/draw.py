"""Draws the samples of one way, verifies each, and keeps all of them in a journal.

A journal has one line for a prompt, with all of its samples, written when the last of them is there. Killed
at any moment and started again, the drawing goes on with the prompts that are missing.
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
from transformers import PreTrainedTokenizerBase

from ..config import SampleRun, Way
from ..data.prompts import prompt_dataset
from ..data.templates import prompt_ids
from ..files import append_lines
from ..models import load_model_config, load_tokenizer
from ..rewards.pool import Pool
from ..rollout.fixed import fixed_engine
from ..rollout.protocol import Engine, Request, Rollout, Sampling, sample_seed
from .shards import claim, shards

logger = logging.getLogger(__name__)


def draw(run: SampleRun, number: int, folder: Path, pool: Pool) -> list[Path]:
    """Complete the journals of `run.ways[number]` in `folder`, and return them; `pool` verifies."""
    way = run.ways[number]
    tokenizer = load_tokenizer(way.model)
    prompts = way_prompts(way, tokenizer)
    parts = shards(folder, way.name, len(prompts), run.shard)
    longest = max(prompts["prompt_length"]) + _room(way, tokenizer)
    with ExitStack() as stack:
        engine = None
        for shard, done in claim(parts):
            if engine is None:  # where nothing is missing, no model is loaded
                logs = folder / f"{socket.gethostname()}-{os.getpid()}" if run.shard else folder
                engine = stack.enter_context(fixed_engine(run.rollout, way.model, tokenizer, longest, logs))
            asked = prompts.select(range(shard.begin, shard.end))
            logger.info("%s: %d of %d prompts to go", shard.journal.stem, len(asked) - len(done), len(asked))
            fill(run, number, asked, engine, tokenizer, shard.journal, done, pool)
    return [shard.journal for shard in parts]


def way_prompts(way: Way, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """What `way` asks."""
    context = load_model_config(way.model).max_position_embeddings
    return prompt_dataset(way.data, tokenizer, way.model.path, context, _room(way, tokenizer), way.prompting)


def fill(
    run: SampleRun,
    number: int,
    prompts: Dataset,
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    journal: Path,
    done: set[int],
    pool: Pool,
) -> None:
    """Ask for what is not `done` and append it to `journal`, each prompt when its last sample is verified."""
    way = run.ways[number]
    samples = way.sampling.samples
    total = (len(prompts) - len(done)) * samples
    with tqdm(total=total, desc=way.name, unit="sample", leave=False) as progress:
        for batch in _batches(run, way, prompts, done):
            rows = {row["prompt_id"]: row for row in batch}
            for rollouts in _groups(engine, requests_of(run, number, batch, tokenizer), way):
                row = rows[rollouts[0].request.prompt_id]
                if row["prompt_id"] not in done:
                    append_lines(journal, [_line(row, rollouts, way.prompting.prefill, tokenizer, pool)])
                    progress.update(samples)


def requests_of(
    run: SampleRun, number: int, rows: Iterable[dict], tokenizer: PreTrainedTokenizerBase
) -> list[Request]:
    """All samples of `rows`, as `run.ways[number]` asks for them."""
    way = run.ways[number]
    prefill = _prefill(way, tokenizer)
    return [
        Request(ids + prefill, row["prompt_id"], index, sample_seed(run.seed, number, row["prompt_id"], index))
        for row in rows
        for ids in [prompt_ids(tokenizer, row["prompt"])]
        for index in range(way.sampling.samples)
    ]


def _prefill(way: Way, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer(way.prompting.prefill)["input_ids"] if way.prompting.prefill else []


def _room(way: Way, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that the model must hold beside the prompt."""
    return way.sampling.max_tokens + len(_prefill(way, tokenizer))


def _batches(run: SampleRun, way: Way, prompts: Dataset, done: set[int]) -> Iterator[list[dict]]:
    """The rows to ask for at a time.

    Servers take all that is missing at once. In this process, the last bits of a logit depend on what else
    is in the batch, so batches are the same whatever was done before: then samples are, too.
    """
    if run.rollout.engine == "vllm":
        yield [row for row in prompts if row["prompt_id"] not in done]
        return
    size = max(1, run.rollout.batch_size // way.sampling.samples)
    for begin in range(0, len(prompts), size):
        batch = [prompts[place] for place in range(begin, min(begin + size, len(prompts)))]
        if any(row["prompt_id"] not in done for row in batch):
            yield batch


def _groups(engine: Engine, requests: list[Request], way: Way) -> Iterator[list[Rollout]]:
    """All samples of a prompt, as soon as the last of them is there."""
    sampling = Sampling(way.sampling.max_tokens, way.sampling.temperature, way.sampling.top_p)
    groups = defaultdict(list)
    for _, rollout in engine.stream(requests, sampling):
        group = groups[rollout.request.prompt_id]
        group.append(rollout)
        if len(group) == way.sampling.samples:
            yield sorted(groups.pop(rollout.request.prompt_id), key=lambda r: r.request.sample_index)


def _line(row: dict, rollouts: list[Rollout], prefill: str, tokenizer: PreTrainedTokenizerBase, pool: Pool) -> dict:
    texts = tokenizer.batch_decode([r.token_ids for r in rollouts], skip_special_tokens=True)
    texts = [prefill + text for text in texts]
    right = pool.scores("accuracy", texts, [row] * len(texts))
    return {
        "prompt_id": row["prompt_id"],
        "problem": row["problem"],
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
