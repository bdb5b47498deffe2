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
    """What figures depend on; it names nobody's host."""
    import torch  # here: workers that verify import what their bench imports

    memory = psutil.virtual_memory().total / 2**30
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join([platform.machine(), f"{os.cpu_count()} cores", f"{memory:.0f} GiB", *gpus])


def significant(value: float) -> float:
    """Four digits of it."""
    return float(f"{value:.4g}")
