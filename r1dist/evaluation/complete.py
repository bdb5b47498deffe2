"""Completions of a whole dataset, with a progress bar."""

from datasets import Dataset
from tqdm import tqdm

from ..data.templates import Template
from ..generation.engine import Engine, Request, Rollout, Sampling, sample_seed


def complete(
    engine: Engine,
    template: Template,
    dataset: Dataset,
    sampling: Sampling,
    samples: int,
    seed: int,
) -> tuple[list[Rollout], list[str]]:
    """`samples` rollouts for each row, one row after another, and their texts."""
    requests = [
        Request(row["prompt_ids"], row["prompt_id"], index, sample_seed(seed, 0, row["prompt_id"], index))
        for row in dataset
        for index in range(samples)
    ]
    name = "greedy" if sampling.temperature == 0 else f"sampled at T={sampling.temperature:g}"
    arriving = tqdm(engine.stream(requests, sampling), desc=name, total=len(requests), unit="rollout", leave=False)
    found = dict(arriving)
    rollouts = [found[place] for place in range(len(requests))]
    return rollouts, [template.text(rollout.token_ids) for rollout in rollouts]


def with_texts(rows: list[dict], texts: list[str]) -> list[dict]:
    """What was asked and what came, for people to read."""
    return [
        {**{name: row[name] for name in ("problem", "answer", "kind")}, "text": text}
        for row, text in zip(rows, texts, strict=True)
    ]
