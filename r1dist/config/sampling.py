"""Rejection sampling and cold-start data."""

from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass

from .data import Data
from .languages import Language
from .model import Model
from .resumable import MayChange
from .rewards import STRICT, Verify
from .rollout import Rollout
from .source import Source
from .train import PlacementConfig
from .values import Bounds, PathText, Seed


@dataclass(config=STRICT, kw_only=True)
class Sampling:
    """How completions are drawn."""

    samples: PositiveInt = 4
    """Completions for each problem, besides the greedy one."""
    temperature: float = Field(default=1.0, ge=0)
    """Temperature of the sampled completions; the greedy one has none. 0 is greedy."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus of the sampled completions."""
    max_tokens: PositiveInt = 512
    """Tokens after which a completion is cut off."""


@dataclass(config=STRICT, kw_only=True)
class Prompting:
    """How a model is asked, beyond the template."""

    examples: PathText | None = None
    """A `.jsonl` file with `problem` and `completion`, shown as earlier turns (few-shot prompting)."""
    shots: PositiveInt = 2
    """How many of the examples."""
    instruction: str | None = None
    """Words that follow the question, on a line of their own (direct prompting)."""
    prefill: str = ""
    """The beginning of the reply, which the model continues. Rewards and filters see it as part of the reply."""


@dataclass(config=STRICT, kw_only=True)
class Refine:
    """How a sample is rewritten before it is judged: its reasoning, then its summary, inside the tags.

    Text outside the tags is dropped. A sample without both parts is left as it is.
    """

    filler: list[str] = Field(default_factory=list)
    """Regular expressions; what they match is taken out of the reasoning."""


@dataclass(config=STRICT, kw_only=True)
class Filters:
    """What a sample must be to be kept. `null` switches a bound off."""

    correct: bool = True
    """The final answer is right."""
    format: bool = True
    """Reasoning and answer inside their tags, and nothing else."""
    finished: bool = True
    """It ended by itself, not at `max_tokens`."""
    language: Language | None = "en"
    """The language of its words, in the thinking and in the whole text."""
    min_language_share: float = Field(default=0.95, ge=0, le=1)
    """Least share of words in that language, in either."""
    min_tokens: PositiveInt | None = None
    """Shorter samples are dropped: too little reasoning to learn from."""
    max_tokens: PositiveInt | None = None
    """Longer ones, too: rambling."""
    max_paragraph: PositiveInt | None = None
    """Characters that a paragraph may have."""
    max_repetition: float | None = Field(default=0.3, ge=0, le=1)
    """Largest share of 8-grams of words that were there before."""
    code_blocks: bool = False
    """Keep samples with code blocks."""


@dataclass(config=STRICT, kw_only=True)
class Generator:
    """A source of samples: a model, prompts, and how it is asked."""

    name: str = Field(pattern=r"^[\w-]+$")
    """What the samples' provenance calls it."""
    model: Model
    data: Data
    prompting: Prompting = Field(default_factory=Prompting)
    sampling: Sampling = Field(default_factory=Sampling)
    refine: MayChange[Refine | None] = None
    """Rewrite the samples first."""
    per_prompt: MayChange[PositiveInt] = 1
    """Rows that one prompt may give."""
    share: MayChange[float] = Field(default=1.0, gt=0, le=1)
    """Largest share of `rows` that may come from this generator."""


@dataclass(config=STRICT, kw_only=True)
class SampleRun:
    """`launch/sample.py`: samples drawn, verified, filtered, and written as a dataset, of them or of their prompts."""

    output_dir: MayChange[PathText]
    generators: list[Generator] = Field(min_length=1)
    """Where samples come from."""
    filters: MayChange[Filters] = Field(default_factory=Filters)
    """Which of them are kept."""
    pass_rate: MayChange[Bounds | None] = None
    """[least, most] share of right samples. Set, the rows are the prompts whose share lies within, for
    `launch/grpo.py`, and `filters`, `mix`, `refine` and `per_prompt`, which are of samples, must be left out."""
    rows: MayChange[PositiveInt | None] = None
    """Rows wanted of all generators together, of prompts that the seed draws. Unset: as many as there are."""
    mix: MayChange[list[Source]] = Field(default_factory=list)
    """Further rows that are taken as they are (the report's non-reasoning data)."""
    rollout: Rollout = Field(default_factory=Rollout)
    verify: Verify = Field(default_factory=Verify)
    seed: Seed = 0
    """Seed of the samples."""
    shard: PositiveInt | None = None
    """Prompts that one process claims at a time. Set, any number of processes, on machines that share the folder, may
    work at once, come and go."""
    placement: MayChange[PlacementConfig] = Field(default_factory=PlacementConfig)
    """`nodes`, `gpus_per_node`, `gpu_gib` and, without GPUs, `processes`."""
    dry_run: MayChange[bool] = False
    """Print the resolved configuration and the memory it needs, and stop."""
