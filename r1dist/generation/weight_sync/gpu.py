"""vLLM's `ipc` and `nccl` engines, one for each server. Imports vLLM, so only where those are used."""

import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, InvalidStateError, wait
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import requests
import torch
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerInitInfo
from vllm.distributed.weight_transfer.base import WeightSource as VLLMWeightSource
from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from ..ports import address_towards, free_port
from ..vllm.client import Client, ServerError
from .source import WeightSource

PACKED_BYTES = 256 * 2**20
"""Of the buffer in which weights are packed; a larger tensor has one of its own size."""


class SyncClient(HTTPVLLMWeightSyncClient):
    """vLLM's client for weight updates, with our token.

    Its calls raise nothing: the first failure is kept, and nothing more is sent after it. The sender must go through
    all the weights in any case, since the other ranks gather them with it.
    """

    def __init__(self, client: Client, timeout: float):
        super().__init__(client.url, timeout)
        self.headers = client.headers
        self.failure: Future[ServerError] = Future()

    def fail(self, error: ServerError) -> None:
        with suppress(InvalidStateError):  # the first one counts
            self.failure.set_result(error)

    def world_size(self) -> int:
        """The server's workers; 0 after a failure."""
        workers = 0
        with self._keeping_failures():
            workers = self._request("GET", "get_world_size").json()["world_size"]
        return workers

    def start_weight_update(self) -> None:
        if self.failure.done():
            return
        with self._keeping_failures():
            try:
                self._request("POST", "start_weight_update")
            except requests.HTTPError as error:
                if error.response.status_code != 500:
                    raise
                # An update whose trainer died in the middle of it is still open.
                self._request("POST", "finish_weight_update")
                self._request("POST", "start_weight_update")

    def _post(self, path: str, json: dict | None = None) -> None:
        if self.failure.done():
            return
        with self._keeping_failures():
            try:
                self._request("POST", path, json)
            except requests.HTTPError:
                if path == "update_weights":
                    self._discard_update()
                raise

    def _discard_update(self) -> None:
        """End an update that failed: the next one would take what was loaded of it for its own."""
        with suppress(requests.RequestException):
            self._request("POST", "start_weight_update")
            self._request("POST", "finish_weight_update")

    def _request(self, method: str, path: str, json: dict | None = None) -> requests.Response:
        # A session of its own: a server may close an idle connection at any moment.
        with requests.Session() as session:
            session.trust_env = False  # neither a proxy nor a .netrc is meant for servers
            url = f"{self.base_url}/{path}"
            response = session.request(method, url, json=json, headers=self.headers, timeout=self.timeout)
        response.raise_for_status()
        return response

    @contextmanager
    def _keeping_failures(self) -> Iterator[None]:
        try:
            yield
        except requests.HTTPError as error:
            said = error.response
            self.fail(ServerError(f"status_{said.status_code}", f"{said.request.path_url}: {said.text[:300]}"))
        except requests.Timeout:
            self.fail(ServerError("late", f"a call took more than {self.timeout:g} s (rollout.sync_timeout)"))
        except requests.RequestException as error:
            self.fail(ServerError("unreachable", str(error)))


class VLLMSource(VLLMWeightSource):
    """Our weights through vLLM's interface: the same names, shapes and order in both of its channels."""

    def __init__(self, source: WeightSource):
        self.source = source

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(entry.name, self.source.dtype, tuple(entry.shape)) for entry in self.source.entries]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for bucket in self.source.buckets():
            yield from bucket


class GuardedGroup:
    """The NCCL communicator of one server. Once the server has failed it is aborted, and broadcasts do nothing.

    NCCL itself waits for a lost peer for ever; to abort the communicator ends that.
    """

    def __init__(self, group: Any, control: SyncClient):
        self.group = group
        self.control = control
        control.failure.add_done_callback(lambda _: group.destroy())

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        if self.control.failure.done():
            return
        try:
            self.group.broadcast(tensor, src=src, stream=stream)
        except RuntimeError as error:
            self.control.fail(ServerError("nccl", str(error)))


class ServerLink:
    """This rank's side of one server's weight transfer.

    Args:
        backend: `ipc` or `nccl`.
        rank, world_size: This trainer process's place; the first one sends.
        client: On the first rank.
        timeout: Seconds for each call of the server.
    """

    def __init__(
        self, source: WeightSource, backend: str, rank: int, world_size: int, client: Client | None, timeout: float
    ):
        self.source = source
        self.backend = backend
        self.rank = rank
        self.world_size = world_size
        self.timeout = timeout
        self.control = None if client is None else SyncClient(client, timeout)
        self.engine: Any = None

    @property
    def error(self) -> ServerError | None:
        """Why the server is lost, if it is; known on the first rank."""
        failed = self.control is not None and self.control.failure.done()
        return self.control.failure.result() if failed else None

    def join(self) -> None:
        """Meet the server. No collective."""
        if self.control is None:
            self.engine = self._init(self._info("", 0, 0))
            return
        workers = self.control.world_size()
        if self.error is not None:
            return
        info = self._info(address_towards(urlsplit(self.control.base_url).hostname), free_port(), 1 + workers)
        if self.backend == "ipc":
            self.engine = self._init(info)
            return
        # NCCL waits for ever for a worker that does not come, so it is left waiting in a thread. The first rank's
        # device is the first one, which is a new thread's.
        joined: Future = Future()
        threading.Thread(target=self._join_nccl, args=(info, joined), daemon=True).start()
        wait([joined, self.control.failure], self.timeout, FIRST_COMPLETED)
        if self.error is None and not joined.done():
            self.control.fail(ServerError("late", f"it did not join the NCCL group within {self.timeout:g} s"))
        if self.error is None:
            self.engine = joined.result()
            self.engine.model_update_group = GuardedGroup(self.engine.model_update_group, self.control)

    def send(self) -> None:
        """Send the weights. A collective."""
        try:
            self.engine.send_weights()
        except RuntimeError as error:
            if self.world_size > 1:  # the others wait for this rank within the send: it has to end, and they with it
                raise
            self.control.fail(ServerError(self.backend, str(error)))

    def close(self) -> None:
        if self.control is not None:
            self.control.fail(ServerError("gone", "it is not used any more"))
        if self.engine is not None:
            self.engine.shutdown()

    def _info(self, address: str, port: int, world_size: int) -> TrainerInitInfo:
        sizes = [entry.shape.numel() * self.source.dtype.itemsize for entry in self.source.entries]
        return init_info(self.backend, self.rank, address, port, world_size, max(PACKED_BYTES, *sizes))

    def _init(self, info: TrainerInitInfo) -> Any:
        return WeightTransferTrainerFactory.trainer_init(info, client=self.control, source=VLLMSource(self.source))

    def _join_nccl(self, info: TrainerInitInfo, joined: Future) -> None:
        try:
            joined.set_result(self._init(info))
        except RuntimeError as error:
            self.control.fail(ServerError("nccl", str(error)))


def init_info(
    backend: str, rank: int, address: str, port: int, world_size: int, packed_bytes: int = PACKED_BYTES
) -> TrainerInitInfo:
    """How the trainer's side of `backend` introduces itself. Packed: few large transfers instead of many small."""
    packing = {"packed": True, "packed_buffer_size_bytes": packed_bytes}
    if backend == "ipc":
        return IPCTrainerInitInfo(rank=rank, **packing)
    return NCCLTrainerInitInfo(rank=rank, master_address=address, master_port=port, world_size=world_size, **packing)
