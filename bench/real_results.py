"""What the recipe on a real model achieved: `python bench/real_results.py runs/smollm2-135m`.

The run's figures go into bench/results/real-<name of the run's folder>.json. From all such files docs/results.md and
the curve in the README are written; `python bench/real_results.py` alone writes those.
"""

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot
from result import machine, significant

from r1dist.files import METRICS, greedy_answers, read_lines
from r1dist.pipeline.table import percent

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE, CURVE = ROOT / "bench/results", ROOT / "docs/results.md", ROOT / "docs/images/smollm2_r1_zero.svg"
CURVES = {
    "accuracy": "rewards/accuracy/mean",
    "format": "rewards/format/mean",
    "reward": "reward",
    "tokens": "completions/mean_length",
}
SAMPLES = 3
NAMES = {
    "base": "base model, 3 examples in the prompt",
    "r1_zero": "R1-Zero: RL only, the same prompt",
    "sft_cold_start": "SFT on cold-start data, no examples",
    "reasoning_rl": "reasoning RL + language reward",
    "sft_full": "second SFT, on rejection-sampled rows",
}

INTRODUCTION = """\
# Results on a real model

`make real` runs R1's recipe on SmolLM2-135M-Instruct ([models.md](models.md)) on two CPU cores, `make real-quick` its
R1-Zero: sums and differences of two numbers of one or two digits (reasoning-gym's `chain_sum`). Each stage is measured
on 200 problems that no stage trains on. `bench/real_results.py` writes this page from the runs' own files.
"""
NOTES = """\
## What did not work

- Told to use the tags, this model does not: in 64 samples each (temperature 1) the format was right 0 times in plain
  chat, with R1's plain-text template, with R1's instruction as the system prompt or after the question, and with
  `<think>` begun for it. With one example as an earlier turn it was right in 2 %, with two in 61 %. So R1-Zero is
  asked with examples.
- Sums of two or three numbers: 5 and 0 % of the rollouts were right in the first two steps, too few to learn from.
- Examples that take numbers apart ("46 + 30 = 76, and 76 + 1 = 77"): 4 % right where 12 % were with plain ones.
- R1-Zero's gain differs by seed: sampled answers became as good as greedy ones in both, and those gained 12 points
  with seed 1, 4 with seed 0. The policy's entropy falls from 0.45 to 0.1 within six steps, then to 0.04; three
  quarters of the groups then have equal rewards, and teach nothing.
- A larger cold start left RL nothing to do. After two epochs on 284 right samples and 200 of GSM8K's solutions (seed
  0) 43.2 % of the samples were right, the policy's entropy was 0.05, and two thirds of the groups had equal rewards:
  30 steps of RL ended at 40.0 %. Now a hundred samples and 50 solutions, once each, teach the format, and groups
  with equal rewards are replaced by other prompts'.

## Not handled

Reward models with final RL, and distillation, at this size. The seconds were taken beside other work on the machine.
"""


def collect(folder: Path) -> dict:
    """The figures of a run of `configs/recipes/smollm2-135m/pipeline.yaml`, as plain data."""
    summary = json.loads((folder / "summary.json").read_text())
    stages = []
    for stage in summary["stages"]:
        lines = [line for line in _lines(folder / stage["name"] / METRICS) if "step_time" in line or "loss" in line]
        if lines:
            stage["steps"] = len(lines)
            stage["phases"] = _phases(lines)
            stage["memory_gib"] = significant(max(line.get("memory/train", 0.0) for line in lines)) or None
        if "reward" in (lines or [{}])[0]:
            stage["curves"] = {name: [significant(line[key]) for line in lines] for name, key in CURVES.items()}
        answers = greedy_answers(folder / "evaluations" / f"{stage['name']}.json")
        stage["samples"] = [{k: row[k] for k in ("problem", "answer", "text")} for row in islice(answers, SAMPLES)]
        stages.append(stage)
    return {
        "bench": "real_results",
        "machine": machine(),
        "aims": {},  # the goals are the recipe's
        "run": folder.name,
        "transfer": {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("transfer/*.json"))},
        **summary,
        "stages": stages,
    }


def _lines(path: Path) -> Iterator[dict]:
    return read_lines(path) if path.exists() else iter(())


def _phases(lines: list[dict]) -> dict[str, float]:
    """Seconds by phase, over all steps."""
    names = sorted({key for line in lines for key in line if key.startswith("seconds/")})
    seconds = {key.removeprefix("seconds/"): sum(line.get(key, 0.0) for line in lines) for key in names}
    return {name: significant(total) for name, total in seconds.items() if total >= 1}


