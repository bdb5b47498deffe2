"""A recipe as a graph: the stages, their inputs, and the commands that run them."""

import functools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import yaml

from ..config import EvaluateRun, GRPORun, RewardModelRun, SampleRun, SFTRun
from ..config.engines import VLLM_MISSING, vllm_installed
from ..config.loader import as_tree, parse
from ..config.pipeline import PipelineRun, Stage
from ..config.trackers import missing_tracker
from ..errors import UserError
from ..files import samples_folder
from ..rewards.registry import check_rewards
from ..shipped import LAUNCH, located

EVALUATION = ".evaluation"


@dataclass(frozen=True)
class Kind:
    """What all stages of a kind have in common."""

    script: str
    module: str
    """What its launcher imports to run it."""
    run_class: type
    trains: bool
    """Launched by Accelerate; leaves a model and checkpoints on the way."""
    rolls_out: bool
    answers: bool = True
    """Leaves a model that can be asked, and is evaluated so."""


KINDS = {
    "grpo": Kind("grpo.py", "r1dist.rl.train", GRPORun, trains=True, rolls_out=True),
    "sft": Kind("sft.py", "r1dist.sft.train", SFTRun, trains=True, rolls_out=False),
    "reward_model": Kind(
        "reward_model.py", "r1dist.reward_models.train", RewardModelRun, trains=True, rolls_out=False, answers=False
    ),
    "sample": Kind("sample.py", "r1dist.sampling.run", SampleRun, trains=False, rolls_out=True, answers=False),
    "evaluate": Kind(
        "evaluate.py", "r1dist.evaluation.evaluate", EvaluateRun, trains=False, rolls_out=True, answers=False
    ),
}


def parsed(kind: Kind, arguments: list[str], processes: int | None = None) -> Any:
    """The configuration that a stage's launcher makes of `arguments`, its rewards checked. Raises `UserError`."""
    run = parse(kind.run_class, arguments, processes=processes)
    if isinstance(run, GRPORun):
        check_rewards(run, processes)
    return run


@dataclass(frozen=True)
class Step:
    """One command of a recipe: a stage, or the evaluation of one."""

    name: str
    stage: Stage
    uses: tuple[str, ...]
    """Names of the stages whose outputs it reads."""
    needs: tuple[str, ...]
    """Names of the steps that must be done before."""
    command: list[str]
    run_class: type
    config: dict
    """The resolved configuration that the command will run with."""
    output: Path
    """What it leaves: a model's folder or a file."""
    folder: Path
    """The folder that is its own while it runs."""
    trains: bool
    accelerate: str | None = None


