"""Whether a server is alive: it answers, and while it has requests its engine computes or tokens arrive."""

import math
import time

from .client import Client, Health, ServerError

LEAST_SHARE = 0.05
"""Of one core: an engine that uses less of it computes nothing. One that waits for a stopped worker uses 0.01."""


class Liveness:
    """One server's, over time.

    A server without our middleware says nothing of its engine: of it only the HTTP answer is known.

    Args:
        patience: Seconds in which an engine that has requests must have computed.
    """

    def __init__(self, client: Client, patience: float):
        self.client = client
        self.patience = patience
        self._idle: tuple[float, Health] | None = None
        """Since when it is not seen to compute, with what it said then."""
        self._before: tuple[float, Health] | None = None
        """The probe before."""
        self.last_computed = -math.inf
        """When a probe last saw that it had computed for requests, on the clock of `time.monotonic`."""

    async def probe(self, timeout: float) -> None:
        """Raises `ServerError`: what `Client.health` raises, or `hung`."""
        health = await self.client.health(timeout)
        now = time.monotonic()
        before, self._before = self._before, (now, health)
        if before is not None and before[1].running and before[1].tokens != health.tokens:
            self.last_computed = now
        # After a pause in which nobody looked, its requests may have just begun.
        watched = before is not None and before[1].running and now - before[0] <= self.patience
        if self._idle is None or not health.running or not watched or self._computed(self._idle[1], health):
            self._idle = now, health
        elif now - self._idle[0] > self.patience:
            raise ServerError(
                "hung",
                f"{health.running} completions run, but for {self.patience:g} s its engine has computed nothing",
            )

    def _computed(self, before: Health, after: Health) -> bool:
        if after.processor_seconds is None or before.processor_seconds is None:
            return True
        used = after.processor_seconds - before.processor_seconds
        # A smaller number is another process's: the server was started anew.
        return after.tokens != before.tokens or not 0 <= used < LEAST_SHARE * self.patience
