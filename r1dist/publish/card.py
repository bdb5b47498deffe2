"""The model card, README.md in a model's folder: written from the run's own record.

Of the record are `run.json` (the resolved configuration and the versions), `metrics.jsonl`, and a reward model's
`evaluation.json`. What nobody recorded, such as intended use and limits, is left to the author, and the card says so.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from ..config import GRPORun, RewardModelRun, SFTRun
from ..config.trl_fields import TRL_CLASS, field_types
from ..files import METRICS, RUN_FILE, read_lines
from ..tiny import EMBEDDED
from .licences import NOT_KNOWN, card_data, data_licence, is_generated, model_licence
from .usage import usage

STAGES = {
    "grpo": (GRPORun, "reinforcement learning with GRPO", ["grpo", "reinforcement-learning"]),
    "sft": (SFTRun, "supervised fine-tuning", ["sft"]),
    "reward_model": (RewardModelRun, "training of a reward model", ["reward-model"]),
}
"""Launcher -> its configuration's class, what it does, and tags."""
ARGUMENTS = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "num_train_epochs",
    "per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_generations",
    "num_iterations", "max_completion_length", "max_length", "packing", "temperature", "loss_type", "beta",
    "epsilon", "epsilon_high", "scale_rewards", "weight_decay", "max_grad_norm", "bf16", "fp16", "seed",
)  # fmt: skip
"""TRL's fields that the card shows, where the run has them."""
HERE = ("output_dir", "resume", "dry_run", "placement", "verify", "push_to_hub")
"""Fields of this machine or this start, which the configuration in the card leaves out."""
SECRET = re.compile(r"(?:^|_)(?:key|secret|password|auth|access_token)$")
CURVES = {
    "grpo": {"reward": "reward", "completions/mean_length": "tokens"},
    "sft": {"loss": "loss", "mean_token_accuracy": "token accuracy"},
    "reward_model": {"loss": "loss", "accuracy": "accuracy"},
}
"""Launcher -> metric -> its name in the card; in RL the mean of each reward comes after the first."""
EVALUATED = re.compile(r"eval/(?:.*/)?(?:accuracy|loss)")
POINTS = 10  # of a curve


def model_card(
    folder: Path, repository: str | None = None, step: int | None = None, sections: Sequence[str] = ()
) -> ModelCard:
    """The card of the model that the run in `folder` trained.

    Args:
        repository: Where it is uploaded to; None: it stays in its folder.
        step: The optimizer step of the weights, of a checkpoint; None: the end.
        sections: Further ones, of the recipe that the run is a stage of.
    """
    record = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    launcher, config = record["launcher"], record["config"]
    run_class, stage, tags = STAGES[launcher]
    lines = list(read_lines(folder / METRICS)) if (folder / METRICS).exists() else []
    last = max((line["step"] for line in lines), default=0) if step is None else step
    base, base_id = _base(config)
    parts = [
        f"# {repository.rpartition('/')[2] if repository else folder.name}",
        f"{base[0].upper()}{base[1:]}, after {stage} by r1dist: {last} optimizer steps."
        + ("" if step is None else " Training goes on; these are the weights of a checkpoint."),
        "This card was written from the record of the run. Intended use, limits and safety are for the author to add.",
        "## Training",
        _training(record, TRL_CLASS[run_class.__name__]),
        "## Data",
        _data(config),
        _curve(launcher, lines),
        _evaluations(lines),
        _held_out(folder),
        *sections,
        "## Use",
        usage(launcher, config, repository, folder),
        "## Reproduce",
        _reproduce(record),
        "## Versions",
        table(("package", "version"), list(record["versions"].items())),
    ]
    licence = model_licence(config["model"]["path"])
    data = ModelCardData(
        base_model=base_id,
        datasets=[source["path"] for source in _sources(config) if _is_hub_id(source["path"])] or None,
        library_name="peft" if keeps_adapters(config) else "transformers",
        license=licence if licence != NOT_KNOWN and "," not in licence else None,  # the hub takes one
        pipeline_tag="text-classification" if launcher == "reward_model" else "text-generation",
        tags=["r1dist", "trl", *tags],
    )
    body = "\n\n".join(part for part in parts if part)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def keeps_adapters(config: dict) -> bool:
    lora = config["model"].get("lora")
    return lora is not None and lora["save"] == "adapters"


def _base(config: dict) -> tuple[str, str | None]:
    """The base model in words, and its hub id: that of a folder, where the folder's own card names one."""
    path = config["model"]["path"]
    if path in EMBEDDED:
        return f"r1dist's embedded model `{path}`", None
    if _is_hub_id(path):
        return f"[{path}](https://huggingface.co/{path})", path
    origin = card_data(Path(path)).get("base_model")
    named = f"the model in the folder `{Path(path).name}`"
    return (f"{named}, made from {origin}", origin) if isinstance(origin, str) else (named, None)


def _is_hub_id(path: str) -> bool:
    made_here = is_generated(path) or path in EMBEDDED
    return not made_here and not Path(path).exists() and re.fullmatch(r"[\w.-]+(?:/[\w.-]+)?", path) is not None


