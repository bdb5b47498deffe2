"""The demo beside an earlier checkout's: `python bench/demo.py PATH [--seed 0]`.

`make demo` of this checkout and of PATH, in this environment, take turns at each RL stage and what it needs. Each goes
on from its runs/tiny, so an interrupted bench does, too: remove that folder first to measure all of it. Seconds are
those of the stages and their evaluations in the manifests. Of a stage that was cut off they are those of its last
start, so remove its folder before it goes on. Progress goes to stderr; the last line on stdout is JSON.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import yaml
from result import aim, show

ROOT = Path(__file__).resolve().parents[1]
PIPELINE = "configs/recipes/tiny/pipeline.yaml"
RUN = "runs/tiny"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    checkouts = {"now": ROOT, "before": options.before.resolve()}
    stages = yaml.safe_load((ROOT / PIPELINE).read_text())["stages"]
    turns = [["--until", stage["name"]] for stage in stages if stage["kind"] == "grpo"]
    for turn in [*turns, []]:
        for checkout in checkouts.values():
            run_demo(checkout, ["--seed", str(options.seed), *turn])
    seconds = {name: seconds_by_step(checkout) for name, checkout in checkouts.items()}
    scores = {name: scores_by_stage(checkout) for name, checkout in checkouts.items()}
    ratio = sum(seconds["now"].values()) / sum(seconds["before"].values())
    goals = json.loads((ROOT / RUN / "summary.json").read_text())["goals"]
    show(
        "demo", {"demo_ratio": aim(ratio, 0.5, "lower")}, table=table(seconds, scores),
        minutes={name: sum(steps.values()) / 60 for name, steps in seconds.items()},
        goals_met=sum(goal["met"] for goal in goals), goals=len(goals),
    )  # fmt: skip


def run_demo(checkout: Path, arguments: list[str]) -> None:
    command = [sys.executable, "launch/pipeline.py", "--config", PIPELINE, *arguments]
    env = {**os.environ, "PYTHONPATH": str(checkout)}
    subprocess.run(command, cwd=checkout, env=env, stdout=sys.stderr, check=True)


def seconds_by_step(checkout: Path) -> dict[str, float]:
    steps = json.loads((checkout / RUN / "manifest.json").read_text())["steps"]
    return {name: record["seconds"] for name, record in steps.items()}


def scores_by_stage(checkout: Path) -> dict[str, dict]:
    """Greedy, of the stages that answer."""
    stages = json.loads((checkout / RUN / "summary.json").read_text())["stages"]
    return {stage["name"]: stage["eval"] for stage in stages if "eval" in stage}


def table(seconds: dict[str, dict[str, float]], scores: dict[str, dict[str, dict]]) -> list[list[str]]:
    rows = [["step", "seconds", "before", "ratio", "accuracy", "before"]]
    for step, took in seconds["now"].items():
        stage = step.removesuffix(".evaluation")
        shown = [accuracy(of[stage]) if stage != step else "" for of in (scores["now"], scores["before"])]
        before = seconds["before"][step]
        rows.append([step, f"{took:.0f}", f"{before:.0f}", f"{took / before:.2f}", *shown])
    return rows


def accuracy(scores: dict) -> str:
    low, high = scores["ci95"]
    return f"{scores['accuracy']:.1%} [{low:.1%}, {high:.1%}]"


if __name__ == "__main__":
    main()
