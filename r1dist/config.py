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
class Lora:
    """Low-rank adapters (arXiv 2106.09685)."""

    r: PositiveInt = 16
    """Rank of the update."""
    alpha: PositiveInt = 32
    """The update is scaled by alpha / r."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the adapters."""
    targets: str | list[str] = "all-linear"
    """Names of the layers to adapt; `all-linear` is all but the head."""


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
    lora: Lora | None = None
    """Train low-rank adapters instead of the weights (needs `peft`)."""


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
class Serve:
    """vLLM servers, all alike."""

    replicas: PositiveInt = 1
    """How many servers."""
    tensor_parallel: PositiveInt = 1
    """GPUs (or, without one, groups of cores) that hold one copy of the model."""
    data_parallel: PositiveInt = 1
    """Copies of the model inside one server."""
    devices: str | None = None
    """GPUs to share out among the servers (`2,3`). Unset: vLLM's choice."""
    cores: PositiveInt | None = None
    """CPU cores of each server where there is no GPU. Unset: vLLM's choice, all but one."""
    host: str = "127.0.0.1"
    """Address to listen at. `0.0.0.0` lets other machines in; each request needs the token either way."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the servers compute in. `auto`: for a run, what its trainer computes in; else what the model says."""
    max_model_len: PositiveInt | None = None
    """Tokens of prompt and completion together. Unset: for a run, what it can need; else the model's context."""
    gpu_memory_utilization: float | None = Field(default=None, gt=0, le=1)
    """Share of a GPU for a server, weights included. Unset: vLLM's default; on a shared GPU of a run, 0.3."""
    cache_gib: float | None = Field(default=None, gt=0)
    """GiB for the key-value cache, instead of a share. Unset: 1 where there is no GPU."""
    enforce_eager: bool = False
    """Do without compiled graphs: a faster start, slower tokens. Always so where there is no GPU."""
    sleep: bool = False
    """Let the servers give their memory back when asked to (GPUs). For a run, `rollout.sleep` sets it."""
    start_timeout: float = Field(default=600, gt=0)
    """Seconds that a server may take to come up."""
    hang_timeout: float = Field(default=60, gt=0)
    """Seconds without an answer after which a server is killed and started again."""
    arguments: list[str] = Field(default_factory=list)
    """Further words for vLLM's command line."""


@dataclass(config=STRICT, kw_only=True)
class Rollout:
    """Who generates."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """`transformers`: in the training process, bit-reproducible. `vllm`: by vLLM servers."""
    batch_size: PositiveInt = 128
    """Sequences that the in-process engine decodes at once, on each rank."""
    servers: str = "managed"
    """`managed`: the run starts servers, as `serve` says, and they end with it. Otherwise launch/serve.py's
    endpoints file, or URLs with commas between them."""
    serve: Serve = Field(default_factory=Serve)
    """The managed servers."""
    token_file: str | None = None
    """File with the token (or vLLM's API key) of servers that are given by URL."""
    transport: Literal["auto", "shm", "ipc", "nccl"] = "auto"
    """How weights reach the servers. `shm`: by files. `ipc`: within one GPU. `nccl`: from GPU to GPU. `auto`: by the
    devices for managed servers, by the endpoints file for others."""
    weights_folder: str = "/dev/shm"
    """Where `shm` writes them. For servers on other machines, a folder that all share."""
    in_flight: PositiveInt = 512
    """Samples that each rank asks of one server at a time."""
    request_timeout: float = Field(default=600, gt=0)
    """Seconds for one prompt's completions, after which another server is asked."""
    sync_timeout: float = Field(default=120, gt=0)
    """Seconds for each call by which a server takes new weights."""
    health_timeout: float = Field(default=20, gt=0)
    """Seconds in which a server must give a sign of life while it generates."""
    timeout: float = Field(default=300, gt=0)
    """Seconds without any server that can be used, after which the run saves a checkpoint and ends."""
    max_logp_diff: float = Field(default=0.2, gt=0)
    """Mean difference of a server's and the trainer's logprobs after a sync, above which the run ends."""
    sleep: bool = False
    """Servers on the trainer's GPU give back their memory while it trains."""


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
    engine: Literal["transformers", "vllm"] | None = None
    """Who generates in the RL stages, whatever their YAMLs say."""
    dry_run: bool = False
    """Print the commands, and stop."""


@dataclass(config=STRICT, kw_only=True)
class ServeRun(Serve):
    """`launch/serve.py`: vLLM servers for others to use. `Serve`'s fields are its own."""

    model: Model
    endpoints: str
    """The file to write: addresses, token and state of the servers. Only its owner can read it."""
    transport: Literal["auto", "shm", "ipc", "nccl"] = "auto"
    """How they will be given weights. `auto`: `nccl` with a GPU, `shm` without."""
    dry_run: bool = False
    """Print the commands, and stop."""
