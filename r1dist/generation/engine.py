"""What the trainer, the evaluation and rejection sampling ask of whoever generates."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

RolloutId = tuple[int, int, int]
"""(generation, prompt_id, sample_index)"""


@dataclass(frozen=True)
class Request:
    """One completion that is wanted."""

    prompt_ids: list[int]
    prompt_id: int
    sample_index: int
    """Its place among the completions of the same prompt."""
    seed: int


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 switch those off."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class Rollout:
    """One completion, and what is known of its making."""

    request: Request
    token_ids: list[int]
    """At least one token; the stop token is included."""
    logprobs: list[float]
    """Of each token, under the distribution that it was drawn from."""
    finish_reason: Literal["stop", "length"]
    policy_version: int
    """The optimizer step whose weights drew it."""


class RolloutsLost(Exception):
    """Nobody is left who could generate. The message says who was asked and what became of it."""


class Engine(Protocol):
    """Generates rollouts with the policy's current weights."""

    def sync_weights(self, version: int) -> None:
        """Take over the policy's weights, which from now on are called `version`. Every rank calls it."""

    def stream(self, requests: list[Request], sampling: Sampling) -> Iterator[tuple[int, Rollout]]:
        """A rollout for each request, as they are finished, with the request's place in the list.

        Raises `RolloutsLost`.
        """

    def end_generation(self) -> None:
        """No more rollouts are wanted for now. Every rank calls it."""

    def metrics(self) -> dict[str, float]:
        """What to log of the time since the last call, to be added up over the ranks."""

    def close(self) -> None:
        """Give back what the engine holds."""


class GenerationHandle(Protocol):
    """Rollouts in the making, with their places. Iterating waits for them and raises `RolloutsLost`."""

    done: bool
    """Whether nothing more will arrive."""

    def __iter__(self) -> Iterator[tuple[int, Rollout]]: ...

    def arrived(self) -> Iterator[tuple[int, Rollout]]:
        """Those that have arrived since the last call; does not wait, raises nothing."""

    def cancel(self) -> None: ...


class AsyncEngine(Engine, Protocol):
    """An engine that can generate while the caller does other work."""

    def submit(self, requests: list[Request], sampling: Sampling) -> GenerationHandle:
        """`stream` without waiting. Weights must not be synced before the handle is done or cancelled."""


def generate(engine: Engine, requests: list[Request], sampling: Sampling) -> list[Rollout]:
    """One rollout for each request, in their order."""
    rollouts = dict(engine.stream(requests, sampling))
    return [rollouts[place] for place in range(len(requests))]


def sample_seed(run_seed: int, step: int, prompt_id: int, sample_index: int) -> int:
    """A 62-bit seed of its own for each sample, the same whichever rank or server draws it.

    The samples of a prompt have consecutive seeds, as a vLLM server gives them when it is asked for several
    completions at once.
    """
    key = f"{run_seed}:{step}:{prompt_id}".encode()
    return (int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 2) + sample_index
