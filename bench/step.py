"""A GRPO step beside stock TRL's: `python bench/step.py [--rounds 3] [--steps 4] [--only PART ...]`.

`trl.GRPOTrainer` and ours take turns in one run, on the same random model of 5M parameters, prompts, group size,
seeds and loss. `train_ratio`: the rollouts are given, their lengths log-normal, the mean a quarter of the longest;
trained tokens per second, ours over theirs. Loss and gradient norm of each step are compared. `train_ratio_prompts`:
the same with GSM8K's lengths, prompts of 140 tokens and 16 completions of 150 on average. `step_ratio`: whole
steps, each with its own in-process generation. `overlap_ratio`: whole steps, ours with a vLLM server on one core, a
generation ahead of the trainer on the other; TRL with its own generation on both. `growth`: ours alone, seconds per
trained token with 8 times the rollouts, and with rollouts 4 times as long, where what attention takes is measured by
itself and taken out. `ranks`: `train_ratio` again, by two processes under ZeRO-2, half of the rollouts each.

`idle` is the share of the processors' time in which none of our processes ran, servers and verifiers included. A
thread that spins while it waits for another counts as running.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from beside_trl import LONGEST, Bench, Given, compare, table
from result import aim, show

from r1dist.config import Rollout, Serve, Verify
from r1dist.files import SERVERS
from r1dist.generation.vllm.start import start_managed
from r1dist.rewards import VERIFIERS
from r1dist.rewards.pool import Pool
from r1dist.rl.shared_prompts import share_prompts
from r1dist.run.process import set_up_process

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("train", "prompts", "step", "overlap", "growth", "ranks")
AIMS = {
    "train": ("train_ratio", 4.5),
    "prompts": ("train_ratio_prompts", 7),
    "step": ("step_ratio", 3.5),
    "overlap": ("overlap_ratio", 4.5),
}


class LongPrompts(Bench):
    """Lengths as in GSM8K with a chat template; a micro-batch holds a group."""

    longest = 600
    prompts, group, micro = 4, 16, 16
    prompt_tokens = 137


def overlap(bench: Bench, rounds: int) -> dict:
    serve = Serve(replicas=1, cores=1, dtype="float32", max_model_len=LONGEST)
    rollout = Rollout(engine="vllm", max_staleness=1, max_logp_diff=1e9, serve=serve)
    folder = bench.folder / "out" / SERVERS
    servers = start_managed(rollout, str(bench.path), "float32", LONGEST, folder, trainers=1)
    try:
        return compare(bench, rounds, LONGEST // 2, False, lambda: bench.ahead(LONGEST // 2, rollout))
    finally:
        servers.stop()


def long_prompts(folder: Path, pool: Pool, rounds: int, steps: int) -> dict:
    return compare(LongPrompts(folder / "prompts", pool, steps), rounds, LongPrompts.longest, given=True)


def growth(bench: Bench, rounds: int) -> dict:
    """Seconds per trained token, prompts included, without attention's; and what they grow by."""
    sizes = {"small": (8, LONGEST), "rollouts": (64, LONGEST), "length": (8, 4 * LONGEST)}
    seconds: dict[str, list[float]] = {name: [] for name in sizes}
    attention: dict[str, list[float]] = {name: [] for name in sizes}
    for _ in range(rounds):
        for name, (prompts, longest) in sizes.items():
            clock, given = bench.of_size(prompts, longest)
            lengths = [len(prompt) + len(ids) for prompt, group in given.completions.items() for ids in group]
            trained = statistics.median(log["seconds/train"] for log in clock.logs[1:])
            inside = attention_seconds(given)
            seconds[name].append((trained - inside) / sum(lengths))
            attention[name].append(inside / trained)
            print(f"growth, {name}: {1e6 * seconds[name][-1]:.0f} us a token beside attention", file=sys.stderr)
    small = seconds.pop("small")
    return {
        "growth": {name: [a / b for a, b in zip(values, small, strict=True)] for name, values in seconds.items()},
        "attention_share": {name: statistics.median(values) for name, values in attention.items()},
    }


def ranks(rounds: int, steps: int) -> dict:
    """This bench's `train`, by two processes."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "configs/accelerate/zero2_cpu.yaml",
    ]
    command += ["bench/step.py", "--only", "train", "--rounds", str(rounds), "--steps", str(steps)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["train"]


def attention_seconds(given: Given) -> float:
    """Of scaled dot products, forward and backward, in the shapes of the random model's micro-batches of a group."""
    layers, heads, width = 6, 8, 32
    total = 0.0
    for prompt, group in given.completions.items():
        rows = [[torch.tensor(prompt)] * len(group), [torch.tensor(ids) for ids in group], [True] * len(group)]
        for (count, queries, keys), mask in share_prompts(*rows).attention.blocks:
            q, k, v = (torch.randn(count, heads, n, width, requires_grad=True) for n in (queries, keys, keys))
            began = time.perf_counter()
            output = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
            output.sum().backward()
            total += time.perf_counter() - began
    return layers * total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    set_up_process()
    with tempfile.TemporaryDirectory() as folder, Pool(VERIFIERS, Verify(workers=1)) as pool:
        bench = Bench(Path(folder), pool, options.steps)
        measure = {
            "train": lambda: compare(bench, options.rounds, LONGEST, given=True),
            "prompts": lambda: long_prompts(Path(folder), pool, options.rounds, options.steps),
            "step": lambda: compare(bench, options.rounds, LONGEST // 2, given=False),
            "overlap": lambda: overlap(bench, options.rounds),
            "growth": lambda: growth(bench, options.rounds),
            "ranks": lambda: ranks(options.rounds, options.steps),
        }
        parts = {name: measure[name]() for name in options.only}
    aims = {name: aim(parts[part]["ratios"], goal, "higher") for part, (name, goal) in AIMS.items() if part in parts}
    for name, ratios in parts.get("growth", {}).get("growth", {}).items():
        aims[f"growth_{name}"] = aim(ratios, 1.15, "lower")
    if os.environ.get("RANK", "0") == "0":
        mean = bench.given.tokens / (bench.prompts * bench.group)
        rows = table(parts)
        beside = {"table": rows} if len(rows) > 1 else {}
        show("step", aims, parameters=bench.parameters, mean_length=mean, **beside, **parts)


if __name__ == "__main__":
    main()
