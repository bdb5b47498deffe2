"""What a run takes of each GPU's memory, by part, without loading a model.

Parameters are counted exactly; activations by what autograd keeps of a decoder layer (attention, gated MLP, two
RMSNorms) and by the few moments of a step at which most is alive. The allocator's fragmentation and the CUDA context
are left out: see `room`.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from ..adapters import AUTO_CLASS, Task, trained_parameters
from ..config import GRPORun, Model, RewardModelRun, SFTRun
from ..config.trl_fields import trl_value
from ..generation.vllm.devices import GIB, GPU, SERVER_CONTEXT, VLLM_DEFAULT
from ..generation.vllm.start import plan_servers
from ..generation.weight_sync.source import BUCKET_BYTES
from ..models import attention, load_model_config, mixed_precision
from ..rewards.model import SCORED_TOKENS
from ..rewards.registry import MODELS, asks_server
from .shapes import model_shape

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
PROMPT_TOKENS = 256
"""Prompts are not read for the estimate; this many tokens are assumed for each."""
TILE_TOKENS, TILE_WORDS = 4096, 32768
"""Of TRL's tiles of logits, which are in the computation's dtype."""
PACKED_BYTES = 256 * 2**20
"""Least size of the buffer that carries weights to a server: one by `ipc`, two by `nccl`."""
ACTIVE = 1.0 * GIB
"""Of a vLLM server beside its weights and its cache: graphs, activations. Assumed, not measured."""
ASLEEP = 0.5 * GIB
"""What a sleeping server keeps of its share: graphs. Assumed, not measured."""
REDUCED = 500_000_000
"""DeepSpeed's default of `reduce_bucket_size`."""
ZERO3_LIVE = 10**9
"""Parameters that ZeRO 3 keeps gathered at most (`stage3_max_live_parameters`)."""


@dataclass(frozen=True)
class Card:
    """The GPUs of a machine."""

    gib: float
    """Memory of each."""
    gpus: int = 1


@dataclass(frozen=True)
class Sharding:
    """How the training state is divided over the processes."""

    processes: int = 1
    zero_stage: int = 0
    optimizer_on_host: bool = False
    parameters_on_host: bool = False
    buffered: int | None = None
    """Gradients in the buffers of ZeRO 1 and 2, all together. None: as in configs/deepspeed/."""

    @classmethod
    def from_environment(cls) -> "Sharding":
        """From the environment that `accelerate launch` sets."""
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true" or file is None:
            return cls(processes)
        return cls.from_file(processes, Path(file))

    @classmethod
    def from_file(cls, processes: int, file: Path) -> "Sharding":
        """From a DeepSpeed configuration."""
        zero = json.loads(file.read_text())["zero_optimization"]
        bucket = zero.get("reduce_bucket_size", "auto")
        # Where sending overlaps, one buffer is filled while the other is sent.
        buffered = int((REDUCED if bucket == "auto" else bucket) * (2 if zero.get("overlap_comm") else 1))
        return cls(processes, zero["stage"], "offload_optimizer" in zero, "offload_param" in zero, buffered)


@dataclass(frozen=True)
class Step:
    """One forward and backward of a micro-batch."""

    tokens: int
    """Padding included."""
    mask: int = 0
    """Entries of the attention mask [B, N, N]. 0: none is built."""
    held: int = 4
    """Bytes of a weight; the residual stream has the same dtype."""
    compute: int = 4
    """Bytes of a number in matrix products; less than `held` under autocast."""
    checkpointed: bool = False
    offload: bool = False
    """What layers keep is in the host's memory (`train.activation_offload`)."""
    adapters: bool = False
    """Adapters are trained, all else is frozen."""
    head: bool = True
    """Logprobs are computed, with the whole vocabulary. False: a classifier's one logit."""


def parameter_count(config: PretrainedConfig, task: Task = "CAUSAL_LM") -> int:
    """Parameters of the architecture, tied ones counted once, by building it without storage.

    Each is built once: whatever places a run asks several times.
    """
    key = (type(config), config.to_json_string(use_diff=False), task)
    if key not in _counted:
        with torch.device("meta"):
            model = AUTO_CLASS[task].from_config(config)
        model.tie_weights()
        _counted[key] = model.num_parameters()
    return _counted[key]


