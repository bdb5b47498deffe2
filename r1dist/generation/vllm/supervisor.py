"""Starts vLLM servers, restarts them when they fail, and stops them when it ends.

For the shell by `launch/serve.py`; for a run by `ManagedServers`, which stops them when the run ends.
"""

import asyncio
import dataclasses
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import aiohttp

from ...config import Serve
from ...errors import RunStopped
from ...logs import set_up_logging
from ..ports import free_port
from ..weight_sync.scratch import sweep
from .client import Client, ServerError, open_session
from .command import command, environment
from .endpoints import Endpoints, Server, read, write
from .liveness import Liveness

logger = logging.getLogger("r1dist.servers")

ANY_HOST = "0.0.0.0"
TICK = 0.5
FIRST_STARTS = 2
"""Times that a server is started that has never come up: another process may have taken its port."""
STEADY_SECONDS = 60
"""Seconds without a fault after which a server's back-off is reset."""
REFUSING_SECONDS = 3
"""Seconds in which a server that refuses connections may still be shutting down."""
LONGEST_BACK_OFF = 30
FAREWELL_SECONDS = 4


class Replica:
    """One server process and its record in the endpoints file."""

    def __init__(self, number: int, folder: Path):
        self.record = Server(f"server{number}")
        self.number = number
        self.log = folder / f"server{number}.log"
        self.process: subprocess.Popen | None = None
        self.was_up = False

    def kill(self, signal_number: int) -> None:
        """To the whole process group: vLLM's engine and workers are separate processes."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal_number)

    def ending(self) -> str:
        """How the process ended."""
        code = self.process.returncode
        return f"killed by signal {-code}" if code < 0 else f"ended with code {code}: {self.last_words()}"

    def last_words(self) -> str:
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line]
        return (errors or lines)[-1][-300:]


class Supervisor:
    """Keeps `serve.replicas` servers of `model` running and the endpoints file current.

    Args:
        serve: The servers' configuration.
        model: What they load at first.
        transport: How they will be given weights.
        path: The endpoints file; the servers' logs are in the same folder.
        owner: Process with which the servers end; None for launch/serve.py.
        scratch: Where the owner writes weights. What it left there is removed at the end: killed, it cannot.
        token: What the servers ask for; None to make one.
    """

    def __init__(
        self, serve: Serve, model: str, transport: str, path: Path, owner: int | None = None, scratch: str = "",
        token: str | None = None,
    ):  # fmt: skip
        self.serve = serve
        self.model = model
        self.path = path
        self.owner = owner
        self.scratch = scratch
        path.parent.mkdir(parents=True, exist_ok=True)
        self.replicas = [Replica(number, path.parent) for number in range(serve.replicas)]
        self.endpoints = Endpoints([r.record for r in self.replicas], transport, token or secrets.token_urlsafe(32))

    async def run(self) -> None:
        """Until SIGTERM, SIGINT or the owner's end. Raises `RunStopped` if none of the servers can be started."""
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        self._publish()
        async with open_session() as session:
            keepers = [asyncio.create_task(self._monitor(replica, session)) for replica in self.replicas]
            try:
                while not stop.is_set() and (self.owner is None or os.getppid() == self.owner):
                    if all(keeper.done() for keeper in keepers):
                        raise RunStopped("no server could be started. " + self._told())
                    with suppress(TimeoutError):
                        await asyncio.wait_for(stop.wait(), TICK)
            finally:
                for keeper in keepers:
                    keeper.cancel()
                self._end()
        self.path.unlink()

    async def _monitor(self, replica: Replica, session: aiohttp.ClientSession) -> None:
        """Start it, again and again with a growing pause; returns if it never comes up at all."""
        record, faults = replica.record, 0
        while True:
            client = Client(session, self._start(replica), self.endpoints.token)
            record.error = await self._coming_up(replica, client)
            if record.error is None:
                replica.was_up, record.state, up_since = True, "ready", time.monotonic()
                self._publish()
                logger.info("%s is up at %s", record.name, record.url)
                record.error = await self._fault(replica, client)
                faults = 0 if time.monotonic() - up_since > STEADY_SECONDS else faults
            replica.kill(signal.SIGKILL)
            replica.process.wait()
            gives_up = not replica.was_up and record.starts >= FIRST_STARTS
            record.state, record.pid = "failed" if gives_up else "starting", None
            self._publish()
            if gives_up:
                return
            logger.warning("%s is started again: %s", record.name, record.error)
            await asyncio.sleep(min(LONGEST_BACK_OFF, 2**faults) if faults else 0)
            faults += 1

    def _start(self, replica: Replica) -> str:
        """Start the process; gives its URL."""
        record, port = replica.record, free_port(self.serve.host)
        words = command(self.serve, self.model, self.endpoints.transport, port)
        variables = environment(self.serve, replica.number, self.endpoints.transport, self.endpoints.token, os.environ)
        with replica.log.open("a") as log:
            print(time.strftime("%H:%M:%S"), *words, file=log, flush=True)
            replica.process = subprocess.Popen(
                words, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        record.url = f"http://{socket.gethostname() if self.serve.host == ANY_HOST else self.serve.host}:{port}"
        record.pid, record.starts = replica.process.pid, record.starts + 1
        return record.url

    async def _coming_up(self, replica: Replica, client: Client) -> str | None:
        """None as soon as it answers, else what kept it from that."""
        deadline = time.monotonic() + self.serve.start_timeout
        while time.monotonic() < deadline:
            if replica.process.poll() is not None:
                return replica.ending()
            with suppress(ServerError):
                await client.health(timeout=5)
                return None
            await asyncio.sleep(TICK)
        return f"not up after {self.serve.start_timeout:g} s: {replica.last_words()}"

    async def _fault(self, replica: Replica, client: Client) -> str:
        """Waits until the process ends, or for `hang_timeout` seconds does not answer or compute."""
        liveness, heard = Liveness(client, self.serve.hang_timeout), time.monotonic()
        while True:
            if replica.process.poll() is not None:
                return replica.ending()
            try:
                await liveness.probe(timeout=5)
                heard = time.monotonic()
            except ServerError as error:
                if error.kind == "hung":
                    return str(error)
                patience = REFUSING_SECONDS if error.kind == "unreachable" else self.serve.hang_timeout
                if time.monotonic() - heard > patience:
                    return f"did not answer for {patience:g} s ({error})"
            await asyncio.sleep(TICK)

    def _publish(self) -> None:
        write(self.path, self.endpoints)

    def _told(self) -> str:
        return "; ".join(f"{r.record.name}: {r.record.error} ({r.log})" for r in self.replicas)

    def _end(self) -> None:
        for replica in self.replicas:
            replica.kill(signal.SIGTERM)
        deadline = time.monotonic() + FAREWELL_SECONDS
        for replica in self.replicas:
            if replica.process is not None:
                with suppress(subprocess.TimeoutExpired):
                    replica.process.wait(max(0.0, deadline - time.monotonic()))
            replica.kill(signal.SIGKILL)
        if self.scratch:
            sweep(Path(self.scratch))


class ManagedServers:
    """The supervisor of a run's own servers, as a child process of the run's first rank.

    Args:
        serve, model, transport: See `Supervisor`.
        folder: Where the endpoints file and the logs are written.
        scratch: See `Supervisor`.
    """

    def __init__(self, serve: Serve, model: str, transport: str, folder: Path, scratch: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = endpoints_path(folder)
        self.path.unlink(missing_ok=True)  # of a run that was killed
        self.transport = transport
        settings = {
            "serve": dataclasses.asdict(serve),
            "model": model,
            "transport": transport,
            "path": str(self.path),
            "owner": os.getpid(),
            "scratch": scratch,
        }
        with (folder / "supervisor.log").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", __name__, json.dumps(settings)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def wait(self) -> None:
        """Wait until each server is up or has failed for good."""
        while self.process.poll() is None:
            if self.path.exists() and all(server.state != "starting" for server in read(self.path).servers):
                return
            time.sleep(TICK)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def endpoints_path(folder: Path) -> Path:
    return folder / "endpoints.json"


def main(settings: str) -> None:
    """Run a supervisor from `ManagedServers`' JSON."""
    values = json.loads(settings)
    set_up_logging(logging.INFO)
    supervisor = Supervisor(**{**values, "serve": Serve(**values["serve"]), "path": Path(values["path"])})
    asyncio.run(supervisor.run())


if __name__ == "__main__":
    main(sys.argv[1])
