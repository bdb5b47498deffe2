"""What vLLM's weight transfer asks of CUDA, by shared memory and gloo. Everything above it is vLLM's own."""

import ctypes
import os
import tempfile
import threading
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from types import ModuleType, SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing.reductions as reductions
from vllm.distributed.device_communicators import pynccl
from vllm.distributed.weight_transfer import base, ipc_engine, nccl_common, nccl_engine, packed_tensor

PATHS: dict[int, str] = {}
"""The file of each buffer, by its address."""


class Stream:
    def __init__(self, device: int | None = None):
        pass

    def synchronize(self) -> None:
        pass


class StandIn(ModuleType):
    """The module `torch`, with a GPU whose memory other processes can open."""

    cuda = SimpleNamespace(
        Stream=Stream, current_stream=Stream, stream=lambda stream: nullcontext(), synchronize=lambda: None,
        ipc_collect=lambda: None, is_available=lambda: False,
        get_device_properties=lambda index: SimpleNamespace(uuid="GPU-0"),
    )  # fmt: skip
    accelerator = SimpleNamespace(current_device_index=lambda: 0, synchronize=lambda: None)

    def __getattr__(self, name):
        return getattr(torch, name)

    @staticmethod
    def empty(*shape, device=None, **kwargs) -> torch.Tensor:
        if device != "cuda":
            return torch.empty(*shape, device=device, **kwargs)
        folder = os.environ["CUDA_STAND_IN"]
        handle, path = tempfile.mkstemp(dir=folder)
        os.close(handle)
        buffer = torch.from_file(path, shared=True, size=shape[0], **kwargs)
        PATHS[buffer.data_ptr()] = path
        return buffer


def reduce_tensor(tensor: torch.Tensor) -> tuple[Callable, tuple]:
    unused = (None,) * 4
    return rebuild_cuda_tensor, (PATHS[tensor.data_ptr()], tensor.numel(), *unused, 0)


def rebuild_cuda_tensor(path: str, size: int, *_) -> torch.Tensor:
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)


class Communicator:
    """For `PyNcclCommunicator`. As with NCCL, a broadcast to a lost peer ends when the communicator is destroyed.

    With `raises`, it raises, as NCCL does where it notices.
    """

    raises = False

    def __init__(self, group, device):
        store = dist.PrefixStore("gloo", group.store)
        self.group = dist.ProcessGroupGloo(store, group.rank, group.world_size, timedelta(hours=1))
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.group))  # its destructor waits for a lost peer
        self.destroyed = threading.Event()

    def broadcast(self, tensor: torch.Tensor, src: int, stream=None) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = src, 0
        try:
            work = self.group.broadcast([tensor], options)
            while not work.is_completed() and not self.destroyed.wait(0.002):
                pass
            if work.is_completed():
                work.wait()
        except RuntimeError:
            if self.raises:
                raise
            self.destroyed.wait()

    def destroy(self) -> None:
        self.destroyed.set()


def install(patch: Callable = setattr) -> None:
    """Put the stand-ins in vLLM's modules."""
    for module in (base, ipc_engine, nccl_common, nccl_engine, packed_tensor):
        patch(module, "torch", StandIn("torch"))
    for module in (ipc_engine, packed_tensor):
        patch(module, "reduce_tensor", reduce_tensor)
    patch(ipc_engine, "rebuild_cuda_tensor", rebuild_cuda_tensor)
    patch(reductions, "rebuild_cuda_tensor", rebuild_cuda_tensor)
    patch(pynccl, "PyNcclCommunicator", Communicator)
