"""What vLLM's `ipc` and `nccl` engines need of the trainer. Imports vLLM, so only where those are used."""

from collections.abc import Iterator

import requests
import torch
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerInitInfo
from vllm.distributed.weight_transfer.base import WeightSource as VLLMWeightSource
from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from ..vllm.client import Client
from .source import WeightSource


class SyncClient(HTTPVLLMWeightSyncClient):
    """vLLM's client for weight updates, with our token."""

    def __init__(self, client: Client):
        super().__init__(client.url)
        self.headers = client.headers

    def world_size(self) -> int:
        response = requests.get(f"{self.base_url}/get_world_size", headers=self.headers, timeout=self.timeout)
        response.raise_for_status()
        return response.json()["world_size"]

    def _post(self, path: str, json: dict | None = None) -> None:
        url = f"{self.base_url}/{path}"
        requests.post(url, json=json, headers=self.headers, timeout=self.timeout).raise_for_status()


class VLLMSource(VLLMWeightSource):
    """Our weights through vLLM's interface: the same names, shapes and order in both of its channels."""

    def __init__(self, source: WeightSource):
        self.source = source

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(entry.name, self.source.dtype, tuple(entry.shape)) for entry in self.source.entries]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for bucket in self.source.buckets():
            yield from bucket


def init_info(backend: str, rank: int, address: str, port: int, world_size: int) -> TrainerInitInfo:
    """How the trainer's side of `backend` introduces itself. Packed: few large transfers instead of many small."""
    if backend == "ipc":
        return IPCTrainerInitInfo(rank=rank, packed=True)
    return NCCLTrainerInitInfo(rank=rank, master_address=address, master_port=port, world_size=world_size)
