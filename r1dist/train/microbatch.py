"""Micro-batches without needless padding: rollouts of like length together, the work divided evenly over the ranks.

The loss is a sum over rollouts whose normaliser does not depend on who shares a micro-batch, so within an optimizer
step rollouts may be grouped freely, also across ranks. TRL pads each micro-batch to the longest rollout of the whole
generation, and leaves on each rank what it generated.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import trl
from trl.trainer.utils import pad

Batch = dict[str, torch.Tensor]
PROMPT = ("prompt_ids", "prompt_mask")
ROW_MEANS = ("grpo", "sapo", "dr_grpo", "luspo")
"""`loss_type`s that TRL divides by the rows of the micro-batch; the others by the tokens of the step."""


@dataclass(frozen=True)
class Grouping:
    """How an optimizer step's rollouts become micro-batches."""

    pad_id: int
    token_budget: int | None = None
    """Most tokens of a forward. One rollout that is longer is alone in its own. None: no bound."""
    packed: bool = False
    """Forwards carry no padding, so its columns cost nothing."""
    rank: int = 0
    ranks: int = 1
    gather: Callable[[list], list] = list
    """All ranks' lists, one after another. A collective."""


def may_group(arguments: trl.GRPOConfig) -> bool:
    """Whether the loss is the same however an optimizer step's rollouts are grouped.

    `bnpo` is normalised by the tokens of the micro-batch, an entropy bonus by them too, and an entropy quantile is
    taken over them.
    """
    by_micro_batch = arguments.loss_type == "bnpo" or arguments.top_entropy_quantile < 1
    return not (by_micro_batch or arguments.entropy_coef or arguments.use_adaptive_entropy)


def regrouped(micro_batches: list[Batch], accumulated: int, grouping: Grouping) -> list[list[Batch]]:
    """For each of `micro_batches`, the micro-batches to train on in its place, one after another.

    Args:
        micro_batches: As TRL buffers them: [B, ...] tensors, prompts padded on the left, completions on the right.
        accumulated: How many of them make an optimizer step. Rollouts stay in their step.

    Over all ranks, each rollout of a step is in exactly one micro-batch, and each rank has as many of these.
    """
    found: list[list[Batch]] = []
    for start in range(0, len(micro_batches), accumulated):
        step = micro_batches[start : start + accumulated]
        rows = [row for batch in step for row in rows_of(batch)]
        rows = grouping.gather(rows) if grouping.ranks > 1 else rows
        lengths = [len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows]
        least = len(step) * grouping.ranks
        needed = math.ceil(forwards_needed(lengths, grouping) / grouping.ranks) * grouping.ranks
        bins = max(least, needed)
        mine = partition(lengths, bins, grouping.packed, grouping.token_budget)[grouping.rank :: grouping.ranks]
        whole = {name: value for name, value in step[0].items() if not value.ndim}
        device = step[0]["completion_ids"].device
        batches = [{**joined([rows[i] for i in chosen], grouping.pad_id, device), **whole} for chosen in mine]
        shares = [round(i * len(batches) / len(step)) for i in range(len(step) + 1)]
        found += [batches[a:b] for a, b in itertools.pairwise(shares)]
    return found


def forwards_needed(lengths: list[int], grouping: Grouping) -> int:
    """How many micro-batches keep within the token budget, a rollout that is longer alone in one."""
    if grouping.token_budget is None:
        return 1
    return len(_filled(lengths, grouping.token_budget, grouping.packed))


