"""The rollout path on a machine with a GPU: `python bench/gpu_check.py [--model PATH] [--steps 20]`.

Trains `--steps` steps of GRPO with each transport that the machine has GPUs for, and once with sleep, and
reports for each: seconds by phase, the largest `rollout/logp_diff`, and GiB in use on the GPU while generating
and while training. Progress goes to stderr, one JSON object to stdout. On a machine without a GPU it says so
and ends with exit code 2.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RECIPE = "configs/recipes/tiny/r1_zero.yaml"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--steps", type=int, default=20)
    wish = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: bench/gpu_check.py needs a GPU, and there is none here.", file=sys.stderr)
        return 2
    variants = {"shm": ["--rollout.transport", "shm"], "ipc": ["--rollout.transport", "ipc"]}
    variants["ipc, sleep"] = [*variants["ipc"], "--rollout.sleep", "true"]
    if torch.cuda.device_count() > 1:
        variants["nccl"] = ["--rollout.transport", "nccl"]
    with tempfile.TemporaryDirectory() as folder:
        results = {name: run(wish, Path(folder) / str(i), words) for i, (name, words) in enumerate(variants.items())}
    report = {
        "bench": "gpu_check",
        "gpu": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "vllm")},
        "model": wish.model,
        "runs": results,
        "not_run": [] if "nccl" in results else ["nccl: needs a second GPU"],
    }
    print(json.dumps(report, indent=2))
    return 0 if all(result["finished"] for result in results.values()) else 1


def run(wish: argparse.Namespace, output: Path, words: list[str]) -> dict:
    """One training run, as a user would start it."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/single_gpu.yaml",
        "launch/grpo.py", "--config", RECIPE, "--model.path", wish.model, "--rollout.engine", "vllm",
        "--max_steps", str(wish.steps), "--output_dir", str(output), *words,
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
