"""Who generates."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from .resumable import MayChange
from .rewards import STRICT
from .values import Expanded, PathText, PathTexts


@dataclass(config=STRICT, kw_only=True)
class Serve:
    """vLLM servers, all with the same settings."""

    replicas: MayChange[PositiveInt] = 1
    """How many servers."""
    tensor_parallel: MayChange[PositiveInt] = 1
    """GPUs (or, without one, groups of cores) that hold one copy of the model."""
    data_parallel: MayChange[PositiveInt] = 1
    """Copies of the model inside one server."""
    devices: MayChange[str | None] = None
    """GPUs to divide among the servers (`2,3`), counted from 0 among those that CUDA_VISIBLE_DEVICES leaves. Unset:
    all; for a run, those that its trainer leaves over, and where there are none (or `rollout.sleep` or `ipc` asks for
    it) its trainer's."""
    cores: MayChange[PositiveInt | None] = None
    """CPU cores of each server where there is no GPU. Unset: vLLM's choice, all but one."""
    host: MayChange[str] = "127.0.0.1"
    """Address to listen at. `0.0.0.0` lets other machines in; each request needs the token either way."""
    dtype: MayChange[Literal["auto", "float32", "bfloat16", "float16"]] = "auto"
    """What the servers compute in. `auto`: for a run, what its trainer computes in; else what the model says."""
    max_model_len: MayChange[PositiveInt | None] = None
    """Tokens of prompt and completion together. Unset: for a run, what it can need; else the model's context."""
    gpu_memory_utilization: MayChange[float | None] = Field(default=None, gt=0, le=1)
    """Share of a GPU for a server, weights included. Unset: vLLM's default, on a shared GPU of a run 0.3; less where
    less of the memory is free."""
    cache_gib: MayChange[float | None] = Field(default=None, gt=0)
    """GiB for the key-value cache, instead of what the share leaves. Unset: 1 where there is no GPU."""
    enforce_eager: MayChange[bool] = False
    """Do without compiled graphs: a faster start, slower tokens. Always so where there is no GPU."""
    sleep: MayChange[bool] = False
    """Let the servers release their memory on request (GPUs). For a run, `rollout.sleep` sets it."""
    start_timeout: MayChange[float] = Field(default=600, gt=0)
    """Seconds that a server may take to come up."""
    hang_timeout: MayChange[float] = Field(default=60, gt=0)
    """Seconds without an answer, or with requests and without computing, after which a server is started again."""
    arguments: MayChange[list[Expanded]] = Field(default_factory=list)
    """Further arguments of vLLM's command line. What the fields decide cannot be changed here."""


@dataclass(config=STRICT, kw_only=True)
class Rollout:
    """Who generates."""

    engine: MayChange[Literal["auto", "transformers", "vllm"]] = "auto"
    """`transformers`: in the training process, bit-reproducible. `vllm`: by vLLM servers. `auto`: `vllm` where it is
    installed, or where `servers` or `max_staleness` asks for servers; else `transformers`."""
    batch_size: MayChange[PositiveInt] = 128
    """Sequences that the in-process engine decodes at once, on each rank."""
    servers: MayChange[PathTexts] = "managed"
    """`managed`: the run starts servers, as `serve` says, and they end with it. Otherwise launch/serve.py's
    endpoints files, or URLs, with commas between them."""
    serve: Serve = Field(default_factory=Serve)
    """The managed servers."""
    token_file: MayChange[PathText | None] = None
    """File with the token (or vLLM's API key) of servers that are given by URL."""
    transport: MayChange[Literal["auto", "shm", "ipc", "nccl"]] = "auto"
    """How weights reach the servers. `shm`: by files. `ipc`: within one GPU. `nccl`: from GPU to GPU. `auto`: by the
    devices for managed servers, by the endpoints file for others."""
    weights_folder: MayChange[PathText] = "/dev/shm"
    """Where `shm` writes them. For servers on other machines, a folder that all share."""
    max_concurrent_requests: MayChange[PositiveInt] = 512
    """Samples that one server is asked for at a time, by all ranks together."""
    request_timeout: MayChange[float] = Field(default=600, gt=0)
    """Seconds without progress of its server after which a prompt's completions are asked for again; where a tenth of
    a second for each of `max_completion_length` is more, that."""
    sync_timeout: MayChange[float] = Field(default=120, gt=0)
    """Seconds for each call by which a server takes new weights."""
    health_timeout: MayChange[float] = Field(default=20, gt=0)
    """Seconds in which a server must answer a health check, and in which one that has requests must compute."""
    no_server_timeout: MayChange[float] = Field(default=300, gt=0)
    """Seconds without an answer of any server that can be used, after which the run saves a checkpoint and ends."""
    max_logp_diff: MayChange[float] = Field(default=0.2, gt=0)
    """Mean difference of a server's and the trainer's logprobs after a sync, above which the run ends."""
    sleep: MayChange[bool | None] = None
    """Servers on the trainer's GPUs release their memory while it trains. Unset: managed servers do, where they share
    its GPUs and `max_staleness` is 0."""
    max_staleness: NonNegativeInt = 0
    """Generations that vLLM servers may be ahead of the training. 0: each is made with the newest weights, while the
    trainer waits. 1: the next one is made while this one is trained on."""
