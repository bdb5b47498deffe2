"""Seconds and idle processors by phase."""

from types import SimpleNamespace

import pytest

from r1dist.run import clock as module
from r1dist.run.clock import PhaseClock


def test_inner_phases_are_taken_out_and_idle_is_a_share_of_all_processors(monkeypatch):
    now = {"seconds": 0.0, "idle": 0.0, "iowait": 0.0}
    monkeypatch.setattr(module.time, "perf_counter", lambda: now["seconds"])
    monkeypatch.setattr(module.os, "cpu_count", lambda: 4)
    cpu_times = lambda: SimpleNamespace(idle=now["idle"], iowait=now["iowait"])  # noqa: E731
    monkeypatch.setattr(module.psutil, "cpu_times", cpu_times)

    def passes(seconds: float, idle: float, iowait: float = 0.0) -> None:
        now["seconds"] += seconds
        now["idle"] += idle
        now["iowait"] += iowait

    clock = PhaseClock()
    passes(7, 20)  # outside of any phase
    with clock.phase("train"):
        passes(2, 2)
        with clock.phase("save"):
            passes(1, 1, 3)
        passes(2, 6)
    expected = {"seconds/train": 4.0, "idle/train": 0.5, "seconds/save": 1.0, "idle/save": 1.0}
    assert clock.take() == pytest.approx(expected)
    clock.start("train")
    passes(1, 0)
    assert clock.take() == pytest.approx({"seconds/train": 1.0, "idle/train": 0.0})
