"""Advantages against the formula written down a second time, in double precision, group by group."""

import math
import random
import statistics

import pytest
import torch

from r1dist.rl.advantages import group_advantages, zero_variance_groups

GROUP, GROUPS, REWARDS = 4, 5, 3
NAN = math.nan


def drawn(seed: int) -> tuple[list[list[float]], list[float]]:
    """Rewards of three functions, some of which score nothing; one rollout that none scores, one group all equal."""
    chance = random.Random(seed)
    rows = [[chance.choice([0.0, 0.5, 1.0, NAN]) for _ in range(REWARDS)] for _ in range(GROUP * GROUPS)]
    rows[5] = [NAN] * REWARDS
    rows[8:12] = [[0.1, NAN, 0.1]] * GROUP
    return rows, [1.0, -0.5, 2.0]


def mean(values):
    known = [v for v in values if not math.isnan(v)]
    return statistics.fmean(known) if known else NAN


def std(values):
    known = [v for v in values if not math.isnan(v)]
    return statistics.stdev(known) if len(known) > 1 else NAN


def total(row, weights):
    known = [r * w for r, w in zip(row, weights, strict=True) if not math.isnan(r)]
    return sum(known) if known else NAN


def reference(rows, weights, scale, aggregation):
    totals = [total(row, weights) for row in rows]
    found = []
    if aggregation == "normalize_then_sum":
        normalized = []
        for start in range(0, len(rows), GROUP):
            group = rows[start : start + GROUP]
            columns = list(zip(*group, strict=True))
            normalized += [
                [(r - mean(c)) / (std(c) + 1e-4) for r, c in zip(row, columns, strict=True)] for row in group
            ]
        sums = [total(row, weights) for row in normalized]
        # A rollout that some reward scored, but whose groups give no deviation, counts as 0.
        sums = [0.0 if math.isnan(s) and not math.isnan(t) else s for s, t in zip(sums, totals, strict=True)]
        found = [(s - mean(sums)) / (std(sums) + 1e-4) for s in sums]
    else:
        for i, t in enumerate(totals):
            group = totals[i - i % GROUP : i - i % GROUP + GROUP]
            spread = std(totals) if scale == "batch" else std(group)
            found.append((t - mean(group)) / (1 if scale == "none" else spread + 1e-4))
    return [0.0 if math.isnan(a) else a for a in found], totals


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("seed", range(5))
def test_the_formula(seed, scale, aggregation):
    rows, weights = drawn(seed)
    found = group_advantages(torch.tensor(rows), torch.tensor(weights), GROUP, scale, aggregation)
    advantages, totals = reference(rows, weights, scale, aggregation)
    torch.testing.assert_close(found.totals, torch.tensor(totals), equal_nan=True)
    assert found.advantages[8:12].tolist() == [0.0] * GROUP
    advantages[8:12] = [0.0] * GROUP
    torch.testing.assert_close(found.advantages, torch.tensor(advantages), rtol=1e-4, atol=1e-4)
    assert found.advantages[5] == 0.0


@pytest.mark.parametrize("value", [0.1, 0.7, 1 / 3, 2.2])
@pytest.mark.parametrize("group", [3, 8, 16])
def test_equal_rewards_have_no_advantage_at_all(value, group):
    """The mean of equal float32 numbers is often another number."""
    rewards = torch.full((2 * group, 1), value)
    rewards[-1] += 0.5
    found = group_advantages(rewards, torch.ones(1), group, "group", "sum_then_normalize")
    assert zero_variance_groups(found.advantages, group) == [0]
    assert found.zero_std == 0.5
