"""`--dry_run`: the resolved configuration, and the memory that it will take, without loading a model.

The estimate counts parameters exactly and activations by a formula; it leaves out the allocator's
fragmentation and the CUDA context (about 1 GB together on a GPU).
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen2Config

from ..adapters import trained_parameters
from ..config import EvaluateRun, GRPORun, Model, RewardModelRun, SampleRun, SFTRun
from ..config.loader import as_tree
from ..config.trl_fields import trl_value
from ..models import load_model_config

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Prompts are not read for the estimate; this many tokens are assumed for each.
PROMPT_TOKENS = 256
# TRL projects onto the vocabulary in tiles of 4,096 tokens by 8,192 words, in float32.
LOGITS_TILE = 4096 * 8192

# The published shapes of the models in configs/recipes, so that a dry run needs no hub.
QWEN_HALF_BILLION = Qwen2Config(
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    max_position_embeddings=32768,
    tie_word_embeddings=True,
)
QWEN_7_BILLION = Qwen2Config(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    max_position_embeddings=131072,
    tie_word_embeddings=False,
)
KNOWN_SHAPES = dict.fromkeys(("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct"), QWEN_HALF_BILLION) | dict.fromkeys(
    ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct"), QWEN_7_BILLION
)


@dataclass(frozen=True)
class Sharding:
    """How the training state is divided over the processes."""

    processes: int = 1
    zero_stage: int = 0
    optimizer_on_host: bool = False
    parameters_on_host: bool = False

    @classmethod
    def from_environment(cls) -> "Sharding":
        """From the environment that `accelerate launch` sets."""
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true" or file is None:
            return cls(processes)
        zero = json.loads(Path(file).read_text())["zero_optimization"]
        return cls(processes, zero["stage"], "offload_optimizer" in zero, "offload_param" in zero)


def parameter_count(config: PretrainedConfig) -> int:
    """Parameters of the architecture, tied ones counted once, by building it without storage."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model.num_parameters()


def training_memory(
    run: GRPORun | SFTRun | RewardModelRun, config: PretrainedConfig, sharding: Sharding
) -> dict[str, int]:
    """Bytes by part on the device that trains, the two phases' peaks last; the host's memory is left out."""
    lora = run.model.lora
    count = trained = parameter_count(config)
    if lora is not None:
        trained = trained_parameters(lora, config, "SEQ_CLS" if isinstance(run, RewardModelRun) else "CAUSAL_LM")
    width = BYTES[run.model.dtype]
    states = sharding.processes if sharding.zero_stage >= 1 else 1
    gradients = sharding.processes if sharding.zero_stage >= 2 else 1
    weights = sharding.processes if sharding.zero_stage >= 3 else 1
    mixed = bool(run.trl.get("bf16", torch.cuda.is_available()))
    under_deepspeed = sharding.zero_stage > 0
    held = 2 if mixed and under_deepspeed else width  # DeepSpeed trains in bf16, with a float32 master copy
    updated = held if lora is None or under_deepspeed else 4  # PEFT keeps adapters in float32
    parts = {
        "weights": 0 if sharding.parameters_on_host else count * held // weights,
        "gradients": trained * updated // gradients,
        "optimizer states": 0 if sharding.optimizer_on_host else 2 * trained * max(held, 4) // states,
    }
    if lora is not None:
        parts["adapters"] = trained * updated // weights
    if mixed and under_deepspeed and not sharding.optimizer_on_host:
        parts["master weights"] = 4 * trained // states
    if mixed and not under_deepspeed and width == 4:
        parts["bf16 copies (autocast)"] = 2 * count
    compute = 2 if mixed else width
    rows = trl_value(run, "per_device_train_batch_size")
    offload, generating = False, {}
    if isinstance(run, GRPORun):
        if trl_value(run, "beta") and lora is None:  # with adapters the reference is the base model
            parts["reference model"] = 0 if sharding.parameters_on_host else count * width // weights
        length = PROMPT_TOKENS + trl_value(run, "max_completion_length")
        tokens = min(rows * length, max(run.train.token_budget or math.inf, length))
        offload = run.train.activation_offload
        # ZeRO 3 gathers the whole model to generate.
        gathered = count * held if sharding.zero_stage >= 3 else 0
        cache = generation(config, min(run.rollout.batch_size, rows), length, width)
        generating = {"cache and gathered weights (generation)": cache + gathered}
    else:
        tokens = rows * (trl_value(run, "max_length") or config.max_position_embeddings)
    checkpointed = trl_value(run, "gradient_checkpointing")
    training = {"activations (training)": activations(config, tokens, checkpointed, compute, offload)}
    return parts | training | generating


