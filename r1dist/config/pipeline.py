"""A recipe in the YAML: its stages, its goals, and what of it to run. Imports without torch."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from .rewards import STRICT
from .values import Expanded, PathText, Seed


def _split(names: Any) -> Any:
    return names.split(",") if isinstance(names, str) else names


@dataclass(config=STRICT, kw_only=True)
class Stage:
    """One node of a recipe's graph: a command that a person could type."""

    name: str = Field(pattern=r"^[\w-]+$")
    """The stage's name, and its folder's."""
    kind: Literal["base", "grpo", "sft", "reward_model", "sample"]
    """`base` only names a model; the others are run by the launcher of that name."""
    config: PathText | None = None
    """The stage's YAML, in the folder of the pipeline's."""
    inputs: dict[str, str] = Field(default_factory=dict)
    """A field of that YAML -> the stage whose model or dataset goes there."""
    model: PathText | None = None
    """The model of a `base` stage."""
    evaluate: PathText | None = None
    """Another YAML for this stage's evaluation than the pipeline's."""
    evaluate_inputs: dict[str, str] = Field(default_factory=dict)
    """A field of the evaluation's YAML -> the stage whose model goes there."""
    sbatch: dict[str, Expanded] = Field(default_factory=dict)
    """Options of `sbatch` for this stage's job, added to the pipeline's."""


@dataclass(config=STRICT, kw_only=True)
class Goal:
    """What a stage is there to do, as a number of `summary.json`. Exactly one of the last four is given."""

    stage: str
    score: str = Field(pattern=r"^(?:eval|sampled|requests|scores|benchmarks\.[\w-]+\.(?:greedy|sampled))\.\w+$")
    """`eval.` (greedy), `sampled.`, `requests.`, `scores.` or a benchmark's (`benchmarks.gsm8k.greedy.`), and a field
    there, as in `eval.accuracy`."""
    above: str | None = None
    """The stage whose score it must exceed, with intervals apart where the score has one."""
    by: float = Field(default=0.0, ge=0)
    """For `above`: by at least so much."""
    below: str | None = None
    """The stage whose score it must stay under, with intervals apart where the score has one."""
    not_below: str | None = None
    """The stage whose score it may fall short of by `within`, or down to the end of that score's interval."""
    at_least: float | None = None
    """The least that it may be."""
    within: float = Field(default=0.0, ge=0)
    """For `not_below`."""
    note: str | None = None
    """What a reader should know of it."""


@dataclass(config=STRICT, kw_only=True)
class PipelineRun:
    """`launch/pipeline.py`: a graph of stages, each model evaluated. What is done already is not done again."""

    output_dir: PathText
    stages: list[Stage] = Field(min_length=1)
    evaluate: PathText
    """The YAML for `launch/evaluate.py`, run after each stage that leaves a model."""
    accelerate: PathText | None = None
    """The Accelerate configuration that the training stages are launched with; `launcher: job` chooses its own."""
    goals: list[Goal] = Field(default_factory=list)
    """What the stages are measured against, in the terminal, `summary.json` and the page."""
    seed: Seed = 0
    """Seed of every stage that trains or samples."""
    engine: Literal["transformers", "vllm"] | None = None
    """Who generates in the RL and sampling stages, whatever their YAMLs say."""
    launcher: Literal["accelerate", "job"] = "accelerate"
    """Who starts the stages: `accelerate`, with the configuration above, on this machine; `job`: launch/job.py, over
    the nodes and GPUs that are there."""
    slurm: Literal["job", "chain"] | None = None
    """Submit to SLURM instead: all of it as one job, or a job for each stage, one after another."""
    sbatch: dict[str, Expanded] = Field(default_factory=dict)
    """Options of `sbatch` by their long names (`nodes: 2`). What `SBATCH_*` variables say goes for them, too."""
    only: Annotated[list[str] | None, BeforeValidator(_split)] = None
    """Run these stages alone (`--only a,b`); what they need must be there."""
    from_: str | None = Field(default=None, alias="from")
    """Run this stage and those that depend on it (`--from`)."""
    until: str | None = None
    """Run this stage and those that it depends on."""
    dry_run: bool = False
    """Print the plan, and stop."""
