"""Rewards that look at a completion's length in tokens, its end token included: `tokens` of the row.

Where they ask whether the answer is right, it is `accuracy` of the row, None if that cannot be verified.
"""

import math
from typing import Annotated

from pydantic import Field, FiniteFloat, PositiveInt

Ends = tuple[FiniteFloat, FiniteFloat]
MaxTokens = Annotated[PositiveInt, Field(description="a number of tokens, such as the run's `max_completion_length`")]
CacheTokens = Annotated[PositiveInt, Field(description="the number of tokens before `max_tokens` over which it grows")]


def cosine(
    completion: str, row: dict, max_tokens: MaxTokens, correct: Ends = (1.0, 0.5), wrong: Ends = (-1.0, -0.5)
) -> float | None:
    """long + (short - long) (1 + cos(pi t)) / 2 with t = min(1, tokens / max_tokens).

    (short, long) is `correct` for a right answer and `wrong` for any other: what is paid at 0 tokens, and at
    `max_tokens` and beyond. None without an accuracy. Range: between the two ends.

    Source: "Demystifying Long Chain-of-Thought" (arXiv 2502.03373), the cosine reward, without its separate
    value for completions that reach the limit: `overlong` is a reward for that.
    """
    right = row["accuracy"]
    if right is None:
        return None
    short, long = correct if right else wrong
    # Beyond its length a cosine climbs again, and would pay for the longest of wrong answers.
    progress = min(1.0, row["tokens"] / max_tokens)
    return long + (short - long) * (1 + math.cos(math.pi * progress)) / 2


def length(completion: str, row: dict) -> float | None:
    """lambda = 0.5 - (tokens - min) / (max - min) for a right answer, min(0, lambda) for a wrong one.

    min and max are taken over `group_tokens` of the row, the tokens of all completions of its prompt, right or
    wrong, whichever rank they are on. 0 if all are equally long; None without an accuracy.
    Range [-0.5, 0.5]. Source: Kimi k1.5 (arXiv 2501.12599), section 2.3.3.
    """
    right = row["accuracy"]
    if right is None:
        return None
    shortest, longest = min(row["group_tokens"]), max(row["group_tokens"])
    if shortest == longest:
        return 0.0
    merit = 0.5 - (row["tokens"] - shortest) / (longest - shortest)
    return merit if right else min(0.0, merit)


def overlong(completion: str, row: dict, max_tokens: MaxTokens, cache_tokens: CacheTokens) -> float:
    """0 up to max_tokens - cache_tokens tokens, then falling in a line to -1 at `max_tokens`, -1 beyond.

    Range [-1, 0]. Source: DAPO (arXiv 2503.14476), equation 13, as TRL computes it.
    """
    from trl.rewards import get_soft_overlong_punishment  # not above: a sixth of what the fork server imports

    punish = get_soft_overlong_punishment(max_tokens, cache_tokens)
    # It looks at nothing but the length.
    return punish(completion_ids=[range(row["tokens"])])[0]
