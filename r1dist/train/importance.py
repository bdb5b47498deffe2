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
    difference = _log_ratio(policy, sampling, mask)
    if mode.startswith("sequence"):
        difference = difference.sum(-1, keepdim=True)
    ratio = difference.exp()
    least, most = -math.inf if least is None else least, math.inf if most is None else most
    if mode.endswith("truncate"):
        return ratio.clamp(least, most)
    return ratio.masked_fill((ratio < least) | (ratio > most), 0.0)


CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
"""`loss_type`s whose objective clips the ratio. The others bound it in ways of their own."""


def within_clip(
    policy: torch.Tensor,
    sampling: torch.Tensor,
    mask: torch.Tensor,
    advantages: torch.Tensor,
    low: float,
    high: float,
    level: str,
) -> torch.Tensor:
    """Where min(r A, clip(r, 1 - low, 1 + high) A) has a gradient, r = policy / sampling: bool, [B, T].

    Args:
        policy, sampling, mask: As for `importance_ratio`.
        advantages: A, [B] or [B, T].
        level: As TRL's `importance_sampling_level`. `sequence`: r is a sequence's geometric mean (GSPO, arXiv
            2507.18071, equation 7), and the answer [B, 1], or [B, T] with such advantages.

    The objective is equation 1 of DeepSeek-R1 (arXiv 2501.12948), whose old policy is the one that drew the tokens.
    """
    difference = _log_ratio(policy, sampling, mask)
    if level == "sequence":
        difference = difference.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    ratio = difference.exp()
    advantages = advantages if advantages.ndim == 2 else advantages[:, None]
    return ~(((advantages > 0) & (ratio > 1 + high)) | ((advantages < 0) & (ratio < 1 - low)))


def _log_ratio(policy: torch.Tensor, sampling: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num((policy - sampling) * mask, nan=0.0)
