"""Which GPUs serve, with how much of their memory, and in which dtype."""

import functools
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...config import Serve
from ...errors import UserError

logger = logging.getLogger(__name__)

GIB = 2**30
SHARED_GPU = 0.3
VLLM_DEFAULT = 0.92
"""vLLM's own share of a GPU, of which it refuses to start if less is free."""
LEAST_SHARE = 0.05
SERVER_CONTEXT = 0.75 * GIB
"""Bytes that a server takes before it looks how much is free: the CUDA context and NCCL's buffers."""

ASK = """
import json, torch
cuda = torch.cuda
gpus = range(cuda.device_count())
print(json.dumps([[*cuda.mem_get_info(i), cuda.get_device_capability(i)[0] >= 8] for i in gpus]))
"""


@dataclass(frozen=True)
class GPU:
    """One that this process may use."""

    free: int
    """Bytes."""
    total: int
    """Bytes."""
    bf16: bool = True
    """Whether it computes in bfloat16. vLLM refuses to emulate that."""


@functools.cache
def visible_gpus() -> tuple[GPU, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, in torch's order.

    Another process asks: who asks CUDA for free memory takes some of it, until it ends.
    """
    if not torch.cuda.device_count():
        return ()
    answer = subprocess.run([sys.executable, "-c", ASK], check=True, stdout=subprocess.PIPE, text=True).stdout
    return tuple(GPU(*values) for values in json.loads(answer.splitlines()[-1]))


def serving_gpus(serve: Serve, transport: str, sleep: bool | None, gpus: int, trainers: int, where: str) -> list[int]:
    """The numbers of the GPUs that serve, out of `gpus`; those below `trainers` train, too.

    Args:
        transport, sleep: As the YAML has them.
        where: What stands before the fields of `serve` in errors.

    Raises `UserError` for `devices` that are not there.
    """
    if serve.devices is not None:
        return _numbers(serve.devices, gpus, where)
    together = transport == "ipc" or sleep or gpus <= trainers
    return list(range(trainers) if trainers and together else range(trainers, gpus))


def _numbers(devices: str, gpus: int, where: str) -> list[int]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in visible.split(",")]
    asked = [name.strip() for name in devices.split(",")]
    # A UUID that CUDA_VISIBLE_DEVICES has stands for its place there.
    numbers = [name if name.isdecimal() or name not in names else str(names.index(name)) for name in asked]
    if len(set(numbers)) == len(numbers) and all(n.isdecimal() and int(n) < gpus for n in numbers):
        return [int(n) for n in numbers]
    seen = f"{gpus} GPU{'s' if gpus > 1 else ''}" + (f" (CUDA_VISIBLE_DEVICES={visible})" if visible else "")
    raise UserError(
        f"{where}devices: `{devices}`, but this process sees {seen}.\n"
        f"They are counted from 0: name different ones of {', '.join(map(str, range(gpus)))}, or leave it out."
    )


def place_servers(
    serve: Serve, transport: str, sleep: bool | None, gpus: Sequence[GPU], trainers: int, where: str = "rollout.serve."
) -> tuple[str, bool]:
    """Set the devices and the share of memory of `serve`; returns the transport, and whether trainers' GPUs serve.

    Args as for `serving_gpus`. Raises `UserError` for what these GPUs cannot do.
    """
    numbers = serving_gpus(serve, transport, sleep, len(gpus), trainers, where)
    shared = [number for number in numbers if number < trainers]
    if shared:
        _check_shared(serve, transport, numbers, trainers, where)
    else:
        _check_own(serve, transport, numbers, trainers, where)
    numbers = numbers[: _needed(serve)]
    serve.devices = ",".join(map(str, numbers))
    _fit_memory(serve, {number: gpus[number] for number in numbers}, bool(shared), where)
    return transport if transport != "auto" else "ipc" if shared else "nccl", bool(shared)


def _needed(serve: Serve) -> int:
    return serve.replicas * serve.tensor_parallel * serve.data_parallel


def _check_shared(serve: Serve, transport: str, numbers: list[int], trainers: int, where: str) -> None:
    if transport == "nccl":
        raise UserError(
            f"rollout.transport: `nccl` joins different GPUs, but GPU {numbers[0]} would both train and serve.\n"
            "Use `ipc`, or leave GPUs to the servers: fewer training processes, or `devices` of their own."
        )
    spans_all = (serve.replicas, serve.data_parallel, serve.tensor_parallel) == (1, 1, trainers)
    if not spans_all or sorted(numbers) != list(range(trainers)):
        raise UserError(
            f"{where.rstrip('.')}: on the GPUs of {trainers} training processes there is room for one server that "
            f"spans them all.\nSet replicas and data_parallel to 1 and tensor_parallel to {trainers}, give `devices` "
            "of their own, or set `rollout.engine: transformers`."
        )


def _check_own(serve: Serve, transport: str, numbers: list[int], trainers: int, where: str) -> None:
    if transport == "ipc" and trainers:
        raise UserError(
            f"rollout.transport: `ipc` stays within a GPU, but the servers have others than the trainer "
            f"({where}devices: {serve.devices}).\nUse `nccl`, or leave one of them out."
        )
    needed = _needed(serve)
    if needed > len(numbers):
        each = f"tensor_parallel {serve.tensor_parallel} x data_parallel {serve.data_parallel}"
        raise UserError(
            f"{where}replicas: {serve.replicas} x {each} take {needed} GPUs, and {len(numbers)} can serve.\n"
            "Lower one of them, or give more GPUs."
        )


def _fit_memory(serve: Serve, gpus: dict[int, GPU], shared: bool, where: str) -> None:
    """Set a share of memory with which vLLM starts: it refuses a larger one than is free, also where `cache_gib` is
    set, which makes the share mean nothing else.
    """
    number, tightest = min(gpus.items(), key=lambda gpu: gpu[1].free / gpu[1].total)
    asked = serve.gpu_memory_utilization
    room = math.floor(100 * (tightest.free - SERVER_CONTEXT) / tightest.total) / 100
    if tightest.free < asked * tightest.total if asked else room < LEAST_SHARE:
        mend = f"Set it to {room:g} or less, or end" if room >= LEAST_SHARE else "End"
        raise UserError(
            f"{where}gpu_memory_utilization: a server needs {asked or LEAST_SHARE:g} of GPU {number}, of which "
            f"{tightest.free / GIB:.1f} of {tightest.total / GIB:.1f} GiB are free.\n{mend} what else uses it."
        )
    if asked is None and (shared or room < VLLM_DEFAULT):
        serve.gpu_memory_utilization = min(room, SHARED_GPU if shared else VLLM_DEFAULT)


def served_dtype(serve: Serve, computed: str, gpus: Sequence[GPU], trainers: int) -> str:
    """What the servers compute in; `computed`: what the trainer, or the model that is sampled from, does.

    Raises `UserError` for bfloat16 on GPUs that lack it.
    """
    dtype = computed if serve.dtype == "auto" else serve.dtype
    if dtype != "bfloat16" or all(gpu.bf16 for gpu in gpus):
        return dtype
    if serve.dtype == "auto" and not trainers:
        logger.warning("the servers compute in float16: these GPUs have no bfloat16 (compute capability below 8)")
        return "float16"
    raise UserError(
        "rollout.serve.dtype: the servers would compute in bfloat16, which these GPUs lack (compute capability below "
        "8).\nLeave `bf16` out with `model.dtype: float32`, then all computes in float16; or set this to float16."
    )
