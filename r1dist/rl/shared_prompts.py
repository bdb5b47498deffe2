"""Rollouts of one prompt in a single row that holds the prompt once, exact in logprobs and gradients.

The row is a prompt without its last token, then the prompt's completions one after another, then the next prompt. A
completion of T tokens has T places: the prompt's last token and all tokens of the completion but the last, so each
place predicts one token of the completion. Within the row only attention knows of sequences: a prompt attends to
itself, a completion to its prompt and itself. Attention pads; no other layer does.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

ATTENTION = "r1dist_shared_prompts"
"""transformers' name of the attention: sdpa, which also takes rows with shared prompts."""
IGNORED = -100
"""A label of which no logprob is computed."""
MODELS = ("llama", "mistral", "qwen2", "qwen3")
"""Whose layers, but for attention, treat each token alone."""


class Slots(NamedTuple):
    """Where the row's T tokens are in attention, for G prompts of up to S shared tokens.

    Each has up to K completions of up to L tokens; padding names any place of the row.
    """

    prompts: torch.Tensor
    """[G, S], places in the row."""
    completions: torch.Tensor
    """[G, K, L], places in the row."""
    row: torch.Tensor
    """[T], places in the two above, flattened, one after the other."""


class SharedPrompts(NamedTuple):
    """The row's T tokens, and how its N tokens of completions are the entries of [B, longest] that are no padding."""

    input_ids: torch.Tensor
    """[1, T]"""
    positions: torch.Tensor
    """[1, T]"""
    labels: torch.Tensor
    """[1, T], the token that each place predicts, `IGNORED` where none counts."""
    mask: torch.Tensor
    """bool [G, 1, L, S + L], the places of its prompt and of itself that a completion's place attends to."""
    slots: Slots
    places: torch.Tensor
    """[N], places of completions in the row."""
    entries: torch.Tensor
    """[N], of [B, longest], flattened."""


def can_share(config: PretrainedConfig) -> bool:
    """Whether a model's layers are ones that this module knows, all with full attention."""
    full = all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or ())
    windowed = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return config.model_type in MODELS and full and not windowed


def share_prompts(
    prompts: Sequence[torch.Tensor], completions: Sequence[torch.Tensor], counts: Sequence[bool]
) -> SharedPrompts:
    """The row of B rollouts, of which those of one prompt follow one another.

    Args:
        prompts: [P_i], P_i >= 1, of each rollout.
        completions: [T_i], T_i >= 1.
        counts: Whether the rollout's tokens are scored.
    """
    groups = [list(group) for _, group in itertools.groupby(range(len(prompts)), lambda i: prompts[i].tolist())]
    shared, longest = [len(prompts[group[0]]) - 1 for group in groups], max(map(len, completions))
    of_prompts = torch.full((len(groups), max(shared)), -1)
    of_completions = torch.full((len(groups), max(map(len, groups)), longest), -1)
    ids, positions, labels, places, entries, used = [], [], [], [], [], 0
    for g, (group, length) in enumerate(zip(groups, shared, strict=True)):
        prompt, common = prompts[group[0]], torch.arange(length)
        ids.append(prompt[:-1])
        positions.append(common)
        labels.append(torch.full((length,), IGNORED))
        of_prompts[g, :length] = used + common
        used += length
        for k, i in enumerate(group):
            own = torch.arange(len(completions[i]))
            ids += [prompt[-1:], completions[i][:-1]]
            positions.append(length + own)
            labels.append(completions[i] if counts[i] else torch.full_like(own, IGNORED))
            of_completions[g, k, : len(own)] = used + own
            places.append(used + own)
            entries.append(i * longest + own)
            used += len(own)
    slots = torch.cat([of_prompts.flatten(), of_completions.flatten()])
    row = torch.empty(used, dtype=torch.long)
    row[slots[slots >= 0]] = (slots >= 0).nonzero()[:, 0]
    # Gradients of padding are 0; added to many tokens, they do not wait for one another.
    slots = torch.where(slots < 0, torch.arange(len(slots)) % used, slots)
    within_prompt = torch.arange(max(shared)) < torch.tensor(shared)[:, None, None]
    causal = torch.ones(longest, longest, dtype=torch.bool).tril()
    in_prompts, in_completions = slots.split([of_prompts.numel(), of_completions.numel()])
    mask = torch.cat([within_prompt.expand(-1, longest, -1), causal.expand(len(groups), -1, -1)], 2)
    return SharedPrompts(
        torch.cat(ids)[None], torch.cat(positions)[None], torch.cat(labels)[None], mask[:, None],
        Slots(in_prompts.view_as(of_prompts), in_completions.view_as(of_completions), row),
        torch.cat(places), torch.cat(entries),
    )  # fmt: skip


def attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, shared_prompts: Slots | None = None, **options,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """transformers' attention interface: [1, heads, T, width] each -> [1, T, heads, width].

    Without `shared_prompts` it is sdpa. A prompt's keys and values are repeated for its completions, as sdpa repeats
    those of a head for the queries that share it.
    """
    if shared_prompts is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    prompts, completions, row = shared_prompts
    rows = completions.size(1)
    tokens = [x[0].transpose(0, 1) for x in (query, key, value)]  # [T, heads, width]

    def of_prompts(x: torch.Tensor) -> torch.Tensor:
        """[G, S, heads, width]"""
        return x.index_select(0, prompts.flatten()).unflatten(0, prompts.shape)

    def of_completions(x: torch.Tensor) -> torch.Tensor:
        """[G, K, L, heads, width]"""
        return x.index_select(0, completions.flatten()).unflatten(0, completions.shape)

    def by_head(x: torch.Tensor) -> torch.Tensor:
        """[G, K, N, heads, width] -> [G, K x heads, N, width]: completions are heads, so a prompt has one mask."""
        return x.transpose(2, 3).flatten(1, 2)

    q, k, v = (of_prompts(x) for x in tokens)
    found = []
    if prompts.numel():
        found.append(sdpa_attention_forward(module, *(x.transpose(1, 2) for x in (q, k, v)), None, **options)[0])
    keys, values = (
        by_head(torch.cat([prompt[:, None].expand(-1, rows, -1, -1, -1), of_completions(x)], 2))
        for prompt, x in ((k, tokens[1]), (v, tokens[2]))
    )
    queries = by_head(of_completions(tokens[0]))
    output = sdpa_attention_forward(module, queries, keys, values, attention_mask, **options)[0]
    # [G, L, K x heads, width] -> [G, K, L, heads, width]
    found.append(output.unflatten(2, (rows, -1)).transpose(1, 2))
    flat = torch.cat([x.flatten(0, -3) for x in found])  # [G x S + G x K x L, heads, width]
    return flat.index_select(0, row)[None], None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
