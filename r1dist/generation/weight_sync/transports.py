"""The ways for weights to reach the servers, seen from the trainer.

`publish` is called on every rank after an optimizer step; `give` on the first rank for one server, whenever
that server does not hold what was published last.
"""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from ..ports import address_towards, free_port
from ..vllm.client import Client, ServerError
from .files import write_folder
from .scratch import own_folder, sweep
from .source import WeightSource


class Transport(Protocol):
    """Carries the weights of one `WeightSource` to servers."""

    def publish(self, label: str, clients: list[Client]) -> None:
        """Make the current weights available as `label`. A collective; `clients` are the first rank's."""

    async def give(self, client: Client, label: str, timeout: float, still: bool) -> None:
        """Bring one server to `label`, its caches of the old weights dropped; raises `ServerError`.

        `still`: the trainer waits for rollouts, so its own weights can be read right now.
        """

    def close(self) -> None:
        """Remove what is left lying about."""


async def begin_and_finish(client: Client, label: str, update: dict, timeout: float) -> None:
    """One update of vLLM's weights in its three calls, then the old weights' cache dropped."""
    try:
        await client.call("POST", "/start_weight_update", timeout=timeout)
    except ServerError as error:
        if error.kind != "status_500":
            raise
        # An update whose trainer died in the middle of it is still open.
        await client.call("POST", "/finish_weight_update", timeout=timeout)
        await client.call("POST", "/start_weight_update", timeout=timeout)
    await client.call("POST", "/update_weights", {"update_info": update}, timeout=timeout)
    await client.call("POST", "/finish_weight_update", timeout=timeout)
    await name_weights(client, label, timeout)


async def name_weights(client: Client, label: str, timeout: float) -> None:
    """Drop what was computed with the old weights, and only then say that the new ones are there."""
    dropped = await client.call("POST", "/reset_prefix_cache?reset_running_requests=true", timeout=timeout)
    if dropped != {"success": True}:
        raise ServerError("cache", "the old weights' prefix cache cannot be dropped")
    await client.call("POST", "/update_weight_version", {"new_version": label}, timeout=timeout)


class FileTransport:
    """`shm`: written once by the first rank, loaded by each server, also by one that comes back later.

    Args:
        source: The weights.
        folder: Memory of this machine (`/dev/shm`), or a folder that the servers' machines share.
        writes: Whether this rank writes.
    """

    def __init__(self, source: WeightSource, folder: Path, writes: bool):
        self.source = source
        self.writes = writes
        self.root = own_folder(folder)
        self.digest = ""
        if writes:
            sweep(folder)
            self.root.mkdir(mode=0o700, parents=True)

    def publish(self, label: str, clients: list[Client]) -> None:
        if not self.writes:
            for _ in self.source.buckets(wanted=False):
                pass
            return
        former = list(self.root.iterdir())
        self.digest = write_folder(self.root / label, self.source.buckets())
        for folder in former:
            shutil.rmtree(folder)

    async def give(self, client: Client, label: str, timeout: float, still: bool) -> None:
        update = {"folder": str(self.root / label), "digest": self.digest}
        await begin_and_finish(client, label, update, timeout)

    def close(self) -> None:
        if self.writes:
            shutil.rmtree(self.root, ignore_errors=True)


class GPUTransport:
    """`ipc` and `nccl`: vLLM's own engines, one for each server, so that a dead one does not stop the others.

    Simplified: the weights are gathered once for each server. A server that comes back between two syncs is
    given them at once by a single trainer process, and at the next sync by several, since sending is a
    collective and the weights are in no file.

    Args:
        source: The weights.
        backend: `ipc` or `nccl`.
        rank, world_size: This trainer process's place; the first one sends.
        broadcast: Gives every rank the first one's value.
    """

    def __init__(self, source: WeightSource, backend: str, rank: int, world_size: int, broadcast: Callable):
        self.source = source
        self.backend = backend
        self.rank = rank
        self.world_size = world_size
        self.broadcast = broadcast
        self.engines: dict[str, Any] = {}

    def publish(self, label: str, clients: list[Client]) -> None:
        by_url = {client.url: client for client in clients}
        urls = self.broadcast(list(by_url))
        for url in self.engines.keys() - set(urls):
            del self.engines[url]
        for url in urls:
            self._send(url, by_url.get(url))

    async def give(self, client: Client, label: str, timeout: float, still: bool) -> None:
        if client.url not in self.engines:
            if not (still and self.world_size == 1):
                raise ServerError("waiting", f"it is given weights over {self.backend} at the next sync")
            await asyncio.to_thread(self._send, client.url, client)
        await name_weights(client, label, timeout)

    def close(self) -> None:
        for engine in self.engines.values():
            engine.shutdown()

    def _send(self, url: str, client: Client | None) -> None:
        if url not in self.engines:
            self.engines[url] = self._join(client)
        self.engines[url].send_weights()

    def _join(self, client: Client | None) -> Any:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        from .gpu import SyncClient, VLLMSource, init_info

        control = None if client is None else SyncClient(client)
        workers = self.broadcast(None if control is None else control.world_size())
        address = self.broadcast(None if client is None else address_towards(urlsplit(client.url).hostname))
        port = self.broadcast(None if client is None else free_port())
        info = init_info(self.backend, self.rank, address, port, 1 + workers)
        return WeightTransferTrainerFactory.trainer_init(info, client=control, source=VLLMSource(self.source))
