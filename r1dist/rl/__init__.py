"""GRPO: rollouts, advantages, the loss, the reference model, and the trainer."""

from ..run import trl_without_vllm  # noqa: F401
