"""Completions of a whole dataset, with a progress bar."""

from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from ..data.templates import prompt_ids
from ..generation.engine import Engine, Request, Rollout, Sampling, generate, sample_seed


def complete(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    sampling: Sampling,
    samples: int,
    seed: int,
    batch_size: int,
) -> tuple[list[Rollout], list[str]]:
    """`samples` rollouts for each row, one row after another, and their texts."""
    requests = [
        Request(ids, row["prompt_id"], index, sample_seed(seed, 0, row["prompt_id"], index))
        for row in dataset
        for ids in [prompt_ids(tokenizer, row["prompt"])]
        for index in range(samples)
    ]
    name = "greedy" if sampling.temperature == 0 else f"sampled at T={sampling.temperature:g}"
    rollouts: list[Rollout] = []
    with tqdm(total=len(requests), desc=name, unit="rollout", leave=False) as progress:
        for begin in range(0, len(requests), batch_size):
            rollouts += generate(engine, requests[begin : begin + batch_size], sampling)
            progress.update(min(batch_size, len(requests) - begin))
    return rollouts, tokenizer.batch_decode([r.token_ids for r in rollouts], skip_special_tokens=True)


def with_texts(rows: list[dict], texts: list[str]) -> list[dict]:
    """What was asked and what came, for people to read."""
    return [
        {**{name: row[name] for name in ("problem", "answer", "kind")}, "text": text}
        for row, text in zip(rows, texts, strict=True)
    ]
