"""Supervised fine-tuning."""

from ..run import trl_without_vllm  # noqa: F401
