"""A server process that takes weights by vLLM's own engine for that, keeps their checksums, and dies when it is told.

Everything but CUDA is real: HTTP, vLLM's engine, the rendezvous, the bytes.
"""

import multiprocessing
import os
import signal
import zlib
from pathlib import Path
from types import SimpleNamespace

import cuda_stand_in
import torch
from stub_server import StubServer
from torch import nn
from vllm.distributed.weight_transfer import ipc_engine, nccl_engine
from vllm.model_executor.model_loader import mtp_validation, reload  # noqa: F401 - else imported within an update

ENGINES = {"ipc": ipc_engine.IPCWeightTransferEngine, "nccl": nccl_engine.NCCLWeightTransferEngine}


def checksum(tensor: torch.Tensor) -> tuple:
    return str(tensor.dtype), tuple(tensor.shape), zlib.crc32(tensor.contiguous().view(torch.uint8).numpy())


class Model(nn.Module):
    """Keeps the checksum of each weight; `ends` is sent to its own process in the middle of a load."""

    def __init__(self):
        super().__init__()
        self.received: dict[str, tuple] = {}
        self.ends = 0

    def load_weights(self, weights) -> None:
        for name, tensor in weights:
            self.received[name] = checksum(tensor)
        if self.ends:
            os.kill(os.getpid(), self.ends)


def receiving_engine(backend: str, model: nn.Module):
    parallel = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
    config = SimpleNamespace(parallel_config=parallel, model_config=None)
    return ENGINES[backend](None, config, torch.device("cpu"), model)


def serve(backend: str, pipe) -> None:
    """Serve until the pipe's other end is closed. It asks for `received`, or sends the signal to end by."""
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    cuda_stand_in.install()
    model = Model()
    server = StubServer(receiver=receiving_engine(backend, model))
    server.settings["weight_transfer_config"] = {"backend": backend}
    pipe.send(server.url)
    while True:
        try:
            asked = pipe.recv()
        except EOFError:
            os._exit(0)
        if asked == "received":
            pipe.send(model.received)
        else:
            model.ends = asked


class Receiver:
    """That process, from the outside."""

    def __init__(self, backend: str):
        # vLLM is imported once, for all of them.
        os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["weight_receiver"])
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(backend, other), daemon=True)
        self.process.start()
        other.close()
        self.url = self.pipe.recv()

    def received(self) -> dict[str, tuple]:
        self.pipe.send("received")
        return self.pipe.recv()

    def end_within_a_load(self, by: signal.Signals) -> None:
        self.pipe.send(by)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