class Graph:
    """The stages of `run` in an order in which each finds what it needs.

    Args:
        run: The pipeline.
        configs: The folder of the pipeline's YAML and of the stages' YAMLs.

    Raises `UserError` for a cycle, a stage that is not there, a missing field, and whatever is wrong in a
    stage's own YAML.
    """

    def __init__(self, run: PipelineRun, configs: Path):
        self.run = run
        self.configs = configs
        self.folder = Path(run.output_dir)
        self.stages = {stage.name: stage for stage in run.stages}
        self._check()
        self.accelerate = Path(located(run.accelerate or ""))
        self.processes = None if run.launcher == "job" else _processes(self.accelerate)
        self.steps = self._ordered([step for stage in run.stages for step in self._steps(stage)])

    def modules(self, steps: Iterable[Step]) -> list[str]:
        """What processes of `steps` import."""
        kinds = {"evaluate", *(step.stage.kind for step in steps)} - {"base"}
        deepspeed = _accelerate(self.accelerate).get("distributed_type") == "DEEPSPEED"
        return [KINDS[kind].module for kind in kinds] + ["deepspeed"] * deepspeed

    def output(self, name: str) -> Path | str:
        """The model or dataset that the stage `name` leaves."""
        stage = self.stages[name]
        if stage.kind == "base":
            return stage.model
        return self.folder / name / "rows.jsonl" if stage.kind == "sample" else self.folder / name

    def edges(self) -> list[tuple[str, str]]:
        """(from, to) for each stage that another takes something of."""
        return [(source, stage.name) for stage in self.run.stages for source in dict.fromkeys(stage.inputs.values())]

    def chosen(self) -> list[Step]:
        """The steps that `only`, `from` and `until` leave."""
        run, names = self.run, set(self.stages)
        asked = {"only": run.only or [], "from": [run.from_], "until": [run.until]}
        for field, name in ((field, name) for field, values in asked.items() for name in values):
            if name is not None and name not in names:
                raise UserError(f"--{field}: there is no stage `{name}`; there are {', '.join(self.stages)}.")
        needed = {
            name: {need for step in self.steps.values() if step.stage.name == name for need in step.uses}
            for name in names
        }
        if run.only is not None:
            names &= set(run.only)
        if run.until is not None:
            names &= _closure(run.until, needed)
        if run.from_ is not None:
            names &= _closure(run.from_, {name: {n for n in needed if name in needed[n]} for name in needed})
        if not names:
            raise UserError("--only, --from and --until leave no stage to run; take one of them away.")
        return [step for step in self.steps.values() if step.stage.name in names]

    def _check(self) -> None:
        if self.run.launcher == "accelerate" and self.run.accelerate is None:
            raise UserError("`accelerate` is missing: the configuration to launch with; or set `launcher: job`.")
        if len(self.stages) < len(self.run.stages):
            raise UserError("stages: two of them have the same name; each needs its own.")
        for stage in self.stages.values():
            if stage.kind == "base" and (stage.model is None or stage.inputs or stage.config):
                raise UserError(f"stages: `{stage.name}` is a base stage: it needs `model`, and nothing else.")
            if stage.kind != "base" and stage.config is None:
                raise UserError(f"stages: `{stage.name}` needs `config`, its YAML.")
            for field, source in (stage.inputs | stage.evaluate_inputs).items():
                if source not in self.stages:
                    raise UserError(
                        f"stages: `{stage.name}` takes `{field}` from `{source}`, which is no stage; "
                        f"there are {', '.join(self.stages)}."
                    )

        for goal in self.run.goals:
            bounds = [goal.above, goal.below, goal.not_below, goal.at_least]
            if sum(bound is not None for bound in bounds) != 1:
                what = f"goals: `{goal.score}` of `{goal.stage}`"
                raise UserError(f"{what} needs one of `above`, `below`, `not_below` and `at_least`.")
            for name in (goal.stage, *bounds[:3]):
                if name is not None and name not in self.stages:
                    raise UserError(f"goals: there is no stage `{name}`; there are {', '.join(self.stages)}.")

    def _ordered(self, steps: list[Step]) -> dict[str, Step]:
        """By name, each after what it needs; of those that are free an evaluation, then the YAML's first."""
        by_name = {step.name: step for step in steps}
        places = {step.name: (not step.name.endswith(EVALUATION), place) for place, step in enumerate(steps)}
        sorter = TopologicalSorter({step.name: step.needs for step in steps})
        try:
            sorter.prepare()
        except CycleError as error:
            circle = " -> ".join(error.args[1])
            raise UserError(f"stages: {circle} is a cycle; none of them could ever begin.") from error
        free, ordered = [], {}
        while sorter.is_active():
            free = sorted([*free, *sorter.get_ready()], key=places.__getitem__)
            ordered[free[0]] = by_name[free[0]]
            sorter.done(free.pop(0))
        return ordered

    def _steps(self, stage: Stage) -> Iterator[Step]:
        if stage.kind != "base":
            yield self._stage_step(stage)
        if stage.kind == "base" or KINDS[stage.kind].answers:
            yield self._evaluation_step(stage)

    def _trained(self, stages: Iterable[str]) -> tuple[str, ...]:
        return tuple(name for name in stages if self.stages[name].kind != "base")

    def _stage_step(self, stage: Stage) -> Step:
        kind = KINDS[stage.kind]
        arguments = ["--config", str(self.configs / stage.config)]
        for field, source in stage.inputs.items():
            arguments += [f"--{field}", str(self.output(source))]
        arguments += ["--output_dir", str(self.folder / stage.name), "--seed", str(self.run.seed)]
        if kind.rolls_out:
            arguments += self._engine()
        by_job = self.run.launcher == "job"
        launcher = accelerate_launch(self.accelerate) if kind.trains and not by_job else []
        words = [str(LAUNCH / "job.py"), stage.kind] if by_job else [*launcher, str(LAUNCH / kind.script)]
        # Cut off, a stage that trains is resumed; what cannot be is refused now.
        asked = [*arguments, "--resume", "auto"] if kind.trains else arguments
        return Step(
            name=stage.name,
            stage=stage,
            uses=tuple(stage.inputs.values()),
            needs=self._trained(stage.inputs.values()),
            command=[sys.executable, *words, *arguments],
            run_class=kind.run_class,
            config=as_tree(parsed(kind, asked, self.processes)),
            output=Path(self.output(stage.name)),
            folder=self.folder / stage.name,
            trains=kind.trains,
            accelerate=str(self.accelerate) if kind.trains and not by_job else None,
        )

    def _engine(self) -> list[str]:
        """The pipeline's engine as arguments of a step."""
        if self.run.engine is None:
            return []
        # The YAML's servers would not be asked by `transformers`, which is refused.
        servers = ["--rollout.servers", "managed"] if self.run.engine == "transformers" else []
        return ["--rollout.engine", self.run.engine, *servers]

    def _evaluation_step(self, stage: Stage) -> Step:
        output = self.folder / "evaluations" / f"{stage.name}.json"
        config = self.configs / (stage.evaluate or self.run.evaluate)
        arguments = ["--config", str(config), "--model.path", str(self.output(stage.name)), "--output", str(output)]
        for field, source in stage.evaluate_inputs.items():
            arguments += [f"--{field}", str(self.output(source))]
        arguments += self._engine()
        run = parse(EvaluateRun, arguments)
        if not run.data.sources or len(run.modes) < 2:
            raise UserError(f"{config}: a stage's evaluation needs `data.sources`, and has no `modes` or `protocol`.")
        return Step(
            name=f"{stage.name}{EVALUATION}",
            stage=stage,
            uses=(stage.name, *stage.evaluate_inputs.values()),
            needs=self._trained([stage.name, *stage.evaluate_inputs.values()]),
            command=[sys.executable, str(LAUNCH / "evaluate.py"), *arguments],
            run_class=EvaluateRun,
            config=as_tree(run),
            output=output,
            folder=samples_folder(output),
            trains=False,
        )


