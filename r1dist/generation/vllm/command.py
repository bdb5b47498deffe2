"""The command and the environment of one vLLM server, from our configuration. Starts nothing."""

import json
import os
import sys
from collections.abc import Mapping

from ...config import Serve
from ...errors import UserError
from .plugin import OWNER
from .plugin.guard import TOKEN

WHOLE_PROMPTS = "--no-enable-chunked-prefill"
FIELDS = {
    "--tensor-parallel-size": "tensor_parallel", "--data-parallel-size": "data_parallel", "--host": "host",
    "--dtype": "dtype", "--max-model-len": "max_model_len", "--gpu-memory-utilization": "gpu_memory_utilization",
    "--kv-cache-memory-bytes": "cache_gib", "--enforce-eager": "enforce_eager", "--enable-sleep-mode": "sleep",
}  # fmt: skip
"""Flags of vLLM that our own fields set."""
SHORT = {"-tp": "--tensor-parallel-size", "-dp": "--data-parallel-size"}


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


def check_arguments(arguments: list[str], serve: Serve, where: str) -> None:
    """Raises `UserError` for further arguments of vLLM's that contradict the command of `serve`.

    Args:
        arguments: What is added to that command.
        serve: With everything decided.
        where: What errors call the arguments.
    """
    own = _options(command(serve, "", "", 0))
    for name, value in _options(arguments):
        for decided, own_value in own:
            # vLLM takes the beginning of a flag for the flag; it collects middlewares.
            same = _positive(decided).startswith(_positive(name)) and decided != "--middleware"
            if same and (name, value) != (decided, own_value):
                field = FIELDS.get(_positive(decided))
                raise UserError(
                    f"{where}: `{' '.join(filter(None, (name, value)))}` contradicts "
                    f"`{' '.join(filter(None, (decided, own_value)))}`, which the server is given.\n"
                    + (f"Set `{field}` instead." if field else "Leave it out.")
                )
    batched = dict(_options(arguments)).get("--max-num-batched-tokens")
    whole = WHOLE_PROMPTS in (name for name, _ in own + _options(arguments))
    if whole and batched and batched.isdigit() and int(batched) < (serve.max_model_len or 0):
        raise UserError(
            f"{where}: `--max-num-batched-tokens {batched}` is too small: without chunked prefill a prompt of up to "
            f"{serve.max_model_len} tokens (max_model_len) is computed at once.\n"
            f"Set it to {serve.max_model_len} or more, or leave it out."
        )


def _options(words: list[str]) -> list[tuple[str, str | None]]:
    """Each flag among `words` as vLLM reads it, with its value."""
    options = []
    for word, following in zip(words, [*words, "-"][1:], strict=True):
        name, equals, value = word.partition("=")
        if word.startswith("-"):
            name = SHORT.get(name, name.replace("_", "-"))
            options.append((name, value if equals else None if following.startswith("-") else following))
    return options


def _positive(name: str) -> str:
    return name.replace("--no-", "--", 1)


def environment(serve: Serve, replica: int, transport: str, token: str, inherited: Mapping[str, str]) -> dict:
    """The server's environment: the caller's without the variables of a training process, and ours."""
    ranks = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC", "OMP_NUM", "ACCELERATE_")
    kept = {name: value for name, value in inherited.items() if not name.startswith(ranks)}
    kept |= {TOKEN: token, OWNER: str(os.getpid()), "VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if transport == "ipc":  # its handles travel as pickles; the token is what makes that bearable
        kept["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    if serve.devices is not None:
        each = serve.tensor_parallel * serve.data_parallel
        mine = serve.devices.split(",")[replica * each : (replica + 1) * each]
        # `devices` counts what we see; the server reads the variable anew, which has indices or UUIDs of its own.
        visible = [name for name in inherited.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        kept["CUDA_VISIBLE_DEVICES"] = ",".join(visible[int(number)].strip() if visible else number for number in mine)
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
