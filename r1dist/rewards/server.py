"""Rewards that ask a server over HTTP: how it is asked, and what becomes of its failures."""

import json
import os
import re
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from ..errors import RewardFailed, UserError, VerifiersBroken
from .function import RewardFunction

LATER = {408, 425, 429}
"""HTTP statuses below 500 that say: later."""
VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
SHOWN = 300
"""Most characters of a server's words in a message."""


class ServerDown(Exception):
    """The server does not answer, or cannot now. `retry_after`: seconds that it asks to wait."""

    def __init__(self, message: str, retry_after: float = 0.0):
        super().__init__(message)
        self.retry_after = retry_after


class Refused(Exception):
    """The server says that the request is wrong: it would say so again."""


class NoScore(Exception):
    """The server has answered, and the answer holds no score."""


class ServerReward(RewardFunction):
    """A reward by `ask(completion, row)`, which asks a server."""

    retries = 6  # 45 seconds in all, in which a server may come up again
    otherwise = "take it out of the rubric"

    def __init__(self, name: str, ask: Callable):
        super().__init__(name, name, ask)

    def failed(self, rows: list[dict], error: BaseException) -> Exception:
        """What to raise: `VerifiersBroken` where the server is down, `NoScore` for an answer without a score."""
        about = f"{self._about(rows)}: {error}"
        if isinstance(error, ServerDown | TimeoutError):
            return VerifiersBroken(f"{about}.")
        if isinstance(error, Refused):
            return RewardFailed(f"{about}.")
        if isinstance(error, NoScore):
            return error
        return super().failed(rows, error)


class Endpoint:
    """Where the reward `name` asks.

    Args:
        url: Without the path of a request.
        api_key_env: The variable of the environment that holds the key; None: no key is sent.

    Raises `UserError` for an address that is none, and where the variable is missing. Nothing is asked yet.
    """

    def __init__(self, name: str, url: str, api_key_env: str | None):
        parts = urlsplit(url)
        if parts.username or parts.password:
            raise UserError(f"rewards.{name}: `url` holds a password; take it out, and name a key by `api_key_env`.")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise UserError(f"rewards.{name}: `url` {url} is not the address of a server, http://host:port/....")
        self.url = url.rstrip("/")
        self._key = None if api_key_env is None else _key(name, api_key_env)

    async def post(self, path: str, body: dict) -> Any:
        """The answer's JSON. Raises `ServerDown` and `Refused`. It is for the caller to set a time limit."""
        import aiohttp  # nothing for a pool's workers to import

        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session,
                # Followed, a redirect would carry the completion, if not the key, to another host.
                session.post(self.url + path, json=body, headers=headers, allow_redirects=False) as response,
            ):
                text = (await response.read()).decode(errors="replace")
        except (aiohttp.ClientError, OSError) as error:
            if isinstance(error, TimeoutError):
                raise
            raise ServerDown(f"{self.url}{path} does not answer: {error or type(error).__name__}") from error
        status = response.status
        said = f"{self.url}{path} answers with status {status}: {self._shown(text)}"
        if status in LATER or status >= 500:
            raise ServerDown(said, _seconds(response.headers.get("Retry-After")))
        if status != 200:
            raise Refused(said)
        try:
            return json.loads(text)
        except ValueError as error:
            raise ServerDown(f"{self.url}{path} answers what is no JSON: {self._shown(text)}") from error

    def _shown(self, text: str) -> str:
        text = text if self._key is None else text.replace(self._key, "***")
        return shortened(text) or "nothing"


def shortened(text: str) -> str:
    """A server's words in one line of a message."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}..."


def _key(name: str, variable: str) -> str:
    # What it holds is not shown before it is sure to be a name: it may be the key, by mistake.
    if not VARIABLE.fullmatch(variable):
        raise UserError(
            f"rewards.{name}: `api_key_env` must be the name of a variable of the environment, in capitals, never the "
            "key itself."
        )
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(
            f"rewards.{name}: the environment has no variable {variable}, which `api_key_env` names.\n"
            f"Set it to the server's key where the run is started, or leave `api_key_env` out."
        )
    return key


def _seconds(retry_after: str | None) -> float:
    """The seconds that the header asks for, which is a number or a date; 0 where it says nothing."""
    if retry_after is None:
        return 0.0
    if re.fullmatch(r"\d+(\.\d+)?", retry_after.strip()):
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0
