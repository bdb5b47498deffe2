"""What can only be known on a GPU: `python bench/gpu_check.py [--model PATH] [--steps 20] [--only PART ...]`.

`rollouts`: trains `--steps` steps of GRPO with each transport that the machine has GPUs for, and once with sleep, and
reports for each: seconds by phase, the largest `rollout/logp_diff`, and GiB in use on the GPU while generating and
while training. `training`: a step over given rollouts in Qwen2.5-0.5B's shapes, 8k and 16k tokens to a forward: tokens
per second, share of the chip's peak, peak memory and what `--dry_run` estimates; and beside stock TRL. `step`: whole
steps beside TRL's with vLLM in its process. On a machine without a GPU it says so and ends with exit code 2.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from gpu_step import BUDGETS, training, whole_step
from result import aim, show

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "configs/recipes/tiny/r1_zero.yaml"
PARTS = ("rollouts", "training", "step")
TIMED_STEPS, ROUNDS = 4, 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: bench/gpu_check.py needs a GPU, and there is none here.", file=sys.stderr)
        return 2
    parts, aims = {}, {}
    if "rollouts" in options.only:
        parts["rollouts"] = rollouts(options)
    if "training" in options.only:
        parts["training"] = training(ROUNDS, TIMED_STEPS)
        shares = [parts["training"][str(budget)]["peak_share"] for budget in BUDGETS]
        aims |= {} if None in shares else {"train_peak_share": aim(max(shares), 0.35, "higher")}
    if "step" in options.only:
        parts["step"] = whole_step(TIMED_STEPS + 1)
        aims["step_ratio"] = aim(parts["step"]["ratio"], 1.5, "higher")
    names = ["torch", "transformers", "trl", *(["vllm"] if parts.keys() - {"training"} else [])]
    versions = {name: version(name) for name in names}
    show("gpu_check", aims, versions=versions, **parts)
    return 0 if all(result["finished"] for result in parts.get("rollouts", {}).get("runs", {}).values()) else 1


def rollouts(options: argparse.Namespace) -> dict:
    """A training with each way in which weights can reach the servers."""
    ipc = ["--rollout.transport", "ipc", "--rollout.sleep"]
    variants = {"shm": ["--rollout.transport", "shm"], "ipc": [*ipc, "false"], "ipc, sleep": [*ipc, "true"]}
    if torch.cuda.device_count() > 1:
        variants["nccl"] = ["--rollout.transport", "nccl"]
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: run(options, Path(folder) / str(i), words) for i, (name, words) in enumerate(variants.items())}
    return {"model": options.model, "runs": runs, "not_run": [] if "nccl" in runs else ["nccl: needs a second GPU"]}


def run(options: argparse.Namespace, output: Path, words: list[str]) -> dict:
    """One training run, as a user would start it."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/single_gpu.yaml",
        "launch/grpo.py", "--config", RECIPE, "--model.path", options.model, "--rollout.engine", "vllm",
        "--max_steps", str(options.steps), "--output_dir", str(output), *words,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr)
    metrics = output / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    steps = [line for line in lines if "rollout/logp_diff" in line]
    phases = sorted({key for line in steps for key in line if key.startswith(("seconds/", "memory/"))})
    return {
        "finished": done.returncode == 0,
        "steps": len(steps),
        "largest_logp_diff": max((line["rollout/logp_diff"] for line in steps), default=None),
        "medians": {key: round(statistics.median(line[key] for line in steps if key in line), 4) for key in phases},
    }


if __name__ == "__main__":
    sys.exit(main())
