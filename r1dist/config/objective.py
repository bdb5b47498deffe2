"""GRPO's objective as values of TRL's fields, by name. A field that the YAML sets itself wins over these."""

# DeepSeekMath (arXiv 2402.03300), equations 3 and 4, with the KL weight of DeepSeek-R1 (arXiv 2501.12948):
# mean over each completion's tokens, then over completions; rewards scaled by their group's deviation;
# the k3 estimate of the KL divergence to the reference, without an importance weight on it.
# The clip range stays TRL's 0.2: it has no effect while each rollout is trained on once, at once.
PAPER = {"loss_type": "grpo", "beta": 0.001, "use_bias_correction_kl": False, "scale_rewards": "group"}

OBJECTIVES = {"paper": PAPER, "trl": {}}

LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo")
"""The losses of `r1dist.rl.loss`."""
