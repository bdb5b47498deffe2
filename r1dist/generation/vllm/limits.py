"""Whether servers that others have started can do what a run will ask of them, found out before its first step."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...config import Model, Rollout
from ...errors import UserError
from ...models import load_model_config, model_path
from .client import UNTOUCHED, Client, RequestRefused, ServerError, field_of, open_session
from .endpoints import Server, ServerRegistry

logger = logging.getLogger(__name__)

TICK = 0.5


@dataclass(frozen=True)
class Demand:
    """The most that a run asks of a server, and of which model."""

    model: Model
    tokenizer: PreTrainedTokenizerBase
    prompt_ids: list[int]
    """Of the longest prompt."""
    max_tokens: int
    """Of a completion."""
    trains: bool
    """Whether servers are given weights; if not, they must have the model's."""

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + self.max_tokens


def check_running(rollout: Rollout, demand: Demand) -> None:
    """Ask the servers that `rollout.servers` names. Raises `UserError` if one does not fit, or none answers."""
    asyncio.run(_check_running(rollout, demand))


async def _check_running(rollout: Rollout, demand: Demand) -> None:
    registry = ServerRegistry(rollout, None)
    deadline = time.monotonic() + rollout.serve.start_timeout
    while any(server.state == "starting" for server in registry.read().servers) and time.monotonic() < deadline:
        await asyncio.sleep(TICK)
    endpoints = registry.read()
    if demand.trains and rollout.transport not in ("auto", endpoints.transport):
        raise UserError(
            f"rollout.transport: {rollout.transport} is asked for, but the servers were started for "
            f"{endpoints.transport}. Leave it out."
        )
    async with open_session() as session:

        async def check(server: Server) -> str | None:
            """Why it cannot be asked, if it cannot."""
            if server.state != "ready":
                return server.error or server.state
            try:
                client = Client(session, server.url, endpoints.token)
                await _check_one(client, server.name, endpoints.transport, rollout, demand)
            except (ServerError, RequestRefused) as error:
                return " ".join(str(error).split())
            return None

        reasons = await asyncio.gather(*(check(server) for server in endpoints.servers))
    silent = {server.name: why for server, why in zip(endpoints.servers, reasons, strict=True) if why is not None}
    told = "; ".join(f"{name}: {why}" for name, why in silent.items())
    if len(silent) == len(endpoints.servers):
        raise UserError(
            f"rollout.servers: no server can be used. {told}\nCheck the address and the token, and start them first."
        )
    if silent:
        logger.warning("servers that cannot be used yet: %s", told)


async def _check_one(client: Client, name: str, transport: str, rollout: Rollout, demand: Demand) -> None:
    """Raises `UserError` if it does not fit, `ServerError` if it does not answer."""
    health = await _patiently(lambda: client.health(rollout.health_timeout), rollout.health_timeout)
    models = field_of(await client.call("GET", "/v1/models", timeout=rollout.health_timeout), "data", list)
    card = models[0] if models else {}
    _check_length(field_of(card, "max_model_len", int), name, demand)
    _check_model(field_of(card, "root", str), health.shape or {}, name, demand)
    await _check_vocabulary(client, name, rollout, demand)
    try:
        version = await client.weight_version(rollout.request_timeout)
        answer = await client.call("GET", "/server_info?config_format=json", timeout=rollout.request_timeout)
    except ServerError as error:
        if error.kind != "status_404":
            raise
        raise UserError(
            f"rollout.servers: {name} does not tell of its weights ({error}).\nStart it by launch/serve.py, or with "
            "VLLM_SERVER_DEV_MODE=1 in its environment."
        ) from error
    if not demand.trains and version != UNTOUCHED:
        raise UserError(
            f"rollout.servers: {name} has weights of a training run ({version}), not those of {demand.model.path}.\n"
            "Start it again, or use another one."
        )
    _check_settings(field_of(answer, "vllm_config", dict), name, transport if demand.trains else None)


async def _patiently(ask: Callable, seconds: float) -> Any:
    """What `ask` gives, asked again for `seconds` while nobody listens."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return await ask()
        except ServerError as error:
            if error.kind != "unreachable" or time.monotonic() > deadline:
                raise
        await asyncio.sleep(TICK)


def _check_length(length: int, name: str, demand: Demand) -> None:
    if length < demand.tokens:
        raise UserError(
            f"rollout.servers: {name} holds {length} tokens, and {demand.tokens} are needed: "
            f"a prompt of {len(demand.prompt_ids)} and a completion of {demand.max_tokens}.\n"
            f"Start it with --max_model_len {demand.tokens} or more, or allow shorter completions."
        )


def _check_model(root: str, shape: dict[str, int], name: str, demand: Demand) -> None:
    config = load_model_config(demand.model).get_text_config()
    for field, value in shape.items():
        if value != getattr(config, field):
            raise UserError(
                f"rollout.servers: {name} serves {root}, another model: its {field} is {value}, that of "
                f"{demand.model.path} is {getattr(config, field)}.\nStart it with this run's model."
            )
    if not demand.trains and not _same_model(root, model_path(demand.model)):
        raise UserError(
            f"rollout.servers: {name} serves {root}, and the samples are to be {demand.model.path}'s.\n"
            "Start it with that model, or name the model as the server does."
        )


def _same_model(root: str, path: str) -> bool:
    served, own = Path(root).resolve(), Path(path).resolve()
    return served == own or (served.parent == own and served.name.startswith("merged-"))  # see adapters.merged_path


async def _check_vocabulary(client: Client, name: str, rollout: Rollout, demand: Demand) -> None:
    text = demand.tokenizer.decode(demand.prompt_ids)
    own = demand.tokenizer(text, add_special_tokens=False)["input_ids"]
    asked = {"prompt": text, "add_special_tokens": False}
    answer = await client.call("POST", "/tokenize", asked, timeout=rollout.health_timeout)
    if field_of(answer, "tokens", list) != own:
        raise UserError(
            f"rollout.servers: {name} has another vocabulary: it cuts a prompt of this run into other tokens than "
            f"{demand.model.tokenizer or demand.model.path} does.\nStart it with this run's model and tokenizer."
        )


def _check_settings(settings: dict, name: str, transport: str | None) -> None:
    taken = (settings.get("weight_transfer_config") or {}).get("backend")
    if transport is not None and taken != transport:
        raise UserError(
            f"rollout.servers: {name} takes weights by {taken}, and this run sends them by {transport}.\n"
            f"Start it with --transport {transport} (launch/serve.py), or set rollout.transport."
        )
    chunked = settings["scheduler_config"]["enable_chunked_prefill"]
    if chunked and settings["device_config"]["device"] == "cpu":
        raise UserError(
            f"rollout.servers: {name} runs on a CPU with chunked prefill, and a request with a seed would kill it.\n"
            "Start it by launch/serve.py, or with --no-enable-chunked-prefill."
        )