def page(runs: list[dict]) -> str:
    """docs/results.md."""
    parts = [INTRODUCTION]
    for run in runs:
        parts += [
            f"\n## {run['run']}\n\nSeed {run['seed']}; {run['machine']}.\n",
            _table(run),
            _transfer(run),
            _goals(run),
        ]
        parts += [part for stage in run["stages"] for part in (_seconds(stage), _samples(stage)) if part]
    return "\n".join([*parts, NOTES])


def _table(run: dict) -> str:
    head = "| stage | sampled accuracy (95 % interval) | greedy | format | English | tokens | seconds |\n"
    rows = ""
    for stage in run["stages"]:
        if "sampled" not in stage:
            rows += f"| {stage['name']} | {stage['data']['rows']} rows | | | | | {stage['seconds']:.0f} |\n"
            continue
        scores = stage["sampled"]
        interval = " to ".join(percent(bound) for bound in scores["ci95"])
        cells = [NAMES.get(stage["name"], stage["name"]), f"{percent(scores['accuracy'])} ({interval})"]
        cells += [percent(stage["eval"]["accuracy"]), percent(scores["format"]), percent(scores["language"])]
        rows += "| " + " | ".join([*cells, f"{scores['mean_tokens']:.0f}", f"{stage['seconds']:.0f}"]) + " |\n"
    note = (
        "\nSampled at temperature 1, two samples for each problem; format, English (share of words in the thinking) "
        "and tokens are of these samples. Seconds: the stage with its evaluation, of its last start.\n"
    )
    return head + "|---|---|---|---|---|---|---|\n" + rows + note


def _transfer(run: dict) -> str:
    """Accuracy on what no stage trains on."""
    rows = ""
    for name, scores in run["transfer"].items():
        task, stage = name.split("-")
        cells = [task, NAMES.get(stage, stage)]
        for part in (scores["greedy"], scores["sampled"]):
            low, high = map(percent, part["ci95"])
            cells.append(f"{percent(part['accuracy'])} ({low} to {high})")
        rows += f"| {' | '.join(cells)} | {scores['greedy']['problems']} |\n"
    head = "| task that no stage trains on | stage | greedy accuracy | sampled | problems |\n|---|---|---|---|---|\n"
    return head + rows if rows else ""


def _goals(run: dict) -> str:
    return "\n".join(f"- {'met' if goal['met'] else 'missed'}: {goal['text']}" for goal in run["goals"]) + "\n"


def _seconds(stage: dict) -> str:
    if "phases" not in stage:
        return ""
    phases = ", ".join(f"{name} {seconds:.0f}" for name, seconds in stage["phases"].items())
    memory = f" Memory of the process: {stage['memory_gib']:.1f} GiB." if stage["memory_gib"] else ""
    return f"### {stage['name']}\n\n{stage['steps']} steps. Seconds by phase: {phases or 'not measured'}.{memory}\n"


def _samples(stage: dict) -> str:
    shown = [f"```\n{row['problem']}\n{row['text']}\n```" for row in stage["samples"]]
    return f"Greedy answers of {stage['name']}:\n\n" + "\n".join(shown) + "\n" if shown else ""


def draw(runs: list[dict], path: Path) -> None:
    """Accuracy and format of R1-Zero's rollouts, of every run."""
    mpl.rcParams["svg.hashsalt"] = "r1dist"  # the same data give the same file
    figure, axes = pyplot.subplots(figsize=(7, 3))
    for run in runs:
        for stage in (stage for stage in run["stages"] if stage["name"] == "r1_zero"):
            for name, style in (("accuracy", "-"), ("format", ":")):
                values = [100 * value for value in stage["curves"][name]]
                axes.plot(range(1, len(values) + 1), values, style, label=f"{name}, seed {run['seed']}")
    axes.set(xlabel="optimizer step", ylabel="% of rollouts", ylim=(0, 100), title="R1-Zero of SmolLM2-135M")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main(folders: list[str]) -> None:
    for folder in map(Path, folders):
        run: dict[str, Any] = collect(folder)
        (RESULTS / f"real-{folder.name}.json").write_text(json.dumps(run, indent=1) + "\n")
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("real-*.json"))]
    runs = [run for run in found if run["bench"] == "real_results"]  # the others are of bench/real.py
    PAGE.write_text(page(runs))
    draw(runs, CURVE)


if __name__ == "__main__":
    main(sys.argv[1:])