def accelerate_launch(config: Path) -> list[str]:
    """The words after `python` that launch with an Accelerate configuration, wherever its DeepSpeed file is."""
    words = ["-m", "accelerate.commands.launch", "--config_file", str(config)]
    named = _accelerate(config).get("deepspeed_config", {}).get("deepspeed_config_file")
    found = named if named is None else located(named)
    return words if found == named else [*words, "--deepspeed_config_file", found]


def _processes(accelerate: Path) -> int:
    """The training processes that an Accelerate configuration starts."""
    if not accelerate.is_file():
        raise UserError(f"accelerate: there is no file {accelerate}.")
    config = _accelerate(accelerate)
    return 1 if config.get("distributed_type", "NO") == "NO" else config["num_processes"]


@functools.cache
def _accelerate(config: Path) -> dict:
    return yaml.safe_load(config.read_text(encoding="utf-8"))


def missing_packages(steps: Iterable[Step]) -> str | None:
    """What to tell if a package is not installed that some of `steps` need."""
    steps = list(steps)
    return _missing_vllm(steps) or _missing_tracker(steps)


def _missing_vllm(steps: Iterable[Step]) -> str | None:
    rollouts = {step.name: step.config.get("rollout") for step in steps}
    names = [name for name, r in rollouts.items() if r and (r["engine"], r["servers"]) == ("vllm", "managed")]
    if not names or vllm_installed():
        return None
    return f"{', '.join(names)}: `rollout.engine` is `vllm`, but {VLLM_MISSING} Or set `--engine transformers`."


def _missing_tracker(steps: Iterable[Step]) -> str | None:
    missing = {step.name: missing_tracker(step.config) for step in steps if step.trains}
    return next((f"{name}: {why}" for name, why in missing.items() if why is not None), None)


def _closure(start: str, following: dict[str, set[str]]) -> set[str]:
    """`start` and everything that can be reached from it."""
    found, waiting = set(), {start}
    while waiting:
        found |= waiting
        waiting = set().union(*(following[name] for name in waiting)) - found
    return found
