"""One vLLM server over HTTP: what is asked of it, and a check of every answer."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp

from ..engine import RolloutsLost, Sampling
from .plugin.guard import ENGINE_HEADER

UNTOUCHED = "default"
"""What vLLM calls the weights that a server came up with."""


class ServerError(Exception):
    """A server did not do what was asked of it. `kind` is a short word to count by."""

    def __init__(self, kind: str, message: str):
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class RequestRefused(RolloutsLost):
    """The server understood the request and says that it is wrong: another server would say the same."""


@dataclass(frozen=True)
class Completion:
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class Health:
    """What a server says of its engine. All None: it runs without our middleware, and does not say."""

    running: int | None = None
    """Completions that its engine was asked for and has not finished."""
    processor_seconds: float | None = None
    """Of the engine's processes and of those that they started."""
    tokens: float | None = None
    """Generated since the server's start."""
    shape: Mapping[str, int] | None = None
    """The model's sizes, by the names in its configuration."""


def open_session() -> aiohttp.ClientSession:
    """As many connections as there are requests, none used twice: a server may close an idle one at any moment."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True))


class Client:
    """Asks one server. Every method raises `ServerError`, and takes its seconds as `timeout`."""

    def __init__(self, session: aiohttp.ClientSession, url: str, token: str | None):
        self.session = session
        self.url = url
        self.headers = {} if token is None else {"Authorization": f"Bearer {token}"}

    async def health(self, timeout: float) -> Health:
        """The HTTP process answers this by itself, so it does not wait for the engine's computation to end."""
        answer, _ = await self._answer("GET", "/health", None, timeout)
        said = answer.headers.get(ENGINE_HEADER)
        try:
            return Health(**json.loads(said)) if said else Health()
        except (ValueError, TypeError) as error:
            raise ServerError("garbage", f"`{ENGINE_HEADER}` is {said[:60]!r}") from error

    async def weight_version(self, timeout: float) -> str:
        """What the server calls its weights. The engine answers between two computations, which may take minutes."""
        return field_of(await self.call("GET", "/weight_info", timeout=timeout), "weight_version", str)

    async def complete(
        self, prompt_ids: list[int], n: int, seed: int, sampling: Sampling, stop_ids: list[int],
        timeout: float | None = None,
    ) -> list[Completion]:  # fmt: skip
        """`n` completions of one prompt. vLLM draws completion i with `seed + i`, and refuses several greedy ones.

        Without a `timeout` it waits for as long as the connection lasts.
        """
        drawn = n if sampling.temperature else 1
        body = {
            "prompt": prompt_ids,
            "n": drawn,
            "seed": seed,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p or 0.0,
            "repetition_penalty": sampling.repetition_penalty,
            "stop_token_ids": stop_ids,
            "logprobs": 0,
            "return_token_ids": True,
        }
        answer = await self.call("POST", "/v1/completions", body, timeout=timeout)
        choices = field_of(answer, "choices", list)
        if sorted(choice["index"] for choice in choices if _is_choice(choice)) != list(range(drawn)):
            raise ServerError("choices", f"asked for {drawn} completions, got {len(choices)}")
        completions = [_completion(choice) for choice in sorted(choices, key=lambda choice: choice["index"])]
        return completions * (n // drawn)

    async def prompt_logprobs(self, token_ids: list[int], timeout: float) -> list[float]:
        """The logprob of each token but the first, at temperature 1."""
        # In a batch where a request has no seed, vLLM's CPU sampler ignores the seeds of all others.
        body = {"prompt": token_ids, "max_tokens": 1, "temperature": 1.0, "seed": 0, "prompt_logprobs": 0}
        answer = await self.call("POST", "/v1/completions", body, timeout=timeout)
        try:
            positions = answer["choices"][0]["prompt_logprobs"][1:]
            return [position[str(token)]["logprob"] for token, position in zip(token_ids[1:], positions, strict=True)]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ServerError("garbage", "no logprobs of the prompt in the answer") from error

    async def call(self, method: str, path: str, body: dict | None = None, timeout: float | None = 60.0) -> Any:
        """The answer's JSON (None if it is empty)."""
        _, text = await self._answer(method, path, body, timeout)
        try:
            return json.loads(text) if text else None
        except ValueError as error:
            raise ServerError("garbage", f"{path} answers what is no JSON: {text[:60]!r}") from error

    async def _answer(
        self, method: str, path: str, body: dict | None, timeout: float | None
    ) -> tuple[aiohttp.ClientResponse, bytes]:
        try:
            async with self.session.request(
                method, self.url + path, json=body, headers=self.headers, timeout=aiohttp.ClientTimeout(timeout)
            ) as response:
                text = await response.read()
        except TimeoutError as error:
            raise ServerError("late", f"{path} took more than {timeout:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise ServerError("unreachable", f"{path}: {error or type(error).__name__}") from error
        if response.status in (400, 404, 422) and path.startswith("/v1/"):
            raise RequestRefused(f"{self.url}{path} refuses the request: {text.decode(errors='replace')[:500]}")
        if response.status != 200:
            raise ServerError(f"status_{response.status}", f"{path}: {text.decode(errors='replace')[:300]}")
        return response, text


def field_of(answer: Any, name: str, kind: type) -> Any:
    """Raises `ServerError` if it is not there, or of another kind."""
    value = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(value, kind):
        raise ServerError("garbage", f"no `{name}` in the answer")
    return value


def _is_choice(choice: Any) -> bool:
    return isinstance(choice, dict) and isinstance(choice.get("index"), int)


def _completion(choice: dict) -> Completion:
    ids, reason = choice.get("token_ids"), choice.get("finish_reason")
    logprobs = (choice.get("logprobs") or {}).get("token_logprobs")
    if not ids:
        raise ServerError("empty", "a completion without a token")
    if reason not in ("stop", "length"):
        raise ServerError("unfinished", f"a completion ended by `{reason}`")
    if not isinstance(logprobs, list) or len(logprobs) != len(ids):
        raise ServerError("garbage", "a completion with more or fewer logprobs than tokens")
    if not all(isinstance(value, float | int) and math.isfinite(value) for value in logprobs):
        raise ServerError("garbage", "a completion with logprobs that are not numbers")
    return Completion(ids, logprobs, reason)
