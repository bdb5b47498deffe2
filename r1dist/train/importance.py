"""Weights of tokens that another policy has drawn: a server that rounds otherwise, or holds older weights."""

import math

import torch


def importance_ratio(
    policy: torch.Tensor,
    sampling: torch.Tensor,
    mask: torch.Tensor,
    mode: str,
    least: float | None,
    most: float | None,
) -> torch.Tensor:
    """policy / sampling of each token [B, T], or of each sequence [B, 1] with a `sequence_` mode.

    Args:
        policy, sampling: Logprobs [B, T] of the tokens, now and where they were drawn. NaN in `sampling` (unknown)
            counts as equal.
        mask: [B, T], 1 where a token counts.
        mode: As TRL's `vllm_importance_sampling_mode`: `*_truncate` holds the ratio within [least, most]; `*_mask`
            makes it 0 outside.
        least, most: None: no bound.

    Truncated importance sampling is that of Espeholt et al. 2018 (IMPALA, arXiv 1802.01561, section 4.1), by token.
    """
    difference = torch.nan_to_num((policy - sampling) * mask, nan=0.0)
    if mode.startswith("sequence"):
        difference = difference.sum(-1, keepdim=True)
    ratio = difference.exp()
    least, most = -math.inf if least is None else least, math.inf if most is None else most
    if mode.endswith("truncate"):
        return ratio.clamp(least, most)
    return ratio.masked_fill((ratio < least) | (ratio > most), 0.0)
