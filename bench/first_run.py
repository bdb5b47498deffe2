"""The first run (`make demo-quick`), measured: `python bench/first_run.py [--seed N]`.

Runs its stages in a fresh folder and reports its minutes, the peak memory of all its processes
together, the gain in greedy accuracy, and the seconds per phase of an RL step from the trainer's own clock.
Alternates nothing: there is one variant. Progress goes to stderr; the last line on stdout is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from result import aim, show

ROOT = Path(__file__).resolve().parents[1]
PIPELINE = "configs/recipes/tiny/pipeline.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    with tempfile.TemporaryDirectory() as folder:
        refusals = [refusal_seconds(Path(folder)) for _ in range(3)]
        output = Path(folder) / "run"
        command = ["launch/pipeline.py", "--config", PIPELINE, "--until", "r1_zero"]
        command += ["--seed", str(seed), "--output_dir", str(output)]
        minutes, peak = run_and_watch([sys.executable, *command])
        summary = json.loads((output / "summary.json").read_text())
        steps = [json.loads(line) for line in (output / "r1_zero" / "metrics.jsonl").read_text().splitlines()]
    base, r1_zero = (stage["eval"] for stage in summary["stages"])
    aims = {
        "demo_minutes": aim(minutes, 8, "lower"),
        "peak_gib": aim(peak / 2**30, 4, "lower"),
        "refusal_seconds": aim(refusals, 2, "lower"),
        "gain_points": aim(100 * (r1_zero["accuracy"] - base["accuracy"]), 60, "higher"),
    }
    show("first_run", aims, seconds_per_step=phase_medians(steps), steps=len(steps) - 1, stages=summary["stages"])


def refusal_seconds(folder: Path) -> float:
    """Seconds until a YAML with a misspelt key is refused."""
    bad = folder / "bad.yaml"
    bad.write_text("model: {path: tiny}\nlerning_rate: 1e-6\n")
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "launch/grpo.py", "--config", str(bad)], cwd=ROOT, capture_output=True)
    assert done.returncode == 2, done.stderr
    return time.perf_counter() - began


def run_and_watch(command: list[str]) -> tuple[float, int]:
    """Minutes and the peak of the proportional set size (bytes) of the process and all its children."""
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, cwd=ROOT, stdout=sys.stderr)
    while process.poll() is None:
        peak = max(peak, sum(proportional_size(p) for p in family(process.pid)))
        time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"the demo failed with exit code {process.returncode}")
    return (time.perf_counter() - began) / 60, peak


def family(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def proportional_size(process: psutil.Process) -> int:
    """Shared pages are divided among those who share them; a process that has just ended holds none."""
    try:
        return process.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def phase_medians(steps: list[dict]) -> dict[str, float]:
    """Median seconds of each phase over the steps in which it took place, on rank 0."""
    phases = sorted({key for step in steps for key in step if key.startswith("seconds/")})
    return {
        phase.removeprefix("seconds/"): round(statistics.median(step[phase] for step in steps if phase in step), 3)
        for phase in phases
    }


if __name__ == "__main__":
    main()
