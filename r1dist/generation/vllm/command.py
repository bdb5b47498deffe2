"""The command and the environment of one vLLM server, from our configuration. Starts nothing."""

import json
import os
import sys
from collections.abc import Mapping

from ...config import Serve
from .plugin import OWNER
from .plugin.guard import TOKEN


def command(serve: Serve, model: str, transport: str, port: int) -> list[str]:
    """What a person would type to get this server."""
    flags = {
        "model": model,
        "host": serve.host,
        "port": port,
        "dtype": serve.dtype,
        "tensor-parallel-size": serve.tensor_parallel,
        "data-parallel-size": serve.data_parallel,
        "max-model-len": serve.max_model_len,
        "gpu-memory-utilization": serve.gpu_memory_utilization,
        "kv-cache-memory-bytes": None if serve.cache_gib is None else int(serve.cache_gib * 2**30),
        # The logprobs that the importance correction needs are those of the distribution that was drawn from.
        "logprobs-mode": "processed_logprobs",
        "max-logprobs": -1,
        # A request brings all of its sampling settings; the model's own would fill in missing ones.
        "generation-config": "vllm",
        "weight-transfer-config": json.dumps({"backend": transport}),
        "middleware": "r1dist.generation.vllm.plugin.guard.TokenGuard",
    }
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--disable-uvicorn-access-log"]
    for name, value in flags.items():
        if value is not None:
            words += [f"--{name}", str(value)]
    words += ["--enforce-eager"] if serve.enforce_eager else []
    words += ["--enable-sleep-mode"] if serve.sleep else []
    return words + serve.arguments


def environment(serve: Serve, replica: int, transport: str, token: str, inherited: Mapping[str, str]) -> dict:
    """The server's environment: the caller's without the variables of a training process, and ours."""
    ranks = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC", "OMP_NUM", "ACCELERATE_")
    kept = {name: value for name, value in inherited.items() if not name.startswith(ranks)}
    kept |= {TOKEN: token, OWNER: str(os.getpid()), "VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if transport == "ipc":  # its handles travel as pickles; the token is what makes that bearable
        kept["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    if serve.devices is not None:
        kept["CUDA_VISIBLE_DEVICES"] = ",".join(_share(serve.devices.split(","), replica, serve.replicas))
    elif serve.cores is not None:
        mine = _share(_cores(serve), replica, serve.replicas)
        each = len(mine) // serve.tensor_parallel
        bound = (mine[rank * each : (rank + 1) * each] for rank in range(serve.tensor_parallel))
        kept["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(cores) for cores in bound)
    return kept


def _cores(serve: Serve) -> list[str]:
    """`cores` for each replica, going round where there are fewer."""
    available = sorted(os.sched_getaffinity(0))
    return [str(available[i % len(available)]) for i in range(serve.replicas * serve.cores)]


def _share(things: list[str], replica: int, replicas: int) -> list[str]:
    each = len(things) // replicas
    return things[replica * each : (replica + 1) * each]
