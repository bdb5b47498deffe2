"""Log-probabilities of completions' tokens: one forward, padded, packed or with shared prompts, and a batch's."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from .batch import MicroBatch, MicroBatching, RolloutBatch
from .shared_prompts import IGNORED, SharedPrompts


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
    with the square of the row). A micro-batch with shared prompts is one row, too, in which
    `shared_attention` keeps sequences apart.
    """
    if batch.shared is not None:
        return _forward_shared(model, batch.mask, batch.shared)
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


def _forward_shared(model: nn.Module, mask: torch.Tensor, shared: SharedPrompts) -> Forward:
    mask_is_known = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=mask.device)  # the model need not build one
    output = model(
        input_ids=shared.input_ids, position_ids=shared.positions, shift_labels=shared.labels,
        attention_mask=mask_is_known, shared_prompts=shared.attention, fused_lm_head=True,
    )  # fmt: skip

    def completions(values: torch.Tensor | None) -> torch.Tensor | None:
        if values is None:
            return None
        return values.new_zeros(mask.numel()).index_put((shared.entries,), values[0, shared.places]).view_as(mask)

    return Forward(completions(output.log_probs), completions(output.entropy), None)


@torch.no_grad()
def batch_logprobs(
    model: nn.Module, batch: RolloutBatch, rollouts_at_once: int, how: MicroBatching, device: torch.device,
    heartbeat: Callable[[], None],
) -> list[torch.Tensor]:  # fmt: skip
    """The logprobs [T_i] of each rollout's completion, on the CPU, from forwards over rollouts of similar length.

    All ranks make as many forwards (ZeRO-3 gathers weights in each). A collective.
    """
    forwards = -(-len(batch) // rollouts_at_once)
    rows = how.rows(batch)
    if how.token_budget is not None:
        forwards = max(forwards, *how.gather([rows.groups_needed(how.token_budget)]))
    found: dict[int, torch.Tensor] = {}
    for places in rows.partition(forwards, how.token_budget):
        logprobs = forward(model, how.collate(batch, rows, places).to(device), how.packed).logprobs.float().cpu()
        heartbeat()
        for place, row in zip(places, logprobs, strict=True):
            found[place] = row[: len(batch.completion_ids[place])].clone()
    return [found[place] for place in range(len(batch))]