def activations(config: PretrainedConfig, tokens: int, checkpointed: bool, width: int, offload: bool = False) -> int:
    """Bytes kept for the backward pass of `tokens` tokens, and two tiles of logits.

    A layer keeps its input, two normalised copies, queries and their output, keys and values, and three
    tensors of the MLP's width. With checkpointing only each layer's input stays, and one layer is whole. With
    `offload` one layer is whole and all others' are elsewhere.
    """
    head = config.hidden_size // config.num_attention_heads
    key_value = 2 * config.num_key_value_heads * head
    layer = tokens * (6 * config.hidden_size + key_value + 3 * config.intermediate_size) * width
    inputs = tokens * config.hidden_size * width * config.num_hidden_layers
    kept = layer if offload else inputs + layer if checkpointed else layer * config.num_hidden_layers
    return kept + 2 * 4 * min(LOGITS_TILE, tokens * config.vocab_size)


def generation(config: PretrainedConfig, rows: int, length: int, width: int) -> int:
    """Bytes of the key-value cache and of one step's scores (three float32 copies while drawing)."""
    head = config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * head * rows * length * width
    return cache + 3 * 4 * rows * config.vocab_size


def peak(parts: dict[str, int]) -> int:
    """All lasting parts and the larger of the phases in brackets, which take turns."""
    phases = [size for name, size in parts.items() if name.endswith(("(training)", "(generation)"))]
    return sum(parts.values()) - sum(phases) + max(phases, default=0)


def generating_memory(model: Model, rows: int, max_tokens: int) -> dict[str, int]:
    """Bytes by part of a model that only generates in this process, `rows` sequences at once."""
    config = model_shape(model)
    width = BYTES[model.dtype]
    return {
        "weights": parameter_count(config) * width,
        "cache (generation)": generation(config, rows, PROMPT_TOKENS + max_tokens, width),
    }


def print_plan(run: GRPORun | SFTRun | RewardModelRun | EvaluateRun | SampleRun) -> None:
    """Print the configuration as YAML and the estimate as a table for each model, on rank 0."""
    if os.environ.get("RANK", "0") != "0":
        return
    print(yaml.safe_dump(as_tree(run), sort_keys=False, allow_unicode=True))
    if isinstance(run, SampleRun):
        for generator in run.generators:
            parts = generating_memory(generator.model, run.rollout.batch_size, generator.sampling.max_tokens)
            _print_memory(generator.model, parts, 1)
    elif isinstance(run, EvaluateRun):
        _print_memory(run.model, generating_memory(run.model, run.rollout.batch_size, run.sampling.max_tokens), 1)
    else:
        sharding = Sharding.from_environment()
        _print_memory(run.model, training_memory(run, model_shape(run.model), sharding), sharding.processes)


def model_shape(model: Model) -> PretrainedConfig:
    return KNOWN_SHAPES.get(model.path) or load_model_config(model)


def _print_memory(model: Model, parts: dict[str, int], processes: int) -> None:
    count = parameter_count(model_shape(model))
    print(f"Memory on each of {processes} device(s), estimated; {model.path}, {count:,} parameters:")
    for name, size in [*parts.items(), ("peak", peak(parts))]:
        print(f"  {name:<40}{size / 2**30:8.3f} GiB")
