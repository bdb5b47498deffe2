"""Does the completion think inside its tags and answer inside its tags, and nothing else?"""

import re

# \A and \Z rather than ^ and $: nothing may stand before <think> or after </answer>, not even on another line.
STRUCTURE = re.compile(r"\A\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*\Z", re.DOTALL)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def has_format(completion: str) -> bool:
    """True for `<think>...</think><answer>...</answer>` with each tag exactly once and neither part empty."""
    found = STRUCTURE.match(completion)
    return (
        found is not None
        and all(completion.count(tag) == 1 for tag in TAGS)
        and all(part.strip() for part in found.groups())
    )


def format_reward(completion: str, row: dict) -> float:
    """1 if `has_format`, else 0.

    Range {0, 1}. Source: DeepSeek-R1 (arXiv 2501.12948), section 2.2.2, "format rewards".
    """
    return float(has_format(completion))
