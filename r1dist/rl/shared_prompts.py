"""Rollouts of one prompt in a single row that holds the prompt once, exact in logprobs and gradients.

The row is a prompt without its last token, then the prompt's completions one after another, then the next prompt. A
completion of T tokens has T places: the prompt's last token and all tokens of the completion but the last, so each
place predicts one token of the completion. Within the row only attention knows of sequences: a prompt attends to
itself, a completion to its prompt and itself (`shared_attention`). No other layer pads.
"""

import itertools
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from .shared_attention import Blocks, Sequence, Varlen, blocks, varlen

IGNORED = -100
"""A label of which no logprob is computed."""
MODELS = ("llama", "mistral", "qwen2", "qwen3")
"""Whose layers, but for attention, treat each token alone."""


class SharedPrompts(NamedTuple):
    """The row's T tokens, and how its N tokens of completions are the entries of [B, longest] that are no padding."""

    input_ids: torch.Tensor
    """[1, T]"""
    positions: torch.Tensor
    """[1, T]"""
    labels: torch.Tensor
    """[1, T], the token that each place predicts, `IGNORED` where none counts."""
    attention: Blocks | Varlen
    places: torch.Tensor
    """[N], of completions in the row."""
    entries: torch.Tensor
    """[N], of [B, longest], flattened."""


def can_share(config: PretrainedConfig) -> bool:
    """Whether a model's layers are ones that this module knows, all with full attention."""
    full = all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or ())
    windowed = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return config.model_type in MODELS and full and not windowed


def share_prompts(
    prompts: list[torch.Tensor], completions: list[torch.Tensor], counts: list[bool], device_type: str = "cpu",
    by_varlen: bool = False,
) -> SharedPrompts:  # fmt: skip
    """The row of B rollouts, of which those of one prompt follow one another.

    Args:
        prompts: [P_i], P_i >= 1, of each rollout.
        completions: [T_i], T_i >= 1.
        counts: Whether the rollout's tokens are scored.
        device_type: Of the device that computes it.
        by_varlen: By a varlen kernel, instead of sdpa.
    """
    longest = max(map(len, completions))
    ids, positions, labels, places, entries, used = [], [], [], [], [], 0
    sequences: list[Sequence] = []
    for _, group in itertools.groupby(range(len(prompts)), lambda i: prompts[i].tolist()):
        members = list(group)
        prompt = prompts[members[0]]
        length = len(prompt) - 1
        shared = used + torch.arange(length)
        ids.append(prompt[:-1])
        positions.append(torch.arange(length))
        labels.append(torch.full((length,), IGNORED))
        used += length
        for i in members:
            own = torch.arange(len(completions[i]))
            ids += [prompt[-1:], completions[i][:-1]]
            positions.append(length + own)
            labels.append(completions[i] if counts[i] else torch.full_like(own, IGNORED))
            places.append(used + own)
            entries.append(i * longest + own)
            used += len(own)
        wholes = [torch.cat([shared, own]) for own in places[-len(members) :]]
        if len(members) == 1:
            sequences.append(Sequence(wholes[0], wholes[0]))
        else:
            sequences += [Sequence(shared, shared)] * (length > 0)
            sequences += [Sequence(whole[length:], whole) for whole in wholes]
    attention = varlen(sequences) if by_varlen else blocks(sequences, used, device_type)
    return SharedPrompts(
        torch.cat(ids)[None], torch.cat(positions)[None], torch.cat(labels)[None], attention, torch.cat(places),
        torch.cat(entries),
    )  # fmt: skip
