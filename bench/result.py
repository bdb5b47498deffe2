"""The form of every bench's result: one JSON object, the last line on stdout. Progress goes to stderr."""

import json
import os
import platform
import statistics
from collections.abc import Sequence
from typing import Any

import psutil


def aim(values: float | Sequence[float], aim: float, better: str) -> dict[str, Any]:
    """A measured figure beside its aim; of several rounds the median counts.

    Args:
        better: `higher` or `lower`.
    """
    rounds = [float(value) for value in values] if isinstance(values, Sequence) else [float(values)]
    found = {"value": significant(statistics.median(rounds)), "aim": aim, "better": better}
    return found | ({"rounds": [significant(value) for value in rounds]} if len(rounds) > 1 else {})


def show(bench: str, aims: dict[str, dict], **more: Any) -> None:
    """Print the result; `more` is whatever else a reader may want of it."""
    print(json.dumps({"bench": bench, "machine": machine(), "aims": aims, **more}))


def machine() -> str:
    memory = psutil.virtual_memory().total / 2**30
    return f"{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB"


def significant(value: float) -> float:
    """Four digits of it."""
    return float(f"{value:.4g}")
