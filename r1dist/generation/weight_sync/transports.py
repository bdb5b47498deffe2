"""The ways for weights to reach the servers, seen from the trainer.

`publish` is called on every rank after an optimizer step; `give` on the first rank for one server, whenever
that server does not hold what was published last.
"""

import asyncio
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..vllm.client import Client, ServerError
from .files import write_folder
from .scratch import own_folder, sweep
from .source import WeightSource

if TYPE_CHECKING:
    from .gpu import ServerLink

LOCK_SECONDS = 1.0


class Transport(Protocol):
    """Carries the weights of one `WeightSource` to servers."""

    def publish(self, label: str, clients: list[Client]) -> dict[str, ServerError]:
        """Make the current weights available as `label`. A collective; `clients` are the first rank's.

        Returns, on the first rank, why servers could not be given them, by URL.
        """

    async def give(self, client: Client, label: str, timeout: float, weights: threading.Lock) -> None:
        """Bring one server to the weights of `label`; raises `ServerError`.

        `weights`: Held by the trainer, except while it waits for rollouts: who holds it may read its weights.
        """

    def close(self) -> None:
        """Remove what is left lying about."""


async def begin_and_finish(client: Client, update: dict, timeout: float) -> None:
    """One update of vLLM's weights in its three calls."""
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

    def publish(self, label: str, clients: list[Client]) -> dict[str, ServerError]:
        if not self.writes:
            for _ in self.source.buckets(wanted=False):
                pass
            return {}
        former = list(self.root.iterdir())
        self.digest = write_folder(self.root / label, self.source.buckets())
        for folder in former:
            shutil.rmtree(folder)
        return {}

    async def give(self, client: Client, label: str, timeout: float, weights: threading.Lock) -> None:
        update = {"folder": str(self.root / label), "digest": self.digest}
        await begin_and_finish(client, update, timeout)

    def close(self) -> None:
        if self.writes:
            shutil.rmtree(self.root, ignore_errors=True)


class GPUTransport:
    """`ipc` and `nccl`: vLLM's own engines, one for each server, so that a dead one does not stop the others.

    Simplified: the weights are gathered once for each server. A server that comes back between two syncs is given
    them by a single trainer process as soon as that waits for rollouts, and at the next sync by several, since
    sending is a collective and the weights are in no file.

    Args:
        source: The weights.
        backend: `ipc` or `nccl`.
        rank, world_size: This trainer process's place; the first one sends.
        broadcast: Gives every rank the first one's value.
        timeout: Seconds for each call by which a server takes new weights.
    """

    def __init__(
        self, source: WeightSource, backend: str, rank: int, world_size: int, broadcast: Callable, timeout: float
    ):
        self.source = source
        self.backend = backend
        self.rank = rank
        self.world_size = world_size
        self.broadcast = broadcast
        self.timeout = timeout
        self.links: dict[str, ServerLink] = {}
        """By URL; the same servers on every rank."""

    def publish(self, label: str, clients: list[Client]) -> dict[str, ServerError]:
        by_url = {client.url: client for client in clients}
        urls = self.broadcast(list(by_url))
        for url in self.links.keys() - set(urls):
            self.links.pop(url).close()
        errors = {url: self._send(url, by_url.get(url)) for url in urls}
        return {url: error for url, error in errors.items() if error is not None}

    async def give(self, client: Client, label: str, timeout: float, weights: threading.Lock) -> None:
        if client.url in self.links:
            return
        if self.world_size > 1:
            raise ServerError("waiting", f"it is given weights over {self.backend} at the next sync")
        await asyncio.to_thread(self._send_while_still, client, weights)

    def close(self) -> None:
        for link in self.links.values():
            link.close()

    def _send_while_still(self, client: Client, weights: threading.Lock) -> None:
        if not weights.acquire(timeout=LOCK_SECONDS):
            raise ServerError("waiting", "it is given weights once the trainer waits for rollouts")
        try:
            # A sync may have come first.
            error = None if client.url in self.links else self._send(client.url, client)
        finally:
            weights.release()
        if error is not None:
            raise error

    def _send(self, url: str, client: Client | None) -> ServerError | None:
        """Send one server the weights; returns, on the first rank, why that failed. A collective."""
        link = self.links.get(url) or self._new_link(client)
        stages = [link.send] if url in self.links else [link.join, link.send]
        self.links[url] = link
        for stage in stages:
            stage()
            if self.broadcast(link.error is not None):  # then every rank forgets it
                self.links.pop(url).close()
                return link.error
        return None

    def _new_link(self, client: Client | None) -> "ServerLink":
        from .gpu import ServerLink

        return ServerLink(self.source, self.backend, self.rank, self.world_size, client, self.timeout)
