"""Writes the tables of figures in docs/performance.md: `python bench/page.py`.

Its rows come from bench/results/, one file for each bench and machine: `<bench>-<machine>.json`, the last line that
the bench printed. A figure that no file holds is shown, too, as not run. A result may bring a `table` of its own, rows
of cells under a row of heads.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
START, END = "<!-- figures: python bench/page.py -->", "<!-- end of figures -->"
SIGNS = {"higher": "≥", "lower": "≤"}
HEAD = ("bench", "figure", "what it is", "value", "rounds", "aim", "reached", "machine")


@dataclass(frozen=True)
class Aim:
    phrase: str
    aim: float
    better: str = "higher"


AIMS: dict[str, dict[str, Aim]] = {
    "step": {
        "train_ratio": Aim("trained tokens per second over TRL's, the rollouts given", 4.5),
        "train_ratio_prompts": Aim("the same with GSM8K's lengths: prompts of 140 tokens, 16 completions of 150", 7),
        "step_ratio": Aim("whole steps' tokens per second over TRL's, both generating in process", 3.5),
        "overlap_ratio": Aim("the same, ours with a server that is a generation ahead", 4.5),
        "growth_rollouts": Aim(
            "seconds per trained token, attention taken out: 8 times the rollouts over the small run", 1.15, "lower"
        ),
        "growth_length": Aim("the same: rollouts 4 times as long over the small run", 1.15, "lower"),
    },
    "real": {
        "real_step_ratio": Aim("the same as `step_ratio`, on SmolLM2-135M and a task of reasoning-gym", 2),
    },
    "staleness": {
        "one_behind": Aim(
            "seeds of 3 with accuracy within on-policy's 95 % interval or above, 1 generation behind", 3
        ),
        "four_behind": Aim("the same, at most 4 generations behind", 3),
    },
    "rewards": {
        "clean_ratio": Aim("answers verified per second over a plain loop's", 1.6),
        "hostile_ratio": Aim("the same, one answer of 100 being hostile", 8),
        "stuck_limits": Aim("time limits that 11 answers without an end cost two workers", 6, "lower"),
        "sandbox_per_core": Aim("trivial programs per second in the sandbox, one after another", 20),
        "thread_ms": Aim(
            "most milliseconds of the trainer's thread, over rewards and hostile completions of 32,768 tokens",
            10,
            "lower",
        ),
    },
    "decode": {
        "decode_ratio": Aim(
            "tokens per second of the in-process engine over 77065d9's, 128 sequences, SmolLM2-135M's shape", 1.4
        ),
        "decode_ratio_generate": Aim("the same over transformers' `generate`", 1.5),
    },
    "rollout": {
        "throughput_ratio": Aim("tokens per second over vLLM's own offline generation, equal lengths", 0.9),
        "throughput_ratio_skewed": Aim("the same, skewed lengths", 0.9),
        "client_overhead": Aim("our own processor time as a share of the generation's seconds", 0.05, "lower"),
    },
    "sync": {"shm_share": Aim("share of a step that new weights take to a server, 0.5B parameters", 0.05, "lower")},
    "checkpoint": {"save_ratio": Aim("seconds that training waits for a checkpoint, over TRL's", 1.1, "lower")},
    "sample": {
        "throughput_ratio": Aim("tokens per second of rejection sampling over its engine's alone", 0.9),
        "evaluation_ratio": Aim("the same of an evaluation, all of its scores included", 0.9),
    },
    "decontaminate": {
        "seconds_800k": Aim("seconds to compare 800,000 training rows with 4,373 test problems", 300, "lower")
    },
    "scale": {"prediction_error": Aim("largest miss of a predicted step's seconds, as a share of them", 0.2, "lower")},
    "first_run": {
        "demo_minutes": Aim("minutes of `make demo-quick`", 8, "lower"),
        "peak_gib": Aim("its peak memory, all processes together, GiB", 4, "lower"),
        "refusal_seconds": Aim("seconds until a misspelt key is refused", 2, "lower"),
        "gain_points": Aim("points of greedy accuracy gained over the base model", 60),
    },
    "demo": {
        "demo_ratio": Aim("seconds of `make demo`, all stages and their evaluations, over 77065d9's", 0.5, "lower"),
    },
    "gpu_check": {
        "train_peak_share": Aim("share of the chip's peak in the training phase", 0.35),
        "step_ratio": Aim("whole steps' speed over TRL's with vLLM colocated", 1.5),
    },
}


def main(results: Path = ROOT / "bench" / "results", page: Path = ROOT / "docs" / "performance.md") -> None:
    before, start, rest = page.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise SystemExit(f"{page}: the lines {START} and {END} are missing")
    measured, more = defaultdict(list), []
    for path in sorted(results.glob("*.json")):
        figures, own = read(path)
        for figure, cells in figures.items():
            measured[figure].append(cells)
        more += own
    rows = []
    for bench, known in AIMS.items():
        for name, aim in known.items():
            not_run = ("not run", "", bound(aim.aim, aim.better), "", "")
            rows += [(f"`{bench}`", f"`{name}`", aim.phrase, *cells) for cells in measured[bench, name] or [not_run]]
    lines = "\n".join([table(HEAD, rows), *more])
    page.write_text(f"{before}{start}\n\n{lines}\n{end}{after}", encoding="utf-8")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))


def read(path: Path) -> tuple[dict[tuple[str, str], tuple[str, ...]], list[str]]:
    """A result's figures by bench and name, with the cells that are measured; its own table, if it has one."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        bench, machine = result["bench"], result["machine"]
        found = {(bench, name): (*measured_cells(figure), machine) for name, figure in result["aims"].items()}
        head, *rows = result.get("table", [[]])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(f"{path}: not a bench's result ({type(error).__name__}: {error})") from None
    for _, name in found:
        if name not in AIMS.get(bench, {}):
            raise SystemExit(f"{path}: bench/page.py does not know the figure {name} of {bench}; add it to AIMS")
    return found, [f"`{bench}`, {machine}:\n\n{table(head, rows)}"] if rows else []


def measured_cells(figure: dict) -> tuple[str, str, str, str]:
    value, aim, better = figure["value"], figure["aim"], figure["better"]
    reached = value >= aim if better == "higher" else value <= aim
    rounds = ", ".join(f"{each:g}" for each in figure.get("rounds", ()))
    return f"{value:g}", rounds, bound(aim, better), "yes" if reached else "no"


def bound(aim: float, better: str) -> str:
    return f"{SIGNS[better]} {aim:g}"


if __name__ == "__main__":
    main()
