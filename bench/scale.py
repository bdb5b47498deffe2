"""A GRPO step on paper, from one GPU to 1,024, and the same formula held against runs on this machine.

`python bench/scale.py [--no_runs]`. The formula's parts (tokens per second of a server and of a trainer, seconds
of a sync, of a reward) are measured here on two cores with a random model of 30M parameters: they are fitted to
two runs with one trainer and one server, and then predict runs with two of either; `prediction_error` is the
largest miss. For GPUs the parts are assumptions, printed with the result, and nothing of that table has run.
Progress goes to stderr; the last line on stdout is JSON.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml
from beside_trl import ENDS
from result import aim, show
from rollout import random_model

from r1dist.run.process import set_up_process

ROOT = Path(__file__).resolve().parents[1]
STEPS, WARM_UP = 5, 2
ROLLOUTS = 64
FEW = ROLLOUTS // 2
GROUP = MICRO = 8
HIDDEN = 640  # 30M parameters: a token's arithmetic must outweigh a request's, as it does on GPUs


@dataclass(frozen=True)
class Parts:
    """Seconds that a step is made of."""

    decode: float
    """Of one server's decoding step, whatever is in it (weights read once)."""
    token: float
    """Of one more token in it."""
    train_token: float
    """Of one token trained by one trainer: forward and backward."""
    train: float
    """Of an optimizer step, whatever is in it."""
    sync: float
    """To bring the weights to one server, as far as they cannot be sent to all at once."""
    rollout: float
    """Of all else for one rollout on one trainer: preparing, scoring what is left, reference, logging."""


@dataclass(frozen=True)
class Load:
    """A step's work."""

    rollouts: int
    mean_tokens: float
    longest: float
    prompt: float = 0.0
    syncs: int = 1
    """Servers that are given weights one after another: all of those on two cores, one where a broadcast does it."""


def step_seconds(parts: Parts, load: Load, trainers: float, servers: float, overlap: bool = False) -> dict[str, float]:
    """Seconds by phase; `step` is their sum, or with `overlap` the longer side's and the sync.

    A server decodes until its longest rollout is done; tokens, trained ones and the rest divide evenly.
    """
    tokens = load.rollouts * load.mean_tokens
    phases = {
        "generate": parts.decode * load.longest + parts.token * tokens / servers,
        "train": parts.train + parts.train_token * (tokens + load.rollouts * load.prompt) / trainers,
        "rest": parts.rollout * load.rollouts / trainers,
        "sync": parts.sync * load.syncs,
    }
    training = phases["train"] + phases["rest"]
    step = max(phases["generate"], training) if overlap else phases["generate"] + training
    return {**phases, "step": step + phases["sync"]}


# On paper: what an H100 is taken to do. Shares are of the data sheet's figures.
CHIP = {
    "peak": 989e12,  # bfloat16 operations per second
    "memory": 3.35e12,  # bytes per second
    "gib": 80,
    "link": 50e9,  # bytes per second between nodes, for each GPU
    "training_share": 0.40,  # of the peak while training
    "decoding_share": 0.60,  # of the memory's speed while decoding
    "prefill_share": 0.50,  # of the peak, for a token's operations while decoding
    "decode_overhead": 0.002,  # seconds of a decoding step that no arithmetic explains
    "rest": 0.005,  # seconds of a rollout's verification, on one core of 16 beside each GPU
}
MODELS = {  # parameters, layers, key-value width (both, all heads), GPUs of one server
    "0.5B": (494_032_768, 24, 2 * 128, 1),
    "7B": (7_615_616_512, 28, 2 * 512, 1),
    "70B": (70_553_706_496, 80, 2 * 1024, 4),
}
PAPER_LOAD = Load(rollouts=512, mean_tokens=4000, longest=16384, prompt=200)


def paper_parts(model: str, trainers: int, servers: int) -> Parts:
    """The parts for one of `MODELS`; a server is `span` GPUs, which divide its weights."""
    count, layers, width, span = MODELS[model]
    cache = PAPER_LOAD.mean_tokens / 2 * layers * width * 2  # bytes read again for each token, at half its length
    read = CHIP["memory"] * CHIP["decoding_share"] * span
    operations = 2 * count / (CHIP["peak"] * CHIP["prefill_share"] * span)
    return Parts(
        decode=2 * count / read + CHIP["decode_overhead"],
        token=max(operations, cache / read),
        train_token=8 * count / (CHIP["peak"] * CHIP["training_share"]),  # 6, and 2 for activations computed again
        train=4 * count / trainers / CHIP["link"] * 2 * math.log2(trainers + 1),
        sync=2 * count / (CHIP["link"] * min(trainers, 8)),
        rollout=CHIP["rest"] / 16,
    )


