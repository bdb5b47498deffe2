"""Who generates for the trainer: its own module, or vLLM servers that are there or are started."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import trl
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from trl.models import unwrap_model_for_generation

from ..config import GRPORun
from ..config import Rollout as RolloutSettings
from ..files import SERVERS
from ..models import model_path
from ..rollout.in_process import InProcessEngine
from ..rollout.protocol import Engine
from ..rollout.servers.engine import Policy
from ..rollout.servers.start import connect, start_managed
from ..rollout.weights.source import WeightSource
from .shared import computing_dtype

if TYPE_CHECKING:
    from .grpo import GRPOTrainer

PROBE_TOKENS = 32


def in_process_engine(batch_size: int, trainer: "GRPOTrainer") -> InProcessEngine:
    """The engine that generates with the trainer's own module."""

    def unwrapped() -> AbstractContextManager:
        return unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            gather_deepspeed3_params=True,  # ranks decode different numbers of tokens: nothing may be collective
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
        )

    return InProcessEngine(unwrapped, trainer.eos_token_ids, trainer.processing_class.pad_token_id, batch_size)


def server_engine(
    rollout: RolloutSettings, servers: Path, dtype: str, probe: list[int], trainer: "GRPOTrainer"
) -> Engine:
    """The engine over vLLM servers; `servers` is the folder of the run's own."""
    accelerator = trainer.accelerator
    policy = Policy(
        score=trainer.score,
        probe=probe,
        probe_tokens=min(PROBE_TOKENS, trainer.max_completion_length - 1),
        stop_ids=trainer.eos_token_ids,
        rank=accelerator.process_index,
        share=lambda value: broadcast_object_list([value])[0],
    )
    source = WeightSource(accelerator.unwrap_model(trainer.model), getattr(torch, dtype))
    return connect(rollout, servers, source, policy, accelerator.num_processes)


def servers_folder(run: GRPORun) -> Path:
    return Path(run.trl["output_dir"]) / SERVERS


@contextmanager
def managed_servers(run: GRPORun, arguments: trl.GRPOConfig, dataset: Dataset) -> Iterator[None]:
    """This run's own servers, if it has any. They come up while the trainer is built."""
    own = run.rollout.engine == "vllm" and run.rollout.servers == "managed" and arguments.process_index == 0
    if not own:
        yield
        return
    tokens = max(dataset["prompt_length"]) + arguments.max_completion_length
    dtype = computing_dtype(arguments, run.model.dtype)
    trainers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    servers = start_managed(run.rollout, model_path(run.model), dtype, tokens, servers_folder(run), trainers)
    try:
        yield
    finally:
        servers.stop()
