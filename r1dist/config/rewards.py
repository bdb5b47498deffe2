"""A reward in the YAML: the fields that all rewards have. Its own are checked by `rewards.registry`."""

import dataclasses
from typing import Any

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from .resumable import MayChange

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
    isolated: MayChange[bool] = True
    """Of your own function: whether it runs in the worker processes, within the limits of `verify`. False: in the
    trainer's process, for one that asks a remote model."""
    deterministic: MayChange[bool] = False
    """Of your own function: it is asked twice for some completions of each generation, and must give the same
    scores."""
    concurrency: MayChange[PositiveInt | None] = None
    """`isolated: false`, judges, served models: calls at a time, of each training process. Unset: 8."""
    requests_per_minute: MayChange[PositiveFloat | None] = None
    """The same: most calls in a minute, of all training processes together. Unset: any number."""
    retries: MayChange[NonNegativeInt | None] = None
    """The same: times that a call that failed is made again. Unset: 2; of judges and served models 6."""
    deadline: MayChange[PositiveFloat | None] = None
    """The same: seconds that a call may take each time. Unset: 60."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """What its function takes. In the YAML these fields stand beside the others."""


IN_TRAINER = ("concurrency", "requests_per_minute", "retries", "deadline")
"""Fields of `isolated: false`, and of rewards that ask a server."""
OF_SERVER = ("url", "api_key_env")
"""Parameters of our own rewards that ask a server: where it is may change on resume."""
OF_ALL = tuple(field.name for field in dataclasses.fields(Reward) if field.name != "parameters")
"""Fields that every reward has."""


def reward_fields(value: Any) -> Any:
    """A reward of the YAML, or its weight, as `Reward`'s fields."""
    if isinstance(value, Reward):
        return value
    if not isinstance(value, dict):
        return {"weight": value}
    own = {name: given for name, given in value.items() if name not in OF_ALL}
    return {**{name: given for name, given in value.items() if name in OF_ALL}, "parameters": own}


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
