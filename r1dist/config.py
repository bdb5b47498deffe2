"""Every field a YAML may hold. Imports without torch, so a bad YAML is refused at once.

A launcher's YAML has two kinds of keys. TRL's own fields (`GRPOConfig`, `SFTConfig`) stand at the top level
under TRL's names. Ours stand in the sections below (`model`, `data`, `rewards`, ...). `r1dist.parse` reads
the file, applies the command line, and builds one of the `*Run` classes.
"""

from typing import Any, Literal

from pydantic import ConfigDict, Field, PositiveInt
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


@dataclass(config=STRICT, kw_only=True)
class Model:
    """Which weights to start from."""

    path: str
    """A hub id, a local folder, or `tiny` for the embedded base model."""
    tokenizer: str | None = None
    """Where the tokenizer lies, if not beside the weights."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The dtype of the weights held by the trainer. Mixed precision is `bf16`, TRL's field."""
    attn_implementation: str = "sdpa"
    """The attention kernel of transformers: `sdpa`, `eager`, `flash_attention_2`, ..."""


@dataclass(config=STRICT, kw_only=True)
class Source:
    """One place that rows come from, and the names of its columns."""

    path: str
    """A hub id, a local folder, a `.jsonl`, `.json` or `.parquet` file, or `tiny` for generated problems."""
    subset: str | None = None
    """The configuration of a hub dataset (GSM8K's `main`)."""
    split: str = "train"
    """The split of a hub dataset; of `tiny`, `train` or `test`."""
    problem: str | None = None
    """Column with the question as plain text."""
    answer: str | None = None
    """Column with the gold answer, in the form that `answer_format` names."""
    answer_format: Literal["plain", "hashes", "boxed"] = "plain"
    """`plain`: the column is the answer. `hashes`: it follows `####` (GSM8K). `boxed`: the last `\\boxed{}`."""
    conversation: str | None = None
    """Column with a list of turns, `role`/`content` or `from`/`value`; the last turn is the completion."""
    completion: str | None = None
    """Column with the completion as plain text (SFT), if there is no `conversation`."""
    completion_format: Literal["plain", "stratos"] = "plain"
    """`stratos`: Bespoke-Stratos' thought and solution marks become `<think>` and `<answer>` tags."""
    system: str | None = None
    """Column with a system prompt. Ignored for the templates that bring their own."""
    kind: str = "math"
    """What the row is about; rewards may look at it."""
    limit: PositiveInt | None = None
    """Take only the first rows. For `tiny`, the number of problems to generate."""
    seed: int = 0
    """Seed of the `tiny` problems."""


@dataclass(config=STRICT, kw_only=True)
class Data:
    """Sources, in order, and how a question becomes a prompt."""

    sources: list[Source] = Field(min_length=1)
    """Where the rows come from."""
    template: Literal["chat", "r1_zero", "r1_zero_chat"] = "chat"
    """`chat`: the tokenizer's chat template. `r1_zero`: the report's plain-text template for base models.
    `r1_zero_chat`: the chat template with the report's instruction as the system prompt."""


@dataclass(config=STRICT, kw_only=True)
class Rollout:
    """Who generates."""

    engine: Literal["transformers"] = "transformers"
    """`transformers`: in the training process, bit-reproducible."""
    batch_size: PositiveInt = 128
    """Sequences that the in-process engine decodes at once, on each rank."""


@dataclass(config=STRICT, kw_only=True)
class Train:
    """What the trainer does beyond TRL's fields."""

    objective: Literal["paper", "trl"] = "paper"
    """`paper`: the report's GRPO, see `r1dist.objective`. `trl`: TRL's own defaults (DAPO without KL).
    Either way a field that the YAML sets itself wins."""


@dataclass(config=STRICT, kw_only=True)
class Sampling:
    """How completions are drawn."""

    samples: PositiveInt = 4
    """Completions for each problem, beside the greedy one."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the sampled completions; the greedy one has none."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus of the sampled completions."""
    max_tokens: PositiveInt = 512
    """Tokens after which a completion is cut off."""


@dataclass(config=STRICT, kw_only=True)
class GRPORun:
    """`launch/grpo.py`: reinforcement learning with rule rewards."""

    model: Model
    data: Data
    rewards: dict[str, float] = Field(default_factory=lambda: {"accuracy": 1.0, "format": 1.0}, min_length=1)
    """Reward name -> weight."""
    rollout: Rollout = Field(default_factory=Rollout)
    train: Train = Field(default_factory=Train)
    resume: bool = False
    """Go on from the newest checkpoint of `output_dir`, which then may and must hold this run."""
    dry_run: bool = False
    """Print the resolved configuration and the memory it needs, and stop."""
    trl: dict[str, Any] = Field(default_factory=dict)
    """The `GRPOConfig` fields of the YAML's top level."""


@dataclass(config=STRICT, kw_only=True)
class SFTRun:
    """`launch/sft.py`: supervised fine-tuning on completions."""

    model: Model
    data: Data
    resume: bool = False
    """Go on from the newest checkpoint of `output_dir`, which then may and must hold this run."""
    dry_run: bool = False
    """Print the resolved configuration and the memory it needs, and stop."""
    trl: dict[str, Any] = Field(default_factory=dict)
    """The `SFTConfig` fields of the YAML's top level."""


@dataclass(config=STRICT, kw_only=True)
class EvaluateRun:
    """`launch/evaluate.py`: greedy and sampled pass@1 on problems with known answers."""

    model: Model
    data: Data
    sampling: Sampling = Field(default_factory=Sampling)
    target_language: Literal["en", "zh"] = "en"
    """The language whose share of words is reported."""
    batch_size: PositiveInt = 256
    """Sequences decoded at once."""
    seed: int = 0
    """Seed of the sampled completions."""
    output: str | None = None
    """Write the result to this JSON file, too."""
    dry_run: bool = False
    """Print the resolved configuration and the memory it needs, and stop."""


@dataclass(config=STRICT, kw_only=True)
class Stage:
    """One step of a recipe: a command that a person could type."""

    name: str
    kind: Literal["base", "grpo", "sft"]
    """`base` only names a model; the others are trained by the launcher of that name."""
    config: str | None = None
    """The stage's YAML, beside the pipeline's."""
    start: str | None = None
    """Name of the stage whose model this one starts from."""
    model: str | None = None
    """The model of a `base` stage."""


@dataclass(config=STRICT, kw_only=True)
class PipelineRun:
    """`launch/pipeline.py`: stages one after another, each evaluated."""

    output_dir: str
    stages: list[Stage] = Field(min_length=1)
    evaluate: str
    """The YAML for `launch/evaluate.py`, run after each stage."""
    accelerate: str
    """The Accelerate configuration that the training stages are launched with."""
    seed: int = 0
    """Seed of every training stage."""
    dry_run: bool = False
    """Print the commands, and stop."""
