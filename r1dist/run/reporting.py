"""How the parts of a run report, without knowing the trainer."""

from collections.abc import Callable
from dataclasses import dataclass

from .clock import PhaseClock


@dataclass(frozen=True)
class Reporting:
    """Passed down from the trainer."""

    log: Callable[[str, float], None]
    """Called with the name and the value of a metric."""
    heartbeat: Callable[[], None]
    """Called on every sign of progress."""
    clock: PhaseClock
