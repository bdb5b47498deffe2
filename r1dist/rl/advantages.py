"""Advantages: each reward relative to the other completions of the same prompt."""

from dataclasses import dataclass

import torch
from trl.trainer.utils import nanstd

EPSILON = 1e-4  # added to a standard deviation before dividing, as in TRL


@dataclass(frozen=True)
class Advantages:
    """Of N rollouts."""

    advantages: torch.Tensor
    """[N]; 0 where no reward scored the rollout, and in groups whose rewards are all equal."""
    totals: torch.Tensor
    """[N], the weighted sums of the rewards; NaN where no reward scored the rollout."""
    zero_std: float
    """Share of rollouts in groups whose rewards are all equal."""


def group_advantages(
    rewards: torch.Tensor, weights: torch.Tensor, group: int, scale: str, aggregation: str
) -> Advantages:
    """(r - mean) / std over each group (DeepSeekMath, arXiv 2402.03300, section 4.1.2), as TRL computes it.

    Args:
        rewards: [N, R], NaN where a reward does not apply; a group's rollouts follow one another.
        weights: [R].
        group: Rollouts of each group (`num_generations`).
        scale: TRL's `scale_rewards`: the standard deviation is that of the `group`, of the `batch`, or `none` divides.
        aggregation: TRL's `multi_objective_aggregation`: `sum_then_normalize`, or `normalize_then_sum` (GDPO, arXiv
            2601.05242), which normalizes each reward within its group, then the sums over the batch.
    """
    unscored = rewards.isnan().all(1)
    totals = (rewards * weights).nansum(1).masked_fill(unscored, torch.nan)
    if aggregation == "normalize_then_sum":
        grouped = rewards.view(-1, group, rewards.size(1))
        normalized = (grouped - grouped.nanmean(1, keepdim=True)) / (nanstd(grouped, 1, keepdim=True) + EPSILON)
        sums = (normalized.view_as(rewards) * weights).nansum(1).masked_fill(unscored, torch.nan)
        std = nanstd(sums).expand_as(sums)
        advantages = (sums - sums.nanmean()) / (std + EPSILON)
        equal = _equal_in_group(rewards, group).all(1)
    else:
        by_group = totals.view(-1, group)
        std = nanstd(totals).expand_as(totals) if scale == "batch" else nanstd(by_group, 1).repeat_interleave(group)
        advantages = totals - by_group.nanmean(1).repeat_interleave(group)
        advantages = advantages if scale == "none" else advantages / (std + EPSILON)
        equal = _equal_in_group(totals[:, None], group)[:, 0]
    # The mean of equal float32 numbers is often not that number: without this such a group would train on rounding.
    advantages = advantages.nan_to_num(nan=0.0).masked_fill(equal, 0.0)
    return Advantages(advantages, totals, equal.float().mean().item())


def zero_variance_groups(advantages: torch.Tensor, group: int) -> list[int]:
    """The groups of `group` rollouts each, of advantages [N], that give no gradient: all their advantages are 0."""
    return (advantages.view(-1, group) == 0).all(1).nonzero()[:, 0].tolist()


def _equal_in_group(values: torch.Tensor, group: int) -> torch.Tensor:
    """[N, R]: whether all values of a row's group are equal, NaNs left out."""
    grouped = values.view(-1, group, values.size(1))
    highest = grouped.nan_to_num(nan=-torch.inf).amax(1)
    lowest = grouped.nan_to_num(nan=torch.inf).amin(1)
    return (highest <= lowest).repeat_interleave(group, dim=0)
