"""`--dry_run`: the resolved configuration, and the memory that it will take. And: refuse what cannot fit."""

import os

import torch
import yaml

from ..config import EvaluateRun, GRPORun, Model, RewardModelRun, SampleRun, SFTRun
from ..config.loader import as_tree
from ..config.trackers import missing_tracker
from ..errors import UserError
from ..models import attention, computes_in_half
from .memory import GIB, Card, Sharding, generating_memory, parameter_count, peak, room, training_memory
from .recipes import least_gib, nearest
from .shapes import model_shape

CONTEXT = 1.0
"""GiB that CUDA takes for itself."""
MENDS = {
    "activations (training)": "lower per_device_train_batch_size, or set gradient_checkpointing",
    "cache and gathered weights (generation)": "lower rollout.batch_size",
    "vLLM server": "set rollout.sleep, or lower rollout.serve.gpu_memory_utilization",
    "vLLM server (generation)": "lower rollout.serve.gpu_memory_utilization",
    "scoring (generation)": "use smaller reward models",
    "reward models": "use smaller reward models",
    "gradient buckets (training)": "lower reduce_bucket_size in the DeepSpeed configuration",
}
"""Part -> what makes it smaller. All others follow from the number of parameters."""
OTHERWISE = "train adapters (model.lora), shard over more GPUs, or use a smaller model"


def print_plan(run: GRPORun | SFTRun | RewardModelRun | EvaluateRun | SampleRun) -> None:
    """Print the configuration as YAML and the estimate as a table for each model, on rank 0.

    Raises `UserError` where a training run cannot fit into the GPUs, as far as these are known.
    """
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
        card, sharding = planned_card(run), Sharding.from_environment()
        parts = training_memory(run, model_shape(run.model), sharding, card)
        _print_memory(run.model, parts, sharding.processes)
        if card is None:
            print("No GPU here. With --placement.gpu_gib N it is compared with GPUs of N GiB.")
        else:
            print(f"  {'room: 95 %, less 1 GiB for CUDA':<40}{room(card.gib):8.3f} GiB of {card.gib:.1f}")
            require_fit(parts, card)


def check_machine(run: GRPORun | SFTRun | RewardModelRun) -> None:
    """Raises `UserError` if a tracker or the attention kernel is missing, or a GPU too small. Loads no weights."""
    if missing := missing_tracker(run.trl):
        raise UserError(missing)
    attention(run.model, computes_in_half(run.model, run.trl))
    if trains_on_gpu(run):
        card = this_card()
        require_fit(training_memory(run, model_shape(run.model), Sharding.from_environment(), card), card)


def this_card() -> Card:
    """This machine's GPUs."""
    return Card(torch.cuda.get_device_properties(0).total_memory / GIB, torch.cuda.device_count())


def planned_card(run: GRPORun | SFTRun | RewardModelRun) -> Card | None:
    """The GPUs to plan for: those of `placement`, else this machine's; None: there is none."""
    config = run.placement
    if config.gpu_gib is not None:
        return Card(config.gpu_gib, config.gpus_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return this_card() if trains_on_gpu(run) else None


def trains_on_gpu(run: GRPORun | SFTRun | RewardModelRun) -> bool:
    return torch.cuda.is_available() and not run.trl.get("use_cpu")


def require_fit(parts: dict[str, int], card: Card) -> None:
    """Raises `UserError` if the estimate is more than a GPU has; it names the largest part and a recipe that fits."""
    needed = peak(parts) / GIB
    if needed <= card.gib - CONTEXT:
        return
    largest = max(parts, key=parts.__getitem__)
    recipe = nearest(card.gib)
    fitting = f"{recipe} fits" if recipe else f"no recipe is made for less than {least_gib():g} GiB"
    raise UserError(
        f"memory: this run takes {needed:.1f} GiB of each GPU, which has {card.gib:.1f} and {CONTEXT:g} for CUDA; the "
        f"largest part is {largest}: {parts[largest] / GIB:.1f} GiB.\n"
        f"To make that smaller, {MENDS.get(largest, OTHERWISE)}. On this GPU {fitting}."
    )


def _print_memory(model: Model, parts: dict[str, int], processes: int) -> None:
    count = parameter_count(model_shape(model))
    print(f"Memory on each of {processes} device(s), estimated; {model.path}, {count:,} parameters:")
    for name, size in [*parts.items(), ("peak", peak(parts))]:
        print(f"  {name:<40}{size / GIB:8.3f} GiB")
