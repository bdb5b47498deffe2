"""Reward models, pairwise and pointwise."""

from ..run import trl_without_vllm  # noqa: F401