def _training(record: dict, trl_class: str) -> str:
    config, known = record["config"], field_types(trl_class)
    rows = [("base model", f"{_base(config)[0]} (licence: {model_licence(config['model']['path'])})")]
    rows += [("processes", str(record["processes"]))] if "processes" in record else []
    decides_nothing = "num_train_epochs" if config.get("max_steps", -1) > 0 else "max_steps"
    for name in ARGUMENTS:
        value = config.get(name, known[name][1] if name in known else None)
        if not (value is None or value is ... or value is False or name == decides_nothing):
            rows.append((f"`{name}`", str(value)))
    if lora := config["model"].get("lora"):
        rows.append(("LoRA", f"r {lora['r']}, alpha {lora['alpha']}, on {lora['targets']}; saved: {lora['save']}"))
    for name, reward in config.get("rewards", {}).items():
        rows.append((f"reward `{Path(name).name}`", f"weight {reward['weight']:g}"))
    if "data" in config:
        rows.append(("prompt template", config["data"]["template"]))
    return table(("", ""), rows)


def _sources(config: dict) -> list[dict]:
    return config["data"]["sources"] if "data" in config else config["sources"]


def _data(config: dict) -> str:
    rows = []
    for source in _sources(config):
        path = Path(source["path"])
        local = path.exists() and not is_generated(source["path"])
        made_of = _sampled_from(path) if local else []
        detail = [str(source[field]) for field in ("subset", "task") if source.get(field)]
        if made_of:
            detail.append(f"sampled by r1dist, for problems of {', '.join(made_of)}")
        else:
            detail.append("a local file or folder" if local else f"split {source['split']}")
        licences = dict.fromkeys(data_licence(origin) for origin in made_of or [source["path"]])
        shown = "/".join(path.parts[-2:]) if local else source["path"]
        rows.append((shown, ", ".join(detail), str(source["limit"] or "all"), ", ".join(licences)))
    return table(("source", "", "rows", "licence"), rows)


def _sampled_from(path: Path) -> list[str]:
    """The sources of the problems of a file that `launch/sample.py` wrote; none for any other."""
    record = path.parent / RUN_FILE
    if not (path.is_file() and record.exists()):
        return []
    run = json.loads(record.read_text(encoding="utf-8"))
    if run["launcher"] != "sample":
        return []
    of_generators = [source for generator in run["config"]["generators"] for source in generator["data"]["sources"]]
    return list(dict.fromkeys(source["path"] for source in [*of_generators, *run["config"]["mix"]]))


def _curve(launcher: str, lines: list[dict]) -> str:
    """Means over equal spans of steps, as text: a card is read where no picture of a run's folder is shown."""
    shown = dict(CURVES[launcher])
    if launcher == "grpo":
        names = sorted({name for line in lines for name in line if re.fullmatch(r"rewards/.*/mean", name)})
        shown |= {name: name.split("/")[1] for name in names}
    steps = [line for line in lines if "reward" in line or "loss" in line]
    if not steps:
        return ""
    size = -(-len(steps) // POINTS)
    rows = []
    for first in range(0, len(steps), size):
        span = steps[first : first + size]
        means = ([line[name] for line in span if line.get(name) is not None] for name in shown)
        ends = f"{span[0]['step']} to {span[-1]['step']}" if len(span) > 1 else str(span[0]["step"])
        rows.append((ends, *(_number(fmean(values) if values else None) for values in means)))
    return "## Course of training\n\nMeans over the optimizer steps.\n\n" + table(("steps", *shown.values()), rows)


def _evaluations(lines: list[dict]) -> str:
    """What was measured during training, at its last `POINTS` times."""
    measured = [{name: value for name, value in line.items() if EVALUATED.fullmatch(name)} for line in lines]
    rows = [(line["step"], found) for line, found in zip(lines, measured, strict=True) if found][-POINTS:]
    names = list(dict.fromkeys(name for _, found in rows for name in found))
    cells = [(str(step), *(_number(found.get(name)) for name in names)) for step, found in rows]
    heads = [name.removeprefix("eval/") for name in names]
    return "## Evaluation during training\n\n" + table(("step", *heads), cells) if rows else ""


def _held_out(folder: Path) -> str:
    path = folder / "evaluation.json"
    if not path.exists():
        return ""
    scores = json.loads(path.read_text(encoding="utf-8"))
    low, high = scores["ci95"]
    interval = f"95 % interval {100 * low:.1f} to {100 * high:.1f} %"
    right = f"{100 * scores['accuracy']:.1f} % of {scores['rows']} rows held out"
    return f"## Evaluation\n\nRight on {right} ({interval})."


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _reproduce(record: dict) -> str:
    kept = {name: value for name, value in _without_secrets(record["config"]).items() if name not in HERE}
    script = f"launch/{record['launcher']}.py"
    processes = record.get("processes", 1)
    launcher = f"accelerate launch --num_processes {processes}" if processes > 1 else "python"
    several = ", by an Accelerate configuration for your machine" if processes > 1 else ""
    return (
        f"With the versions below and the files that the configuration names{several}:\n\n"
        f"```\n{launcher} {script} --config run.yaml --output_dir runs/again\n```\n\n"
        f"<details><summary>run.yaml</summary>\n\n"
        f"```yaml\n{yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)}```\n\n</details>"
    )


def _without_secrets(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):  # what a source leaves unset is no part of it
        inner = {key: one for key, one in value.items() if not (name == "sources" and one is None)}
        return {key: _without_secrets(one, str(key)) for key, one in inner.items()}
    if isinstance(value, list):
        return [_without_secrets(one, name) for one in value]
    return "(not shown)" if isinstance(value, str) and SECRET.search(name) else value


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join(lines)
