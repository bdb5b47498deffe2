"""The configuration of each launcher. TRL's own fields stand at the top level under TRL's names."""

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, PositiveInt
from pydantic.dataclasses import dataclass

from .benchmarks import Benchmark, entries
from .data import Data
from .languages import Language
from .model import Model
from .resumable import MayChange
from .rewards import STRICT, Reward, Verify, reward_fields
from .rollout import Rollout, Serve
from .sampling import Prompting, Sampling
from .source import Source
from .train import PlacementConfig, Train, TrainRL
from .values import PathText, Seed, TemplateName

Mode = Literal["greedy", "sampled"]


@dataclass(config=STRICT, kw_only=True)
class TrainingRun:
    """What all training launchers have."""

    model: Model
    train: Train = Field(default_factory=Train)
    placement: PlacementConfig = Field(default_factory=PlacementConfig)
    resume: MayChange[bool | Literal["auto"]] = False
    """Resume from the newest good checkpoint of `output_dir`, which must hold this run. `auto`: if there is one."""
    dry_run: MayChange[bool] = False
    """Print the resolved configuration and the memory it needs, and stop."""
    trl: dict[str, Any] = Field(default_factory=dict)
    """The fields of TRL's configuration at the YAML's top level."""


@dataclass(config=STRICT, kw_only=True)
class GRPORun(TrainingRun):
    """`launch/grpo.py`: reinforcement learning with rule rewards."""

    data: Data
    prompting: Prompting = Field(default_factory=Prompting)
    rewards: dict[str, Annotated[Reward, BeforeValidator(reward_fields)]] = Field(
        default_factory=lambda: {"accuracy": Reward(), "format": Reward()}, min_length=1
    )
    """Reward name, or your own function's `module:function` or `file.py:function` -> weight, or fields: see
    docs/rewards.md."""
    rollout: Rollout = Field(default_factory=Rollout)
    verify: Verify = Field(default_factory=Verify)
    train: TrainRL = Field(default_factory=TrainRL)


@dataclass(config=STRICT, kw_only=True)
class SFTRun(TrainingRun):
    """`launch/sft.py`: supervised fine-tuning on completions."""

    data: Data
    eval_max_tokens: MayChange[PositiveInt] = 512
    """Tokens after which an answer to `data.eval` is cut off."""
    holdout: MayChange[list[Source]] = Field(default_factory=list)
    """Rows that it is not trained on; with `eval_strategy`, the loss on them is measured during training."""
    verify: Verify = Field(default_factory=Verify)
    """For `data.eval`."""


@dataclass(config=STRICT, kw_only=True)
class RewardModelRun(TrainingRun):
    """`launch/reward_model.py`: a model that scores replies."""

    loss: Literal["pairwise", "pointwise"]
    """`pairwise`: a better and a worse reply (Bradley-Terry). `pointwise`: good or bad replies (cross-entropy)."""
    sources: list[Source] = Field(min_length=1)
    """Where the rows come from."""
    holdout: list[Source] = Field(default_factory=list)
    """Rows that it is not trained on; its accuracy on them is measured at the end and, with `eval_strategy`, during
    training."""


@dataclass(config=STRICT, kw_only=True)
class Requests:
    """General requests, to be answered or declined."""

    sources: list[Source] = Field(min_length=1)
    """Rows of kind `unsafe` should be declined, all others answered."""
    declines: str = r"\b(?:cannot|can't|can not|won't|unable to) (?:help|assist)\b"
    """Regular expression that matches a reply that declines."""
    max_tokens: PositiveInt = 512
    """Tokens after which a reply is cut off."""
    helpfulness: PathText | None = None
    """Folder of the helpfulness model, for its mean score of replies to requests that should be answered."""
    safety: PathText | None = None
    """Folder of the safety model, for its mean score of all responses."""


@dataclass(config=STRICT, kw_only=True)
class EvaluationData:
    """Problems that need no name, and how a question becomes a prompt."""

    sources: list[Source] = Field(default_factory=list)
    """Where the rows come from."""
    template: TemplateName = "chat"
    """As in the `data` of a training run; of `benchmarks`, too."""


@dataclass(config=STRICT, kw_only=True)
class EvaluateRun:
    """`launch/evaluate.py`: pass@1, pass@k and cons@n on problems with known answers; replies to requests."""

    model: Model
    data: EvaluationData = Field(default_factory=EvaluationData)
    benchmarks: Annotated[list[Benchmark], BeforeValidator(entries)] = Field(default_factory=list)
    """Problems with a name: `[gsm8k, {name: math500, path: FILE, limit: 100}]`. docs/evaluation.md lists them."""
    protocol: Literal["greedy", "r1"] | None = None
    """Sets what the YAML leaves open. `greedy`: one greedy completion. `r1`: the report's, temperature 0.6, top-p
    0.95, 32,768 tokens, and as many samples as the benchmarks usually have."""
    modes: Annotated[list[Mode], Field(min_length=1)] = Field(default_factory=lambda: [*get_args(Mode)])
    """How each problem is answered: once greedily, `sampling.samples` times at `sampling.temperature`, or both."""
    prompting: Prompting = Field(default_factory=Prompting)
    """Its examples and its instruction are for problems alone; general requests are asked without."""
    sampling: Sampling = Field(default_factory=Sampling)
    requests: Requests | None = None
    """General requests, answered greedily."""
    target_language: Language = "en"
    """The language of which the share of words in the thinking is reported."""
    rollout: Rollout = Field(default_factory=Rollout)
    verify: Verify = Field(default_factory=Verify)
    seed: Seed = 0
    """Seed of the sampled completions."""
    shard: PositiveInt | None = None
    """Prompts that one process claims at a time. Set, any number of processes, on machines that share the folder of
    `output`, may work at once, come and go."""
    placement: MayChange[PlacementConfig] = Field(default_factory=PlacementConfig)
    """For launch/job.py: `nodes`, `gpus_per_node`, `gpu_gib` and, without GPUs, `processes`."""
    output: MayChange[PathText | None] = None
    """Write the result to this JSON file, and the samples beside it; killed and started again, the same command
    continues. Unset: the samples are not kept."""
    dry_run: MayChange[bool] = False
    """Print the resolved configuration and the memory it needs, and stop."""


@dataclass(config=STRICT, kw_only=True)
class ChatRun:
    """`launch/chat.py`: a conversation with any stage's model."""

    model: Model
    template: TemplateName = "chat"
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
    seed: Seed | None = None
    """Seed of the replies. Unset: other replies each time."""


@dataclass(config=STRICT, kw_only=True)
class ServeRun(Serve):
    """`launch/serve.py`: vLLM servers for others to use. `Serve`'s fields are its own."""

    model: Model
    endpoints: PathText
    """The file to write: addresses, token and state of the servers. Only its owner can read it."""
    token_file: PathText | None = None
    """File with the token that the servers ask for. Unset: one is made."""
    transport: Literal["auto", "shm", "ipc", "nccl"] = "auto"
    """How they will be given weights. `auto`: `nccl` with a GPU, `shm` without."""
    dry_run: bool = False
    """Print the commands, and stop."""
