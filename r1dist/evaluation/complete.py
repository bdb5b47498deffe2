"""Completions of a whole dataset, with a progress bar."""

from datasets import Dataset
from tqdm import tqdm

from ..data.templates import Template
from ..generation.engine import Engine, Request, Rollout, Sampling, generate, sample_seed


def complete(
    engine: Engine,
    template: Template,
    dataset: Dataset,
    sampling: Sampling,
    samples: int,
    seed: int,
    batch_size: int,
) -> tuple[list[Rollout], list[str]]:
    """`samples` rollouts for each row, one row after another, and their texts."""
    requests = [
        Request(row["prompt_ids"], row["prompt_id"], index, sample_seed(seed, 0, row["prompt_id"], index))
        for row in dataset
        for index in range(samples)
    ]
    name = "greedy" if sampling.temperature == 0 else f"sampled at T={sampling.temperature:g}"
    rollouts: list[Rollout] = []
    with tqdm(total=len(requests), desc=name, unit="rollout", leave=False) as progress:
        for begin in range(0, len(requests), batch_size):
            rollouts += generate(engine, requests[begin : begin + batch_size], sampling)
            progress.update(min(batch_size, len(requests) - begin))
    return rollouts, [template.text(rollout.token_ids) for rollout in rollouts]


def with_texts(rows: list[dict], texts: list[str]) -> list[dict]:
    """What was asked and what came, for people to read."""
    return [
        {**{name: row[name] for name in ("problem", "answer", "kind")}, "text": text}
        for row, text in zip(rows, texts, strict=True)
    ]
