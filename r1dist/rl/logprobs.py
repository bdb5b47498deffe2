"""Log-probabilities of completions' tokens: one forward, padded or packed, and a whole batch in several."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from .batch import MicroBatch, MicroBatching, RolloutBatch, collate

IGNORED = -100


class Forward(NamedTuple):
    """Of the completions of a micro-batch, [B, T] each; 0 where there is padding."""

    logprobs: torch.Tensor
    entropy: torch.Tensor | None
    """None of the reference model, whose head does not compute it."""
    router_loss: torch.Tensor | None
    """The load-balancing loss of a mixture of experts, where it is asked for."""


def forward(model: nn.Module, batch: MicroBatch, packed: bool, router_loss: bool = False) -> Forward:
    """One forward through a model with TRL's fused head, which divides logits by the sampling temperature.

    `packed`: rollouts follow one another in a single row without padding. Positions start anew with each rollout;
    that is how transformers' flash attention keeps them apart (sdpa and eager build a mask of blocks, whose cost grows
    with the square of the row).
    """
    keep, options = batch.mask.size(1), {"output_router_logits": True} if router_loss else {}
    real = batch.attention_mask.bool()
    labels = batch.input_ids.masked_fill(~real, IGNORED)
    labels[:, :-keep] = IGNORED
    if packed:
        positions = batch.attention_mask.cumsum(1) - 1
        labels[positions == 0] = IGNORED  # it follows another rollout's last token
        output = model(
            input_ids=batch.input_ids[real][None], position_ids=positions[real][None], labels=labels[real][None],
            fused_lm_head=True, **options,
        )  # fmt: skip
    else:
        output = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            labels=labels,
            fused_lm_head=True,
            **options,
        )

    def completions(values: torch.Tensor | None) -> torch.Tensor | None:
        if values is not None and packed:
            places = real.flatten().nonzero()[1:, 0]  # values [1, N - 1] belong to the token after each
            values = values.new_zeros(real.numel()).index_put((places,), values[0]).view_as(real)
        return None if values is None else values[:, -keep:]

    return Forward(completions(output.log_probs), completions(output.entropy), output.aux_loss)


@torch.no_grad()
def batch_logprobs(
    model: nn.Module, batch: RolloutBatch, rollouts_at_once: int, how: MicroBatching, device: torch.device,
    heartbeat: Callable[[], None],
) -> list[torch.Tensor]:  # fmt: skip
    """The logprobs [T_i] of each rollout's completion, on the CPU, from forwards over rollouts of similar length.

    All ranks make as many forwards (ZeRO-3 gathers weights in each). A collective.
    """
    forwards = -(-len(batch) // rollouts_at_once)
    if how.token_budget is not None:
        forwards = max(forwards, *how.gather([how.forwards_needed(batch.lengths)]))
    found: dict[int, torch.Tensor] = {}
    for places in how.partition(batch.lengths, forwards):
        chosen = batch.select(places)
        logprobs = forward(model, collate(chosen, how.pad_id).to(device), how.packed).logprobs.float().cpu()
        heartbeat()
        for place, row, ids in zip(places, logprobs, chosen.completion_ids, strict=True):
            found[place] = row[: len(ids)].clone()
    return [found[place] for place in range(len(batch))]
