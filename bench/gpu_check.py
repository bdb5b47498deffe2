"""What can only be known on a GPU: `python bench/gpu_check.py [--model PATH] [--steps 8] [--only PART ...]`.

Each part fits into ten minutes and needs no network: the models have random weights in Qwen2.5-0.5B's shapes.

`rollouts`: trains `--steps` steps of GRPO with each transport that the machine has GPUs for, and once with sleep, and
reports for each: seconds by phase, the largest `rollout/logp_diff`, and GiB in use on the GPU while generating and
while training. `attention`: logprobs of flash attention over shared prompts beside those of padded sdpa. `training`:
a step over given rollouts, 8k and 16k tokens to a forward: tokens per second, share of the chip's peak, peak memory
and what `--dry_run` estimates; and beside stock TRL. `step`: whole steps beside TRL's with vLLM in its process.

A table of what passed goes to stderr; the last line on stdout is JSON. Without a GPU it ends with exit code 2.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from gpu_attention import compare_attention
from gpu_step import BUDGETS, attention, save_random_qwen, training, whole_step
from result import aim, show

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "configs/recipes/tiny/r1_zero.yaml"
PARTS = ("rollouts", "attention", "training", "step")
TIMED_STEPS, ROUNDS = 4, 3
MOST_LOGP_DIFF = 0.05
"""Mean difference of the servers' and the trainer's logprobs, both in bfloat16, that passes."""
MOST_WORSE = 1.5
"""Flash attention's distance from float32, over sdpa's in bfloat16, that passes."""
ESTIMATE_ERROR = 0.15
"""Of the measured peak memory, by which `--dry_run` may be wrong."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="for `rollouts`; unset, random weights")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: bench/gpu_check.py needs a GPU, and there is none here.", file=sys.stderr)
        return 2
    run = {
        "rollouts": lambda: rollouts(options.model, options.steps),
        "attention": lambda: compare_attention(attention(), BUDGETS[0], ROUNDS),
        "training": lambda: training(ROUNDS, TIMED_STEPS),
        "step": lambda: whole_step(TIMED_STEPS + 1),
    }
    parts = {name: run[name]() for name in PARTS if name in options.only}
    aims = {}
    if "training" in parts:
        shares = [parts["training"][str(budget)]["peak_share"] for budget in BUDGETS]
        aims |= {} if None in shares else {"train_peak_share": aim(max(shares), 0.35, "higher")}
    if "step" in parts:
        aims["step_ratio"] = aim(parts["step"]["ratio"], 1.5, "higher")
    table = list(checks(parts))
    for what, passed, figure in table:
        print(
            f"{'not run' if passed is None else 'passed' if passed else 'FAILED':8} {what:44} {figure}",
            file=sys.stderr,
        )
    names = ["torch", "transformers", "trl", *(["vllm"] if parts.keys() & {"rollouts", "step"} else [])]
    versions = {name: version(name) for name in names}
    show("gpu_check", aims, versions=versions, checks=table, **parts)
    return 1 if any(passed is False for _, passed, _ in table) else 0


def checks(parts: dict[str, dict]) -> Iterator[tuple[str, bool | None, str]]:
    """(what, whether it passed, the figure) of the parts that ran. None: this machine lacks what it needs."""
    for name, run in parts.get("rollouts", {}).get("runs", {}).items():
        if run is None:
            yield f"rollouts, {name}", None, "needs a second GPU"
            continue
        diff = run["largest_logp_diff"]
        yield f"rollouts, {name}", run["finished"], f"{run['steps']} steps"
        yield f"logprobs, {name}", diff is not None and diff <= MOST_LOGP_DIFF, f"differ by {diff}"
    if "attention" in parts:
        shared, padded = parts["attention"]["shared"], parts["attention"]["padded"]
        ratio = shared["mean_diff"] / padded["mean_diff"]
        passed = None if shared["attention"] == "sdpa" else ratio <= MOST_WORSE
        yield f"{shared['attention']}, shared prompts", passed, f"{ratio:.3g} times sdpa's distance from float32"
    for budget in BUDGETS if "training" in parts else ():
        found = parts["training"][str(budget)]
        error = found["estimated_gib"] / found["peak_gib"] - 1
        figure = f"{found['estimated_gib']:.2f} GiB estimated, {found['peak_gib']:.2f} measured"
        yield f"memory, {budget} tokens to a forward", abs(error) <= ESTIMATE_ERROR, figure
    if "step" in parts:
        yield "whole step beside TRL", parts["step"]["ratio"] > 1, f"{parts['step']['ratio']:.3g} times as fast"


def rollouts(model: str | None, steps: int) -> dict:
    """A training with each way in which weights can reach the servers; None for one that needs another GPU."""
    variants = {"shm": ["--rollout.transport", "shm"], "ipc": ["--rollout.transport", "ipc"]}
    variants = {name: [*words, "--rollout.sleep", "false"] for name, words in variants.items()}
    variants["ipc, sleep"] = ["--rollout.transport", "ipc", "--rollout.sleep", "true"]
    if torch.cuda.device_count() > 1:
        variants["nccl"] = ["--rollout.transport", "nccl"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if model is None:
            save_random_qwen(folder / "model")
        path = model or str(folder / "model")
        runs = {name: train(path, steps, folder / name, words) for name, words in variants.items()}
    return {"model": model or "random", "runs": {"nccl": None, **runs}}


def train(model: str, steps: int, output: Path, words: list[str]) -> dict:
    """One training run, as a user would start it."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/single_gpu.yaml",
        "launch/grpo.py", "--config", RECIPE, "--model.path", model, "--rollout.engine", "vllm",
        "--max_steps", str(steps), "--output_dir", str(output), *words,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr)
    metrics = output / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    found = [line for line in lines if "rollout/logp_diff" in line]
    phases = sorted({key for line in found for key in line if key.startswith(("seconds/", "memory/"))})
    return {
        "finished": done.returncode == 0,
        "steps": len(found),
        "largest_logp_diff": max((line["rollout/logp_diff"] for line in found), default=None),
        "medians": {key: round(statistics.median(line[key] for line in found if key in line), 4) for key in phases},
    }


if __name__ == "__main__":
    sys.exit(main())
