"""The GRPO objective."""

import dataclasses
import math
from dataclasses import dataclass

import torch
import trl

from ..run.metrics import Metrics

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo")
"""The `loss_type`s that clip the probability ratio. `cispo` bounds it as a weight instead."""


@dataclass(frozen=True)
class LossConfig:
    """What the loss depends on; names as in TRL's `GRPOConfig`."""

    loss_type: str = "grpo"
    importance_sampling_level: str = "token"
    """`token`, or `sequence` (GSPO, arXiv 2507.18071)."""
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    """Upper bound of the ratio where the advantage is negative (two-sided clip, arXiv 2505.07291). None: no bound."""
    beta: float = 0.0
    """Weight of the KL divergence from the reference model."""
    use_bias_correction_kl: bool = False
    max_completion_length: int = 256
    vllm_importance_sampling_correction: bool = False
    """Weight each token by its probability under the policy, relative to the sampler that drew it."""
    vllm_importance_sampling_mode: str = "token_truncate"
    vllm_importance_sampling_clip_min: float | None = None
    vllm_importance_sampling_clip_max: float | None = None
    mask_outside_clip: bool = False
    """Give no gradient to tokens where the policy has left the clip range since they were drawn (stale rollouts)."""

    @classmethod
    def of(cls, arguments: trl.GRPOConfig, corrected: bool, stale: bool) -> "LossConfig":
        """TRL's fields. `corrected`: whether the sampler's logprobs differ from the policy's at all."""
        fields = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(cls) if hasattr(arguments, f.name)}
        fields["epsilon_high"] = arguments.epsilon if arguments.epsilon_high is None else arguments.epsilon_high
        corrected = corrected and arguments.vllm_importance_sampling_correction
        fields["vllm_importance_sampling_correction"] = corrected
        # The ratio is 1 when the policy receives a generation: the clip does not see how far the policy moved since
        # it was drawn. Without this bound successive steps overshoot: an R1-Zero run lost its format.
        return cls(**fields, mask_outside_clip=corrected and stale and arguments.loss_type in CLIPPED)


def grpo_loss(
    logprobs: torch.Tensor,
    old: torch.Tensor | None,
    reference: torch.Tensor | None,
    sampler: torch.Tensor | None,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    config: LossConfig,
    normalizer: float | torch.Tensor,
) -> tuple[torch.Tensor, Metrics]:
    """The loss of a micro-batch of B rollouts of up to T tokens, and its metrics.

    With r = exp(logprobs - old), A the advantage, and all sums over the tokens of `mask`:

        L = -1/N sum_i w_i sum_t [ s_it min(r_it A_i, clip(r_it, 1 - epsilon, 1 + epsilon_high) A_i) - beta k_it ]
        k = exp(reference - logprobs) - (reference - logprobs) - 1

    GRPO (DeepSeek-R1, arXiv 2501.12948, eq. 1-2; DeepSeekMath, arXiv 2402.03300, eq. 3-4): w_i = 1/T_i, N = rollouts.
    Dr. GRPO (arXiv 2503.20783): w_i = 1, N = rollouts x max_completion_length. DAPO (arXiv 2503.14476, eq. 8) and BNPO
    (arXiv 2506.02864): w_i = 1, N = tokens. CISPO (arXiv 2506.13585, eq. 4-5): as DAPO, with
    min(r, epsilon_high) A logprobs in place of the clipped term, no gradient through r. GSPO: r_i is the geometric
    mean of a sequence's r_it. `s` is the sampler correction (see `sampler_weight`), 1 without it.

    Args:
        logprobs: [B, T], of the policy, with gradient.
        old: [B, T], of the policy that the ratio is taken against. None: the policy itself, before its update.
        reference: [B, T], of the reference model; needed where `config.beta` is not 0.
        sampler: [B, T], under which each token was drawn (NaN: unknown); needed for the sampler correction.
        advantages: [B].
        mask: [B, T], 1 where a token counts.
        normalizer: N of the whole optimizer step on one rank, from `loss_normalizer`: micro-batches' losses add up.
    """
    metrics = Metrics()
    old = logprobs.detach() if old is None else old
    advantages = advantages[:, None]
    log_ratio = logprobs - old
    if config.importance_sampling_level == "sequence":
        log_ratio = ((log_ratio * mask).sum(1) / mask.sum(1).clamp(min=1))[:, None]
    ratio = log_ratio.exp()

    kl = None
    if config.beta:
        kl = (reference - logprobs).exp() - (reference - logprobs) - 1
        kl = kl * ratio if config.use_bias_correction_kl else kl
        metrics.add_mean("kl", kl, mask)

    low, high = 1 - config.epsilon, 1 + config.epsilon_high
    if config.loss_type == "cispo":
        loss = -ratio.clamp(max=config.epsilon_high).detach() * advantages * logprobs
        metrics.add_mean("cispo_clip_ratio", ((ratio > config.epsilon_high) & (advantages > 0)).float(), mask)
    else:
        ratio = ratio if config.delta is None else ratio.clamp(max=config.delta)
        loss = -torch.min(ratio * advantages, ratio.clamp(low, high) * advantages)
        _add_clip_metrics(metrics, (ratio < low) & (advantages < 0), (ratio > high) & (advantages > 0), mask)
    if config.vllm_importance_sampling_correction:
        loss = loss * sampler_weight(old.detach(), sampler, advantages, mask, config, metrics)
    if kl is not None:
        loss = loss + config.beta * kl

    per_rollout = (loss * mask).sum(1)
    if config.loss_type == "grpo":
        per_rollout = per_rollout / mask.sum(1).clamp(min=1)
    return per_rollout.sum() / normalizer, metrics