def partition(lengths: list[int], bins: int, packed: bool, budget: int | None = None) -> list[list[int]]:
    """The rows in `bins` groups of like length, the longest first; the costliest is as cheap as it can be.

    Args:
        lengths: Tokens of each row; there are at least `bins` rows.
        packed: A group costs the sum of its lengths; otherwise as many columns for each row as the longest has.
        budget: Rows that are longer are alone. There are enough `bins` for the others to keep within it.

    Raises `ValueError` if there are fewer rows than `bins`.
    """
    if len(lengths) < bins:
        raise ValueError(f"{len(lengths)} rows do not fill {bins} micro-batches")
    if budget is not None and max(lengths) > budget:
        alone = sorted((i for i, length in enumerate(lengths) if length > budget), key=lambda i: (-lengths[i], i))
        others = [i for i, length in enumerate(lengths) if length <= budget]
        groups = partition([lengths[i] for i in others], bins - len(alone), packed) if others else []
        return [*([i] for i in alone), *([others[i] for i in group] for group in groups)]
    low, high = max(lengths), max(lengths) * len(lengths)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_filled(lengths, middle, packed)) <= bins else (middle + 1, high)
    groups = _filled(lengths, low, packed)
    while len(groups) < bins:
        widest = max(range(len(groups)), key=lambda i: (len(groups[i]) > 1, _cost(groups[i], lengths, packed)))
        half = (len(groups[widest]) + 1) // 2
        groups[widest : widest + 1] = [groups[widest][:half], groups[widest][half:]]
    return groups


def _filled(lengths: list[int], bound: int, packed: bool) -> list[list[int]]:
    """Rows from the longest to the shortest in as few groups as cost at most `bound` each."""
    groups: list[list[int]] = []
    cost = bound + 1
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        cost += lengths[row] if packed or not groups else lengths[groups[-1][0]]
        if cost > bound:
            groups.append([])
            cost = lengths[row]
        groups[-1].append(row)
    return groups


def _cost(group: list[int], lengths: list[int], packed: bool) -> int:
    return sum(lengths[i] for i in group) if packed else len(group) * lengths[group[0]]


def rows_of(batch: Batch) -> list[Batch]:
    """Each rollout of `batch` without padding, on the CPU; what is not per row is left out."""
    width = batch["completion_ids"].size(1)
    batch = {name: value.cpu() for name, value in batch.items() if value.ndim}
    prompts, completions = batch["prompt_mask"].sum(1).tolist(), batch["completion_mask"].sum(1).tolist()

    def cut(name: str, row: torch.Tensor, prompt: int, completion: int) -> torch.Tensor:
        if name in PROMPT:
            return row[len(row) - prompt :]
        return row[: max(1, completion)] if row.ndim and len(row) == width else row  # a tensor must not be empty

    return [
        {name: cut(name, value[i], prompts[i], completions[i]).clone() for name, value in batch.items()}
        for i in range(len(prompts))
    ]


def joined(rows: list[Batch], pad_id: int, device: torch.device | None = None) -> Batch:
    """`rows_of` back in one batch on `device`, as wide as its longest prompt and its longest completion."""

    def column(name: str) -> torch.Tensor:
        values = [row[name] for row in rows]
        if not values[0].ndim:
            return torch.stack(values)
        side = "left" if name in PROMPT else "right"
        return pad(values, padding_value=pad_id if name.endswith("_ids") else 0, padding_side=side)

    return {name: column(name).to(device) for name in rows[0]}


def logprobs_by_length(
    score: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    keep: int,
    chunks: int,
    grouping: Grouping,
) -> torch.Tensor:
    """The logprobs [B, keep] of the last `keep` columns, asked for in `chunks` groups of rollouts of like length.

    Args:
        score: (ids [b, t], mask [b, t], k) -> logprobs [b, k] of the last k columns.
        input_ids, attention_mask: [B, T], prompts padded on the left, completions on the right.

    Where a completion is padding, the result is 0. Every rank calls `score` `chunks` times.
    """
    split = input_ids.size(1) - keep
    logprobs = torch.zeros(input_ids.size(0), keep, device=input_ids.device)
    for chosen in partition(attention_mask.sum(1).tolist(), chunks, grouping.packed, grouping.token_budget):
        mask = attention_mask[chosen]
        first, last = split - _longest(mask[:, :split]), split + _longest(mask[:, split:])
        logprobs[chosen, : last - split] = score(
            input_ids[chosen, first:last], mask[:, first:last], last - split
        ).float()
    return logprobs


def _longest(mask: torch.Tensor) -> int:
    """The most tokens of a row; 1 where there are none, since a tensor must not be empty."""
    return max(1, int(mask.sum(1).max()))
