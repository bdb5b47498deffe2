"""A reward in the YAML: its fields, and which reward takes which. Imports without torch."""

from typing import Any, Literal

from pydantic import ConfigDict, Field, FiniteFloat, PositiveInt
from pydantic.dataclasses import dataclass

from ..errors import UserError
from .languages import SCRIPT
from .resumable import MayChange
from .values import PathText

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
"""Of all sections: unknown fields are refused, and numbers that are not finite."""


@dataclass(config=STRICT, kw_only=True)
class Reward:
    """One reward of the sum. In the YAML a bare number is its weight. docs/rewards.md describes each."""

    weight: float = 1.0
    """What its score is multiplied by."""
    kinds: list[str] | None = None
    """Only for rows of these kinds (`data.sources.N.kind`); other rows go without it. Unset: for all."""
    from_step: int = Field(default=0, ge=0)
    """Optimizer steps before which it is left out."""
    target: Literal["prompt", *SCRIPT] | None = None  # type: ignore[valid-type]
    """`language`: the language to think in. `prompt`, the default: that of the row's problem."""
    model: PathText | None = None
    """`helpfulness`, `safety`: the folder of the reward model (launch/reward_model.py)."""
    max_tokens: PositiveInt | None = None
    """`cosine`: tokens at which length has its full effect. `overlong`: tokens that are too many."""
    cache_tokens: PositiveInt | None = None
    """`overlong`: over this many tokens before `max_tokens` the punishment grows."""
    correct: tuple[FiniteFloat, FiniteFloat] | None = None
    """`cosine`: what a right answer is paid at 0 and at `max_tokens` tokens. Unset: 1 and 0.5."""
    wrong: tuple[FiniteFloat, FiniteFloat] | None = None
    """`cosine`: the same for a wrong answer. Unset: -1 and -0.5."""
    ngram: PositiveInt | None = None
    """`repetition`: words in a row that count as a repetition. Unset: 3."""


@dataclass(config=STRICT, kw_only=True)
class Verify:
    """The worker processes that verify answers, and that compute other rewards whose time depends on the text."""

    workers: MayChange[PositiveInt | None] = None
    """Of each training process. Unset: the machine's cores, divided among its training processes."""
    seconds: MayChange[float] = Field(default=5, gt=0)
    """Wall-clock seconds that one score may take; beyond, it is 0 and its worker is replaced."""
    code_seconds: MayChange[float] = Field(default=120, gt=0)
    """Wall-clock seconds for a program with all its tests; beyond, it scores 0. Each test has 10 at most."""
    memory_mib: MayChange[PositiveInt] = 1024
    """Memory that one answer may take, beyond what a worker has from the start."""
    retry_timeout: MayChange[float] = Field(default=300, ge=0)
    """Seconds to retry while verification does not work; then the run saves a checkpoint and ends."""

    def of(self, verifier: str) -> float:
        """Seconds for one completion."""
        return self.code_seconds if verifier == "code" else self.seconds


# The report's own rewards come first.
TAKES: dict[str, tuple[str, ...]] = {
    "accuracy": (),
    "format": (),
    "helpfulness": ("model",),
    "language": ("target",),
    "safety": ("model",),
    "code": (),
    "code_format": (),
    "cosine": ("max_tokens", "correct", "wrong"),
    "length": (),
    "overlong": ("max_tokens", "cache_tokens"),
    "reasoning_steps": (),
    "repetition": ("ngram",),
    "soft_format": (),
    "tag_count": (),
    "task": (),
}
DEFAULTS = {"target": "prompt", "correct": (1.0, 0.5), "wrong": (-1.0, -0.5), "ngram": 3}
# Parameters without a default -> what to say where one is missing.
NEEDED = {
    "model": "a reward model's folder",
    "max_tokens": "a number of tokens, such as the run's `max_completion_length`",
    "cache_tokens": "the number of tokens before `max_tokens` over which it grows",
}


def check_rewards(rewards: dict[str, Reward]) -> None:
    """Refuse, as a `UserError`, a name that is no reward, and a parameter that is not taken, missing or senseless."""
    for name, reward in rewards.items():
        if name not in TAKES:
            raise UserError(f"rewards: `{name}` is not a reward; there are {', '.join(TAKES)}.")
        for field in (*DEFAULTS, *NEEDED):
            given = getattr(reward, field) is not None
            if given and field not in TAKES[name]:
                raise UserError(f"rewards.{name}: it takes no `{field}`.")
            if not given and field in TAKES[name] and field in NEEDED:
                raise UserError(f"rewards.{name}: it needs `{field}`, {NEEDED[field]}.")
        if reward.cache_tokens is not None and reward.cache_tokens > reward.max_tokens:
            raise UserError(
                f"rewards.{name}: `cache_tokens` {reward.cache_tokens} is more than `max_tokens` "
                f"{reward.max_tokens}, so every completion would be punished; lower it."
            )


def parameters(name: str, reward: Reward) -> dict[str, Any]:
    """What the reward `name` is called with: the fields that it takes, each as given or by default."""
    given = {field: getattr(reward, field) for field in TAKES[name]}
    return {field: DEFAULTS[field] if value is None else value for field, value in given.items()}