def loss_normalizer(config: LossConfig, rollouts: float, tokens: float) -> float:
    """N of `grpo_loss`, for an optimizer step of so many `rollouts` and `tokens` that count, on one rank."""
    if config.loss_type == "grpo":
        return rollouts
    if config.loss_type == "dr_grpo":
        return rollouts * config.max_completion_length
    return max(tokens, 1.0)


def sampler_weight(
    policy: torch.Tensor,
    sampler: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    config: LossConfig,
    metrics: Metrics,
) -> torch.Tensor:
    """The weight of each token [B, T], or sequence [B, 1], for having been drawn by another distribution.

    policy / sampler, as TRL's `vllm_importance_sampling_mode` bounds it; 0 outside the clip range with
    `config.mask_outside_clip`. Logs both under `sampling/`.
    """
    weight = importance_ratio(policy, sampler, mask, config)
    known = mask.bool() & ~sampler.isnan()
    distance = (policy - sampler).abs()[known]
    weights = weight.flatten() if weight.size(1) == 1 else weight[mask.bool()]
    for name, values in (("sampling_logp_difference", distance), ("importance_sampling_ratio", weights)):
        metrics.means[f"sampling/{name}/mean"] = (values.sum(), values.new_tensor(values.numel()))
        if values.numel():
            metrics.minima[f"sampling/{name}/min"] = values.min()
            metrics.maxima[f"sampling/{name}/max"] = values.max()
    if config.mask_outside_clip:
        inside = within_clip(policy, sampler, advantages, mask, config)
        metrics.means["sampling/outside_clip/mean"] = ((~inside * mask).sum(), mask.sum())
        weight = weight * inside
    return weight


def importance_ratio(
    policy: torch.Tensor, sampler: torch.Tensor, mask: torch.Tensor, config: LossConfig
) -> torch.Tensor:
    """policy / sampler of each token [B, T], or of each sequence [B, 1] with a `sequence_` mode.

    `*_truncate` keeps the ratio within [clip_min, clip_max], `*_mask` makes it 0 outside; None is no bound. Truncated
    importance sampling is that of Espeholt et al. 2018 (IMPALA, arXiv 1802.01561, section 4.1), by token.
    """
    mode = config.vllm_importance_sampling_mode
    least, most = config.vllm_importance_sampling_clip_min, config.vllm_importance_sampling_clip_max
    least, most = -math.inf if least is None else least, math.inf if most is None else most
    log_ratio = _known_log_ratio(policy, sampler, mask)
    ratio = (log_ratio.sum(1, keepdim=True) if mode.startswith("sequence") else log_ratio).exp()
    if mode.endswith("truncate"):
        return ratio.clamp(least, most)
    return ratio.masked_fill((ratio < least) | (ratio > most), 0.0)


def within_clip(
    policy: torch.Tensor, sampler: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, config: LossConfig
) -> torch.Tensor:
    """Where the clipped term has a gradient with r = policy / sampler: bool [B, T], or [B, 1] by sequence.

    Advantages are [B, 1]. DeepSeek-R1's equation 1 clips against the policy that drew the tokens.
    """
    log_ratio = _known_log_ratio(policy, sampler, mask)
    if config.importance_sampling_level == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    ratio = log_ratio.exp()
    delta = math.inf if config.delta is None else config.delta
    low, high = 1 - config.epsilon, 1 + config.epsilon_high
    too_high = (advantages > 0) & (ratio > min(high, delta))
    too_low = (advantages < 0) & ((ratio < low) | (ratio > delta))
    return ~(too_high | too_low)


def _known_log_ratio(policy: torch.Tensor, sampler: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Where the sampler's logprob is unknown (NaN), the two count as equal."""
    return torch.nan_to_num((policy - sampler) * mask, nan=0.0)


def _add_clip_metrics(metrics: Metrics, low: torch.Tensor, high: torch.Tensor, mask: torch.Tensor) -> None:
    for name, clipped in (("low", low), ("high", high), ("region", low | high)):
        metrics.add_mean(f"clip_ratio/{name}_mean", clipped.float(), mask)

    def by_sequence(clipped: torch.Tensor) -> torch.Tensor:
        values = clipped.float()
        values = values[:, 0] if values.size(1) == 1 else (values * mask).sum(1) / mask.sum(1)
        return values[mask.sum(1) > 0]

    if (mask.sum(1) > 0).any():
        metrics.minima["clip_ratio/low_min"] = by_sequence(low).min()
        metrics.maxima["clip_ratio/high_max"] = by_sequence(high).max()