_counted: dict[tuple[type, str, Task], int] = {}


def training_memory(
    run: GRPORun | SFTRun | RewardModelRun, config: PretrainedConfig, sharding: Sharding, card: Card | None = None
) -> dict[str, int]:
    """Bytes by part on each device that trains; parts of one phase have its name in brackets.

    Args:
        config: The shape of `run.model`.
        card: The GPUs. None: not known; servers on the trainer's GPU, whose share depends on it, are left out.
    """
    lora = run.model.lora
    task: Task = "SEQ_CLS" if isinstance(run, RewardModelRun) else "CAUSAL_LM"
    count = trained = parameter_count(config, task)
    if lora is not None:
        trained = trained_parameters(lora, config, task)
    width = BYTES[run.model.dtype]
    states = sharding.processes if sharding.zero_stage >= 1 else 1
    gradients = sharding.processes if sharding.zero_stage >= 2 else 1
    weights = sharding.processes if sharding.zero_stage >= 3 else 1
    mixed = mixed_precision(run.trl)
    deepspeed = sharding.zero_stage > 0
    held = 2 if mixed and deepspeed else width  # DeepSpeed trains in bf16, with a float32 master copy
    updated = held if lora is None or deepspeed else 4  # PEFT keeps adapters in float32
    on_host = sharding.optimizer_on_host
    parts = {
        "weights": 0 if sharding.parameters_on_host else count * held // weights,
        "gradients": 0 if sharding.parameters_on_host else trained * updated // gradients,
        "optimizer states": 0 if on_host else 2 * trained * max(held, 4) // states,
    }
    if lora is not None:
        parts["adapters"] = trained * updated // weights
    if mixed and deepspeed and not on_host:
        parts["master weights"] = 4 * trained // states
    if isinstance(run, GRPORun) and trl_value(run, "beta") and lora is None:  # else the base model is the reference
        parts["reference model"] = 0 if sharding.parameters_on_host else count * held // weights
    parts |= reward_models(run, config, mixed)
    if sharding.zero_stage == 3 and (sharding.processes > 1 or sharding.parameters_on_host):
        parts["gathered weights"] = min(ZERO3_LIVE, count) * held
    if sharding.processes > 1 and not deepspeed:
        parts["gradient buckets (training)"] = trained * updated
    if sharding.zero_stage in (1, 2):
        parts["gradient buckets (training)"] = held * (sharding.buffered or REDUCED * sharding.zero_stage)
    if mixed and deepspeed and not on_host:
        parts["gradients in float32 (update)"] = 4 * trained // states
    parts["activations (training)"] = step_memory(config, count, step_of(run, config, held, mixed))
    if isinstance(run, GRPORun):
        gathered = count * held if sharding.zero_stage >= 3 else 0  # to generate, ZeRO 3 gathers the whole model
        parts |= generating(run, config, width, mixed, gathered, sharding.processes, card)
    return parts


def reward_models(run: GRPORun | SFTRun | RewardModelRun, config: PretrainedConfig, mixed: bool) -> dict[str, int]:
    """Bytes of the reward models, which each rank holds whole. One that is not there yet has the policy's shape."""
    rewards = run.rewards if isinstance(run, GRPORun) else {}
    held = [rewards[name] for name in MODELS if name in rewards and not asks_server(name, rewards[name])]
    folders = [reward.parameters["model"] for reward in held]
    shapes = [load_model_config(Model(path=f)) if Path(f).is_dir() else config for f in folders]
    if not shapes:
        return {}
    width = 2 if mixed else 4
    scoring = max(forward_memory(shape, SCORED_TOKENS, width, width) for shape in shapes)
    return {
        "reward models": sum(parameter_count(shape, "SEQ_CLS") * width for shape in shapes),
        "scoring (generation)": scoring,
    }


