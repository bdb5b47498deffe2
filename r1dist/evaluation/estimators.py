"""Estimates from several samples of each problem, and their confidence intervals."""

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, variance


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The unbiased estimate of the chance that one of `k` samples is right, from `right` of `samples`.

    1 - C(samples - right, k) / C(samples, k); Chen et al. 2021 (arXiv 2107.03374), equation 1. `k` is at most
    `samples`.
    """
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def wilson_interval(share: float, trials: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a proportion seen in `trials` trials (Wilson 1927, equation 6)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, middle - half), min(1.0, middle + half)


def clustered_interval(per_problem: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Interval for the mean of per-problem pass rates, each in [0, 1].

    Samples of one problem are not independent, so the trials are counted as the number of independent ones
    that would have the variance seen between problems. With one sample a problem this is Wilson's interval.
    """
    share, problems = fmean(per_problem), len(per_problem)
    spread = variance(per_problem) if problems > 1 else 0.0
    effective = problems if spread == 0 else share * (1 - share) * problems / spread
    return wilson_interval(share, effective, confidence)
