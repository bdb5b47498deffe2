"""Micro-batches without needless padding: rollouts of like length together, each cut to its own longest.

The loss is a sum over rollouts whose normaliser does not depend on who shares a micro-batch, so within an optimizer
step rollouts may be grouped freely. TRL pads each micro-batch to the longest rollout of the whole generation.
"""

from collections.abc import Callable

import torch
import trl
from trl.trainer.utils import split_tensor_dict

Batch = dict[str, torch.Tensor]
PROMPT = ("prompt_ids", "prompt_mask")


def may_group(arguments: trl.GRPOConfig) -> bool:
    """Whether the loss is the same however an optimizer step's rollouts are grouped.

    `bnpo` is normalised by the tokens of the micro-batch, an entropy bonus by them too, and an entropy quantile is
    taken over them.
    """
    by_micro_batch = arguments.loss_type == "bnpo" or arguments.top_entropy_quantile < 1
    return not (by_micro_batch or arguments.entropy_coef or arguments.use_adaptive_entropy)


def by_length(micro_batches: list[Batch], accumulated: int) -> list[Batch]:
    """The same rollouts, sorted by their completions' lengths within each `accumulated` micro-batches, and trimmed.

    Args:
        micro_batches: As TRL buffers them: [B, ...] tensors, prompts padded on the left, completions on the right.
        accumulated: How many of them make an optimizer step. Rollouts stay in their step.
    """
    regrouped = []
    for start in range(0, len(micro_batches), accumulated):
        step = micro_batches[start : start + accumulated]
        joined = {
            name: torch.cat([batch[name] for batch in step]) if value.ndim else value
            for name, value in step[0].items()
        }
        order = joined["completion_mask"].sum(1).argsort(stable=True)
        ordered = {name: value[order] if value.ndim else value for name, value in joined.items()}
        regrouped += map(trimmed, split_tensor_dict(ordered, len(step)))
    return regrouped


def trimmed(batch: Batch) -> Batch:
    """`batch` without the columns that are padding in each of its rows."""
    prompt, width = _longest(batch["prompt_mask"]), batch["completion_ids"].size(1)
    completion = _longest(batch["completion_mask"])

    def cut(name: str, value: torch.Tensor) -> torch.Tensor:
        if name in PROMPT:
            return value[:, -prompt:]
        per_token = value.ndim == 2 and value.size(1) == width
        return value[:, :completion] if per_token else value

    return {name: cut(name, value) for name, value in batch.items()}


def logprobs_by_length(
    score: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    keep: int,
    rows: int,
) -> torch.Tensor:
    """The logprobs [B, keep] of the last `keep` columns, asked for `rows` rollouts of like length at a time.

    Args:
        score: (ids [b, t], mask [b, t], k) -> logprobs [b, k] of the last k columns.
        input_ids, attention_mask: [B, T], prompts padded on the left, completions on the right.

    Where a completion is padding, the result is 0. Every rank calls `score` ceil(B / rows) times.
    """
    split = input_ids.size(1) - keep
    order = attention_mask[:, split:].sum(1).argsort(stable=True)
    logprobs = torch.zeros(input_ids.size(0), keep, device=input_ids.device)
    for chosen in order.split(rows):
        mask = attention_mask[chosen]
        first, last = split - _longest(mask[:, :split]), split + _longest(mask[:, split:])
        logprobs[chosen, : last - split] = score(
            input_ids[chosen, first:last], mask[:, first:last], last - split
        ).float()
    return logprobs


def _longest(mask: torch.Tensor) -> int:
    """The most tokens of a row; 1 where there are none, since a tensor must not be empty."""
    return max(1, int(mask.sum(1).max()))
