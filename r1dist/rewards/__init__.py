"""Reward functions by name. Each takes one completion's text and its row, and returns a score or None.

None means that the row cannot be scored (its gold answer does not parse): it is left out of the baseline.
"""

from collections.abc import Callable

from ..errors import UserError
from .accuracy import accuracy
from .format import format_reward

Reward = Callable[[str, dict], float | None]

REWARDS: dict[str, Reward] = {"accuracy": accuracy, "format": format_reward}


def select(weights: dict[str, float]) -> dict[str, Reward]:
    """The functions named in `weights`, in their order. Raises `UserError` for a name that is not there."""
    for name in weights:
        if name not in REWARDS:
            raise UserError(f"rewards: `{name}` is not a reward; there are {', '.join(sorted(REWARDS))}.")
    return {name: REWARDS[name] for name in weights}
