"""What rollouts of an older policy cost in what is learnt: `python bench/staleness.py [--seeds 0 1 2] [--steps 60]`.

The tiny recipe's R1-Zero in one process (128 rollouts a step), a vLLM server on another core, for each seed:
on-policy, at most 1 generation ahead, at most 4, and 4 without the clip by the policy that drew the rollouts, the
importance weights alone; for the first seed alone, 4 without any correction. Then it is evaluated.
`one_behind` and `four_behind`: in how many seeds greedy accuracy is within on-policy's 95 % interval or above it; the
interval is of the problems, and other seeds differ by more, as the table shows. Progress goes to stderr.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from result import aim, show

from r1dist.generation.vllm.endpoints import read

ROOT = Path(__file__).resolve().parents[1]
UNCORRECTED = "four_behind_uncorrected"
VARIANTS = {
    "on_policy": [],
    "one_behind": ["--rollout.max_staleness", "1"],
    "four_behind": ["--rollout.max_staleness", "4"],
    "four_behind_unclipped": ["--rollout.max_staleness", "4", "--epsilon", "1e9"],
    UNCORRECTED: [
        "--rollout.max_staleness", "4", "--vllm_importance_sampling_correction", "false"
    ],
}  # fmt: skip
STARTS_WITHIN = 240


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    runs: dict[str, list[dict]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as name, server(Path(name) / "endpoints.json") as endpoints:
        for seed in options.seeds:
            for variant, words in VARIANTS.items():
                if variant == UNCORRECTED and seed != options.seeds[0]:
                    continue
                folder = Path(name) / f"{variant}-{seed}"
                words = [*words, "--seed", str(seed), "--max_steps", str(options.steps)]
                runs[variant].append(run(folder, ["--rollout.servers", str(endpoints), *words]))
                print(f"{variant}, seed {seed}: {runs[variant][-1]}", file=sys.stderr, flush=True)

    def within(variant: str) -> int:
        pairs = zip(runs[variant], runs["on_policy"], strict=True)
        return sum(ours["accuracy"] >= theirs["ci95"][0] for ours, theirs in pairs)

    seeds = len(options.seeds)
    aims = {variant: aim(within(variant), seeds, "higher") for variant in ("one_behind", "four_behind")}
    show("staleness", aims, seeds=options.seeds, steps=options.steps, table=table(options.seeds, runs), runs=runs)


def table(seeds: list[int], runs: dict[str, list[dict]]) -> list[list[str]]:
    """Greedy accuracy with its interval, by variant and seed; how old the rollouts were, and how long a run took.

    Lowest format: the smallest share of well-formed completions in a step, of all seeds, after a third of the steps.
    """
    accuracies = [f"accuracy, seed {seed}" for seed in seeds]
    head = ["rollouts", *accuracies, "mean", "lowest format", "mean staleness", "minutes"]
    rows = []
    for variant, of_seeds in runs.items():
        cells = ["{accuracy:.1%} [{0:.1%}, {1:.1%}]".format(*found["ci95"], **found) for found in of_seeds]
        cells += ["-"] * (len(seeds) - len(cells))
        means = [
            statistics.fmean(found.get(name, 0.0) for found in of_seeds)
            for name in ("accuracy", "rollout/staleness", "minutes")
        ]
        lowest = min(found["lowest_format"] for found in of_seeds)
        more = [f"{means[0]:.1%}", f"{lowest:.1%}", f"{means[1]:.2f}", f"{means[2]:.1f}"]
        rows.append([variant.replace("_", " "), *cells, *more])
    return [head, *rows]


@contextmanager
def server(endpoints: Path) -> Iterator[Path]:
    """One, for all runs."""
    command = [sys.executable, "launch/serve.py", "--model.path", "tiny", "--endpoints", str(endpoints)]
    process = subprocess.Popen([*command, "--dtype", "float32", "--cores", "1"], cwd=ROOT, stdout=sys.stderr)
    try:
        deadline = time.monotonic() + STARTS_WITHIN
        while not (endpoints.exists() and all(found.state == "ready" for found in read(endpoints).servers)):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the server did not come up")
            time.sleep(0.5)
        yield endpoints
    finally:
        process.terminate()
        process.wait()


def on_the_last_core() -> None:
    """The server has the first. Threads that wait for each other on the same core take many times as long."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def run(folder: Path, words: list[str]) -> dict:
    """Train, evaluate; the greedy scores, and what the steps logged."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml"]
    recipe = ["--config", "configs/recipes/tiny/r1_zero.yaml", "--output_dir", str(folder), "--save_strategy", "no"]
    train = [*launcher, "launch/grpo.py", *recipe, "--rollout.engine", "vllm", *words]
    began = time.perf_counter()
    subprocess.run(train, cwd=ROOT, check=True, stdout=sys.stderr, preexec_fn=on_the_last_core)
    minutes = (time.perf_counter() - began) / 60
    scores = folder / "scores.json"
    evaluation = ["--config", "configs/recipes/tiny/evaluate.yaml", "--model.path", str(folder)]
    evaluation += ["--sampling.samples", "1", "--output", str(scores)]
    subprocess.run([sys.executable, "launch/evaluate.py", *evaluation], cwd=ROOT, check=True, stdout=sys.stderr)
    greedy = json.loads(scores.read_text())["greedy"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    logged = {
        name: round(statistics.fmean(line[name] for line in steps if name in line), 4)
        for name in ("rollout/staleness", "sampling/outside_clip/mean", "grad_norm")
        if any(name in line for line in steps)
    }
    late = [line["rewards/format/mean"] for line in steps[len(steps) // 3 :]]
    found = {"accuracy": greedy["accuracy"], "ci95": greedy["ci95"], "lowest_format": round(min(late), 3)}
    return {**found, "minutes": round(minutes, 2), **logged}


if __name__ == "__main__":
    main()
