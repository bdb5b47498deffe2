"""Every field a YAML may hold. Imports without torch, so a bad YAML is refused at once.

A launcher's YAML has two kinds of keys. TRL's own fields (`GRPOConfig`, `SFTConfig`) stand at the top level
under TRL's names. Ours stand in the sections below (`model`, `data`, `rewards`, ...). `r1dist.parse` reads
the file, applies the command line, and builds one of the `*Run` classes.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from .languages import Language
from .reward_fields import STRICT, Reward


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
    """A hub id, a local folder, or one of the embedded base models, `tiny` and `tiny-small`."""
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
    """A hub id, a local folder, a `.jsonl`, `.json` or `.parquet` file, or one of the generated sources: `tiny`
    (problems), `tiny_talk`, `tiny_unsafe` (requests), `tiny_pairs`, `tiny_judged` (for reward models)."""
    subset: str | None = None
    """The configuration of a hub dataset (GSM8K's `main`)."""
    split: str = "train"
    """The split of a hub dataset; of generated sources, `train` or `test`."""
    problem: str | None = None
    """Column with the question as plain text."""
    answer: str | None = None
    """Column with the gold answer, in the form that `answer_format` names. Rows of another kind than `math` may
    go without."""
    answer_format: Literal["plain", "hashes", "boxed"] = "plain"
    """`plain`: the column is the answer. `hashes`: it follows `####` (GSM8K). `boxed`: the last `\\boxed{}`."""
    conversation: str | None = None
    """Column with a list of turns, `role`/`content` or `from`/`value`; the last turn is the completion."""
    completion: str | None = None
    """Column with the completion as plain text (SFT), if there is no `conversation`."""
    completion_format: Literal["plain", "stratos"] = "plain"
    """`stratos`: Bespoke-Stratos' thought and solution marks become `<think>` and `<answer>` tags."""
    chosen: str | None = None
    """Column with the better reply (pairwise reward models)."""
    rejected: str | None = None
    """Column with the worse reply."""
    label: str | None = None
    """Column with 1 for a good response and 0 for a bad one (pointwise reward models), which `completion` holds."""
    tests: str | None = None
    """Column with a program's tests (reward `code`), a list or its JSON: `{stdin, stdout}` or `{call, returns}`."""
    language: str | None = None
    """Column with the language of the program, `python` or `cpp`."""
    system: str | None = None
    """Column with a system prompt. Ignored for the templates that bring their own."""
    kind: str = "math"
    """What the row is about; rewards may look at it."""
    limit: PositiveInt | None = None
    """Take only the first rows. For `tiny`, the number of problems to generate."""
    seed: int = 0
    """Seed of generated rows."""


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
    endpoints files, or URLs, with commas between them."""
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
    max_staleness: NonNegativeInt = 0
    """Generations that vLLM servers may be ahead of the training. 0: each is made with the newest weights, while the
    trainer waits. 1: the next one is made while this one is trained on."""


@dataclass(config=STRICT, kw_only=True)
class Verify:
    """The worker processes that verify answers."""

    workers: PositiveInt | None = None
    """Of each training process. Unset: the machine's cores, divided among its training processes."""
    seconds: float = Field(default=5, gt=0)
    """Wall-clock seconds that one answer may take; beyond, it is wrong and its worker is replaced."""
    code_seconds: float = Field(default=120, gt=0)
    """Wall-clock seconds for a program with all its tests; beyond, it scores 0. Each test has 10 at most."""
    memory_mib: PositiveInt = 1024
    """Memory that one answer may take, beyond what a worker has from the start."""
    patience: float = Field(default=300, ge=0)
    """Seconds to go on trying while nothing can be verified; then the run saves a checkpoint and ends."""

    def of(self, verifier: str) -> float:
        """Seconds for one completion."""
        return self.code_seconds if verifier == "code" else self.seconds


def _weighted(value: Any) -> Any:
    return value if isinstance(value, dict | Reward) else {"weight": value}


@dataclass(config=STRICT, kw_only=True)
class Placement:
    """Wishes for launch/job.py: which nodes and GPUs train, and which serve. What is unset, it decides."""

    nodes: PositiveInt | None = None
    """Unset: those of the SLURM job, else this machine."""
    gpus_per_node: NonNegativeInt | None = None
    """Unset: as many as this machine has. 0: the CPUs do the work."""
    gpu_gib: float | None = Field(default=None, gt=0)
    """Memory of a GPU. Unset: this machine's."""
    serve: PositiveInt | None = None
    """Nodes for vLLM servers; on a single node, GPUs."""
    processes: PositiveInt | None = None
    """Training processes of each node without GPUs. Unset: one."""
    zero_stage: Literal[0, 1, 2, 3] | None = None
    """Unset: the first that fits."""


@dataclass(config=STRICT, kw_only=True)
class Train:
    """What every trainer does beyond TRL's fields."""

    stall_timeout: float = Field(default=1800, gt=0)
    """Seconds without a sign of life after which a rank writes all threads' stacks and ends the run."""


@dataclass(config=STRICT, kw_only=True)
class TrainRL(Train):
    """What the GRPO trainer does, too."""

    objective: Literal["paper", "trl"] = "paper"
    """`paper`: the report's GRPO, see `r1dist.objective`. `trl`: TRL's own defaults (DAPO without KL).
    Either way a field that the YAML sets itself wins."""
    dynamic_sampling: NonNegativeInt = 0
    """Times at most that groups whose rewards are all alike are replaced by other prompts' (DAPO). 0: never."""
    activation_offload: bool = False
    """What the backward pass needs waits for it in the host's memory: slower, and room for longer rollouts."""
    pass_rate: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    """[least, most] share of right answers. From the second epoch on a prompt outside of it, when it was last asked,
    gives way to one within. Unset: every epoch has every prompt once."""
    token_budget: PositiveInt | None = None
    """Most tokens of one forward, padding included. Where a micro-batch has more it is divided. Unset: no bound."""


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
class Prompting:
    """How a model is asked for samples, beyond the template."""

    examples: str | None = None
    """A `.jsonl` file with `problem` and `completion`, shown as earlier turns (few-shot prompting)."""
    shots: PositiveInt = 2
    """How many of the examples."""
    instruction: str | None = None
    """Words that follow the question, on a line of their own (direct prompting)."""
    prefill: str = ""
    """The beginning of the reply, which the model goes on from. It is part of the sample."""


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
    """The language of its words."""
    min_language_share: float = Field(default=0.95, ge=0, le=1)
    """Least share of words in that language."""
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
class Way:
    """One way to come by samples: a model, prompts, and how it is asked."""

    name: str = Field(pattern=r"^[\w-]+$")
    """What the samples' provenance calls it."""
    model: Model
    data: Data
    prompting: Prompting = Field(default_factory=Prompting)
    sampling: Sampling = Field(default_factory=Sampling)
    refine: Refine | None = None
    """Rewrite the samples first."""
    per_prompt: PositiveInt = 1
    """Rows that one prompt may give."""
    share: float = Field(default=1.0, gt=0, le=1)
    """Largest share of `rows` that may come this way."""


@dataclass(config=STRICT, kw_only=True)
class SampleRun:
    """`launch/sample.py`: samples drawn, verified, filtered, and written as a dataset."""

    output_dir: str
    ways: list[Way] = Field(min_length=1)
    """Where samples come from."""
    filters: Filters = Field(default_factory=Filters)
    """Which of them are kept."""
    rows: PositiveInt | None = None
    """Rows wanted of all ways together. Unset: as many as there are."""
    mix: list[Source] = Field(default_factory=list)
    """Further rows that are taken as they are (the report's non-reasoning data)."""
    rollout: Rollout = Field(default_factory=Rollout)
    verify: Verify = Field(default_factory=Verify)
    seed: int = 0
    """Seed of the samples."""
    shard: PositiveInt | None = None
    """Prompts that one process claims at a time. Set, any number of processes, on machines that share the folder, may
    work at once, come and go."""
    dry_run: bool = False
    """Print the resolved configuration and the memory it needs, and stop."""


@dataclass(config=STRICT, kw_only=True)
class GRPORun:
    """`launch/grpo.py`: reinforcement learning with rule rewards."""

    model: Model
    data: Data
    rewards: dict[str, Annotated[Reward, BeforeValidator(_weighted)]] = Field(
        default_factory=lambda: {"accuracy": Reward(), "format": Reward()}, min_length=1
    )
    """Reward name -> weight, or `Reward`'s fields."""
    rollout: Rollout = Field(default_factory=Rollout)
    verify: Verify = Field(default_factory=Verify)
    train: TrainRL = Field(default_factory=TrainRL)
    placement: Placement = Field(default_factory=Placement)
    resume: bool | Literal["auto"] = False
    """Go on from the newest good checkpoint of `output_dir`, which must hold this run. `auto`: if it does."""
    dry_run: bool = False
    """Print the resolved configuration and the memory it needs, and stop."""
    trl: dict[str, Any] = Field(default_factory=dict)
    """The `GRPOConfig` fields of the YAML's top level."""


@dataclass(config=STRICT, kw_only=True)
class SFTRun:
    """`launch/sft.py`: supervised fine-tuning on completions."""

    model: Model
    data: Data
    train: Train = Field(default_factory=Train)
    placement: Placement = Field(default_factory=Placement)
    resume: bool | Literal["auto"] = False
    """Go on from the newest good checkpoint of `output_dir`, which must hold this run. `auto`: if it does."""
    dry_run: bool = False
    """Print the resolved configuration and the memory it needs, and stop."""
    trl: dict[str, Any] = Field(default_factory=dict)
    """The `SFTConfig` fields of the YAML's top level."""


@dataclass(config=STRICT, kw_only=True)
class RewardModelRun:
    """`launch/reward_model.py`: a model that scores replies."""

    model: Model
    learns_from: Literal["pairs", "labels"]
    """`pairs`: a better and a worse reply (Bradley-Terry). `labels`: good or bad, one by one (cross-entropy)."""
    sources: list[Source] = Field(min_length=1)
    """Where the rows come from."""
    holdout: list[Source] = Field(default_factory=list)
    """Rows that it is not trained on; how often it is right on them is measured at the end."""
    train: Train = Field(default_factory=Train)
    placement: Placement = Field(default_factory=Placement)
    resume: bool | Literal["auto"] = False
    """Go on from the newest good checkpoint of `output_dir`, which must hold this run. `auto`: if it does."""
    dry_run: bool = False
    """Print the resolved configuration and the memory it needs, and stop."""
    trl: dict[str, Any] = Field(default_factory=dict)
    """The `RewardConfig` fields of the YAML's top level."""


@dataclass(config=STRICT, kw_only=True)
class Requests:
    """General requests: who is helped, who is declined."""

    sources: list[Source] = Field(min_length=1)
    """Rows of kind `unsafe` should be declined, all others answered."""
    declines: str = r"\b(?:cannot|can't|can not|won't|unable to) (?:help|assist)\b"
    """Regular expression by which a reply is known to decline."""
    max_tokens: PositiveInt = 512
    """Tokens after which a reply is cut off."""
    helpfulness: str | None = None
    """Folder of the helpfulness model, for its mean score of replies to requests that should be answered."""
    safety: str | None = None
    """Folder of the safety model, for its mean score of all responses."""


@dataclass(config=STRICT, kw_only=True)
class EvaluateRun:
    """`launch/evaluate.py`: greedy and sampled pass@1 on problems with known answers; replies to requests."""

    model: Model
    data: Data
    sampling: Sampling = Field(default_factory=Sampling)
    requests: Requests | None = None
    """General requests, answered greedily."""
    target_language: Language = "en"
    """The language whose share of words is reported."""
    batch_size: PositiveInt = 256
    """Sequences decoded at once."""
    verify: Verify = Field(default_factory=Verify)
    seed: int = 0
    """Seed of the sampled completions."""
    output: str | None = None
    """Write the result to this JSON file, too."""
    dry_run: bool = False
    """Print the resolved configuration and the memory it needs, and stop."""


@dataclass(config=STRICT, kw_only=True)
class ChatRun:
    """`launch/chat.py`: a conversation with any stage's model."""

    model: Model
    template: Literal["chat", "r1_zero", "r1_zero_chat"] = "chat"
    """The template that the model was trained with, as in `data`."""
    prompt: str | None = None
    """Answer this, and end."""
    fold: bool = False
    """Hide the thinking; in a conversation, `/fold` shows it and hides it again."""
    temperature: float = Field(default=0.6, ge=0)
    """0 is greedy. The report evaluates at 0.6."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Nucleus of the sampled tokens."""
    max_tokens: PositiveInt | None = None
    """Tokens after which a reply is cut off. Unset: what the model's context leaves."""
    seed: int | None = None
    """Seed of the replies. Unset: other replies each time."""


@dataclass(config=STRICT, kw_only=True)
class ServeRun(Serve):
    """`launch/serve.py`: vLLM servers for others to use. `Serve`'s fields are its own."""

    model: Model
    endpoints: str
    """The file to write: addresses, token and state of the servers. Only its owner can read it."""
    token_file: str | None = None
    """File with the token that the servers ask for. Unset: one is made."""
    transport: Literal["auto", "shm", "ipc", "nccl"] = "auto"
    """How they will be given weights. `auto`: `nccl` with a GPU, `shm` without."""
    dry_run: bool = False
    """Print the commands, and stop."""