def best_split(model: str, gpus: int) -> dict | None:
    """The fastest division of `gpus` into trainers and servers; None if the model does not fit."""
    count, _, _, span = MODELS[model]
    room = 0.92 * CHIP["gib"] * 2**30
    least = math.ceil(16 * count / (room - 16 * 2**30))  # 16 GiB for activations; ZeRO 3
    if gpus == 1:
        fits = least == 1 and span == 1
        found = [(1, 1.0)] if fits else []  # they take turns on the one GPU
    else:
        found = [(gpus - n * span, float(n)) for n in range(1, gpus // span + 1) if gpus - n * span >= least]
    rows = []
    for trainers, servers in found:
        parts = paper_parts(model, trainers, int(servers))
        apart = step_seconds(parts, PAPER_LOAD, trainers, servers)
        together = step_seconds(parts, PAPER_LOAD, trainers, servers, overlap=gpus > 1)
        rows.append({"trainers": trainers, "server_gpus": round(servers * span), "step_seconds": apart["step"],
                     "overlapped_seconds": together["step"], "phases": apart})  # fmt: skip
    return min(rows, key=lambda row: row["step_seconds"], default=None)


def measured_step(folder: Path, rollouts: int, trainers: int, servers: int) -> dict[str, float]:
    """Median seconds by phase of a real run's steps: every trainer and every server on one core."""
    model = random_model(folder / "model", HIDDEN)
    model.generation_config.eos_token_id = list(range(20, 20 + ENDS))
    model.generation_config.save_pretrained(folder / "model")
    tree = {
        "model": {"path": str(folder / "model")},
        "data": {"sources": [{"path": "tiny", "limit": 1024}], "template": "chat"},
        "rollout": {"engine": "vllm", "serve": {"replicas": servers, "cores": 1, "max_model_len": 512}},
        "verify": {"workers": 1},
        "output_dir": str(folder / "run"),
        "seed": 0,
        "max_steps": STEPS,
        "learning_rate": 1e-6,
        "num_generations": GROUP,
        "per_device_train_batch_size": MICRO,  # small enough that a token costs the same in each
        "gradient_accumulation_steps": rollouts // trainers // MICRO,
        "max_completion_length": 256,
        "gradient_checkpointing": False,
        "beta": 0.0,
        "save_strategy": "no",
    }
    config = folder / "grpo.yaml"
    config.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", "configs/accelerate/zero2_cpu.yaml"]  # for one trainer too: the same engine
    command += ["--num_processes", str(trainers), "launch/grpo.py", "--config", str(config)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=sys.stderr)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line][WARM_UP:]
    phases = {name for line in steps for name in line if name.startswith("seconds/")}
    found = {
        name.removeprefix("seconds/"): statistics.median(line.get(name, 0.0) for line in steps) for name in phases
    }
    found["tokens"] = statistics.median(line["completions/mean_length"] for line in steps)
    found["longest"] = statistics.median(line["completions/max_length"] for line in steps)
    found["step"] = sum(statistics.median(line.get(name, 0.0) for line in steps) for name in phases)
    print(f"{trainers} trainers, {servers} servers, {rollouts} rollouts: {found}", file=sys.stderr)
    return found


def fit(small: dict[str, float], large: dict[str, float]) -> Parts:
    """The parts from two runs with one trainer and one server, of half the rollouts and of all."""
    few, many = FEW, ROLLOUTS

    def line(x0: float, y0: float, x1: float, y1: float) -> tuple[float, float]:
        slope = max(0.0, (y1 - y0) / (x1 - x0))
        return max(0.0, y1 - slope * x1), slope

    def rest(run: dict[str, float]) -> float:
        return run["step"] - run["generate"] - run["train"] - run["sync"]

    fixed, token = line(few * small["tokens"], small["generate"], many * large["tokens"], large["generate"])
    step, train_token = line(few * small["tokens"], small["train"], many * large["tokens"], large["train"])
    return Parts(
        decode=fixed / large["longest"],
        token=token,
        train_token=train_token,
        train=step,
        sync=statistics.fmean((small["sync"], large["sync"])),
        rollout=rest(large) / many,
    )


def check_here() -> dict:
    """Fit to one trainer and one server; predict two of either, and compare with runs."""
    runs = {}
    for rollouts, trainers, servers in ((FEW, 1, 1), *((ROLLOUTS, n, m) for n in (1, 2) for m in (1, 2))):
        with tempfile.TemporaryDirectory() as folder:
            runs[rollouts, trainers, servers] = measured_step(Path(folder), rollouts, trainers, servers)
    parts = fit(runs[FEW, 1, 1], runs[ROLLOUTS, 1, 1])
    rows = []
    for (rollouts, trainers, servers), run in list(runs.items())[2:]:
        load = Load(rollouts, run["tokens"], run["longest"], syncs=servers)
        predicted = step_seconds(parts, load, trainers, servers)["step"]
        rows.append({"trainers": trainers, "servers": servers, "predicted": predicted, "measured": run["step"],
                     "error": abs(predicted / run["step"] - 1)})  # fmt: skip
    return {"parts": asdict(parts), "runs": rows}


def main() -> None:
    set_up_process()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no_runs", action="store_true", help="only the table")
    options = parser.parse_args()
    counts = [2**power for power in range(11)]
    best = {}
    for model in MODELS:
        splits = {gpus: best_split(model, gpus) for gpus in counts}
        best[model] = {str(gpus): split for gpus, split in splits.items() if split is not None}
        for gpus, split in splits.items():
            told = "does not fit" if split is None else (
                f"{split['trainers']:5} train, {split['server_gpus']:5} serve: {split['step_seconds']:8.1f} s a step, "
                f"overlapped {split['overlapped_seconds']:8.1f}"
            )  # fmt: skip
            print(f"{model:>5} on {gpus:5} GPUs: {told}", file=sys.stderr)
    on_paper = {"chip": CHIP, "load": asdict(PAPER_LOAD), "best": best}
    if options.no_runs:
        show("scale", {}, on_paper=on_paper)
        return
    here = check_here()
    largest = max(row["error"] for row in here["runs"])
    show("scale", {"prediction_error": aim(largest, 0.20, "lower")}, on_paper=on_paper, here=here)


if __name__ == "__main__":
    main()