def step_of(run: GRPORun | SFTRun | RewardModelRun, config: PretrainedConfig, held: int, mixed: bool) -> Step:
    """The largest micro-batch of the run. One with shared prompts holds more rollouts in as much (`Size.cost`)."""
    rows, offload, kernel = trl_value(run, "per_device_train_batch_size"), False, run.model.attn_implementation
    if kernel == "auto":
        kernel = attention(run.model, half=mixed or held < 4)
    if isinstance(run, GRPORun):
        length = PROMPT_TOKENS + trl_value(run, "max_completion_length")
        budget, offload = run.train.token_budget or math.inf, run.train.activation_offload
        rows = max(1, min(rows, budget // length))
    else:
        length = trl_value(run, "max_length") or config.max_position_embeddings
        rows *= 2 if isinstance(run, RewardModelRun) and run.loss == "pairwise" else 1
        if isinstance(run, SFTRun) and run.trl.get("packing", True):  # TRL makes one row of all
            rows, length = 1, rows * length
    return Step(
        tokens=rows * length,
        mask=0 if "flash" in kernel else rows * length**2,
        held=held,
        compute=2 if mixed else held,
        checkpointed=trl_value(run, "gradient_checkpointing"),
        offload=offload,
        adapters=run.model.lora is not None,
        head=not isinstance(run, RewardModelRun),
    )


def layer_memory(config: PretrainedConfig, step: Step) -> int:
    """Bytes that autograd keeps of a decoder layer."""
    hidden, inner, w = config.hidden_size, config.intermediate_size, step.compute
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    keys = queries if step.mask else keys  # with a mask, keys and values are repeated for each query head
    scores = w * (2 * queries + 2 * keys)
    if (
        step.adapters
    ):  # a frozen weight needs neither its input nor what it scales; each adapter keeps a copy of its input
        norms, inputs, mlp = 2 * 4 * hidden, w * (5 * hidden + queries + inner), 3 * w * inner
    else:
        norms = 2 * (4 + step.held) * hidden  # what is normalized, in float32, and the result before its scale
        # Under autocast each of five projections keeps a copy of its input; else q, k, v share one, gate and up one.
        inputs = 5 * w * hidden if step.held != w else 2 * w * hidden
        mlp = 4 * w * inner
    return step.tokens * (norms + inputs + scores + mlp) + step.mask * w


def step_memory(config: PretrainedConfig, count: int, step: Step) -> int:
    """The most bytes that a forward and backward has beside weights and their gradients, of `count` parameters.

    The largest of four moments: the head's forward, its backward, the last layer's backward, the embedding's.
    """
    hidden, layers, held = step.tokens * config.hidden_size, config.num_hidden_layers, step.held
    embedding = config.vocab_size * config.hidden_size
    tied = config.tie_word_embeddings and step.head
    mixed = step.held != step.compute
    layer, stream = layer_memory(config, step), hidden * held
    kept = 0 if step.offload else (stream if step.checkpointed else layer) * layers
    recomputed = layer if step.checkpointed or step.offload else 0
    matrices = count - embedding * (1 if tied or not step.head else 2)
    casts = step.compute * matrices if mixed else 0  # autocast keeps them until the forward ends, and autograd longer
    kept_casts = 0 if step.checkpointed else casts
    mask = step.mask  # one byte each; what attention adds to its scores is in `layer`
    end = hidden * (4 + held)  # of the last norm
    tile = min(step.tokens, TILE_TOKENS) * TILE_WORDS * step.compute if step.head else 0
    gradient = 0 if step.adapters else embedding * held  # of the embedding, or of the head
    # TRL sums the head's gradients in float32, and those of its input.
    head = (hidden + (0 if step.adapters else embedding)) * (4 if held == 4 else 4 + held)
    waiting = gradient if tied else 0  # until the embedding's backward has the other share
    largest = config.hidden_size * config.intermediate_size
    if step.adapters:  # they are in float32, and so is the gradient of what they read
        update = 4 * step.tokens * config.intermediate_size
    else:
        update = largest * (step.compute + held if mixed else held)
    moments = {
        "head, forward": kept + casts + mask + end + 2 * stream + tile,
        "head, backward": kept + kept_casts + mask + end + stream + tile + head if step.head else 0,
        "layer, backward": kept + kept_casts + mask + recomputed + waiting + update
        + 2 * stream + 2 * step.tokens * config.intermediate_size * step.compute,
        "embedding, backward": gradient + waiting + 2 * stream,
    }  # fmt: skip
    return max(moments.values())


def forward_memory(config: PretrainedConfig, tokens: int, held: int, compute: int) -> int:
    """Bytes of a forward that keeps nothing: the stream, a norm in float32, and the MLP."""
    return tokens * ((held + 12) * config.hidden_size + 4 * compute * config.intermediate_size)


def generating(
    run: GRPORun, config: PretrainedConfig, width: int, mixed: bool, gathered: int, processes: int, card: Card | None
) -> dict[str, int]:
    """Bytes by part while rollouts are made; a server that does not sleep stays."""
    rollout, length = run.rollout, PROMPT_TOKENS + trl_value(run, "max_completion_length")
    if rollout.engine != "vllm":
        cache = generation_cache(config, rollout.batch_size, length, width, 2 if mixed else width)
        return {"cache and gathered weights (generation)": cache + gathered}
    served = 2 if mixed else width
    largest = config.vocab_size * config.hidden_size * served
    bucket, packed = max(BUCKET_BYTES, largest), max(PACKED_BYTES, largest)
    if rollout.servers != "managed" or card is None:
        return {"weights in transit (weight transfer)": bucket}
    dtype = "bfloat16" if mixed else run.model.dtype
    total = int(card.gib * GIB)
    serve, transport = plan_servers(rollout, dtype, length, [GPU(total, total)] * card.gpus, min(processes, card.gpus))
    if transport != "ipc":
        return {"weights in transit (weight transfer)": bucket + (2 * packed if transport == "nccl" else 0)}
    weights = parameter_count(config) * served // serve.tensor_parallel
    share = (serve.gpu_memory_utilization or VLLM_DEFAULT) * card.gib * GIB
    if serve.cache_gib is not None:
        share = weights + serve.cache_gib * GIB + ACTIVE
    transit = {"weights in transit (weight transfer)": bucket + packed}
    if not serve.sleep:
        return {"vLLM server": int(share + SERVER_CONTEXT)} | transit
    return {
        "vLLM server's context": int(SERVER_CONTEXT),
        "vLLM server (generation)": int(share),
        "vLLM server's weights (weight transfer)": weights,  # its cache wakes up later
        "sleeping vLLM server (training)": int(ASLEEP),
    } | transit


def generation_cache(config: PretrainedConfig, rows: int, length: int, width: int, compute: int) -> int:
    """Bytes of the key-value cache and of one step's scores (three float32 copies while drawing).

    Rotated keys have the dtype of the residual stream, `width` bytes; values that of the computation.
    """
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = config.num_hidden_layers * config.num_key_value_heads * head * rows * length * (width + compute)
    return cache + 3 * 4 * rows * config.vocab_size


def generating_memory(model: Model, rows: int, max_tokens: int) -> dict[str, int]:
    """Bytes by part of a model that only generates in this process, `rows` sequences at once."""
    config, width = model_shape(model), BYTES[model.dtype]
    return {
        "weights": parameter_count(config) * width,
        "cache (generation)": generation_cache(config, rows, PROMPT_TOKENS + max_tokens, width, width),
    }


def peak(parts: dict[str, int]) -> int:
    """All lasting parts and the largest of the phases in brackets, which take turns."""
    phases: dict[str, int] = {"": 0}
    lasting = 0
    for name, size in parts.items():
        phase = name.partition(" (")[2]
        if phase:
            phases[phase] = phases.get(phase, 0) + size
        else:
            lasting += size
    return lasting + max(phases.values())


def room(gib: float) -> float:
    """GiB of a GPU that an estimate may fill: 5 % is left to fragmentation, and 1 GiB to the CUDA context."""
    return 0.95 * gib - 1
