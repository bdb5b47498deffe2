"""The endpoints file: where the servers are, how they take weights, and the token that they ask for."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...config import Rollout
from ...errors import UserError
from ...files import write_json

OWNER_ONLY = 0o600
"""The file holds the token, and whoever has the token can run code in the servers."""


@dataclass
class Server:
    """One server, in the state that its supervisor last wrote."""

    name: str
    url: str | None = None
    state: Literal["starting", "ready", "failed"] = "starting"
    """`failed`: it never came up, and is not tried again."""
    starts: int = 0
    pid: int | None = None
    error: str | None = None
    """Why it last went away."""


@dataclass
class Endpoints:
    """All servers of one group. `transport` was fixed when they were started."""

    servers: list[Server]
    transport: str
    token: str | None = None


def write(path: Path, endpoints: Endpoints) -> None:
    write_json(path, dataclasses.asdict(endpoints), mode=OWNER_ONLY)


def read(path: Path) -> Endpoints:
    """Raises `UserError` if there is no such file, or it is not an endpoints file."""
    try:
        tree = json.loads(path.read_text())
        return Endpoints(**{**tree, "servers": [Server(**server) for server in tree["servers"]]})
    except FileNotFoundError as error:
        raise UserError(f"rollout.servers: there is no file {path}. launch/serve.py writes it.") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"rollout.servers: {path} is not an endpoints file of launch/serve.py ({error}).") from error


def token_of(path: str, field: str) -> str:
    """The token in the file that `field` names; raises `UserError` if there is none."""
    try:
        return Path(path).read_text().strip()
    except FileNotFoundError as error:
        raise UserError(f"{field}: there is no file {path}.") from error


class ServerRegistry:
    """The servers of a run, as `rollout.servers` names them; a file is read again whenever it changes."""

    def __init__(self, rollout: Rollout, managed: Path | None):
        by_url = rollout.servers.startswith(("http://", "https://"))
        self._given = _of_urls(rollout) if by_url else None
        self._files = [_File(managed or Path(name.strip())) for name in rollout.servers.split(",")]

    def read(self) -> Endpoints:
        """Raises `UserError` as long as there has never been a file to read, and for files that do not agree."""
        if self._given is not None:
            return self._given
        groups = [file.read() for file in self._files]
        if len(groups) == 1:
            return groups[0]
        first = groups[0]
        if any((group.transport, group.token) != (first.transport, first.token) for group in groups):
            raise UserError(
                "rollout.servers: these endpoints files differ in transport or token. Start all of their servers with "
                "the same `launch/serve.py --transport` and `--token_file`."
            )
        servers = [
            dataclasses.replace(server, name=f"{file.path.stem}/{server.name}")
            for file, group in zip(self._files, groups, strict=True)
            for server in group.servers
        ]
        return Endpoints(servers, first.transport, first.token)


class _File:
    """An endpoints file, as it was when it last changed."""

    def __init__(self, path: Path):
        self.path = path
        self._seen: int | None = None
        self._endpoints: Endpoints | None = None

    def read(self) -> Endpoints:
        stamp = self.path.stat().st_mtime_ns if self.path.exists() else None
        if stamp is None and self._endpoints is not None:
            for server in self._endpoints.servers:
                server.state, server.error = "starting", f"{self.path} is gone"
        elif self._endpoints is None or stamp != self._seen:
            self._seen, self._endpoints = stamp, read(self.path)
        return self._endpoints


def _of_urls(rollout: Rollout) -> Endpoints:
    urls = [url.strip().rstrip("/") for url in rollout.servers.split(",")]
    token = None if rollout.token_file is None else token_of(rollout.token_file, "rollout.token_file")
    if rollout.transport == "auto":
        raise UserError(
            "rollout.transport: `auto` cannot know how servers given by URL were started.\n"
            "Set it to their --weight-transfer-config backend (shm, ipc or nccl), or give launch/serve.py's file."
        )
    return Endpoints([Server(url, url, "ready") for url in urls], rollout.transport, token)
