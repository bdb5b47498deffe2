"""The engine of a training run: the trained module itself, or vLLM servers that exist or are started."""

import dataclasses
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
import trl
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import selective_log_softmax

from ..config import GRPORun, Serve
from ..config import Rollout as RolloutSettings
from ..config.trl_fields import trl_value
from ..data.templates import Template
from ..errors import UserError
from ..files import SERVERS
from ..models import weights_path
from .engine import Engine
from .local import InProcessEngine
from .vllm.engine import Policy
from .vllm.limits import Demand
from .vllm.start import check_servers, connect, start_managed
from .weight_sync.source import WeightSource

PROBE_TOKENS = 32


def local_engine(batch_size: int, trainer: trl.GRPOTrainer) -> InProcessEngine:
    """The engine that generates with the trainer's own module."""

    def unwrapped() -> AbstractContextManager:
        return unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            gather_deepspeed3_params=True,  # ranks decode different numbers of tokens: nothing may be collective
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
        )

    template = trainer.template
    return InProcessEngine(unwrapped, template.stop_ids, template.tokenizer.pad_token_id, batch_size)


def server_engine(rollout: RolloutSettings, dtype: str, probe: list[int], trainer: trl.GRPOTrainer) -> Engine:
    """The engine over vLLM servers, which compute in `dtype`; they are compared with the trainer on `probe`."""
    accelerator = trainer.accelerator

    @torch.no_grad()
    def score(tokens: list[int]) -> list[float]:
        """The policy's logprob of each token but the first, at temperature 1. A collective under ZeRO-3."""
        was_training = trainer.model.training
        trainer.model.eval()
        logits = trainer.model(input_ids=torch.tensor([tokens], device=accelerator.device)).logits[0, :-1]
        trainer.model.train(was_training)
        return selective_log_softmax(logits.float(), torch.tensor(tokens[1:], device=logits.device)).tolist()

    def release_memory() -> None:
        torch.cuda.empty_cache()  # does nothing without a GPU
        accelerator.wait_for_everyone()

    policy = Policy(
        score=score,
        probe=probe,
        probe_tokens=min(PROBE_TOKENS, trainer.max_completion_length - 1),
        stop_ids=trainer.template.stop_ids,
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
        broadcast=lambda value: broadcast_object_list([value])[0],
        release_memory=release_memory,
    )
    source = WeightSource(accelerator.unwrap_model(trainer.model), getattr(torch, dtype))
    folder = _servers_folder(trainer.args.output_dir)
    rollout, trainers = _beside_trainers(rollout, trainer.args.use_cpu)
    return connect(rollout, folder, source, policy, trainers)


def training_servers(
    run: GRPORun, dtype: str, template: Template, prompts: list[list[int]], rank: int
) -> AbstractContextManager:
    """This run's own servers, if it has any. The first rank starts them; every rank enters the context.

    They come up while the trainer is built. On the trainer's GPU they come up first: vLLM takes a change of the free
    memory meanwhile for its own.

    Raises `UserError` on the first rank, at once, where the servers cannot do what the run will ask of them.

    Args:
        dtype: What they compute in.
        prompts: The token ids of each.
    """
    if run.rollout.engine != "vllm":
        return nullcontext()
    managed = run.rollout.servers == "managed"
    if rank != 0:
        return _after_the_first_rank() if managed else nullcontext()
    rollout, trainers = _beside_trainers(run.rollout, run.trl.get("use_cpu", False))
    if managed and int(os.environ.get("WORLD_SIZE", "1")) > _processes() and rollout.serve.host == Serve().host:
        raise UserError(
            f"rollout.servers: the run's own listen at {Serve().host}, for one machine, and its processes are on "
            "several.\nUse launch/job.py, or start servers by launch/serve.py and name them here."
        )
    completion = trl_value(run, "max_completion_length")
    demand = Demand(run.model, template.tokenizer, max(prompts, key=len), completion, trains=True)
    check_servers(rollout, demand, dtype, trainers)
    return _managed(run, rollout, dtype, demand.tokens, trainers) if managed else nullcontext()


@contextmanager
def _after_the_first_rank() -> Iterator[None]:
    PartialState().wait_for_everyone()
    yield


@contextmanager
def _managed(run: GRPORun, rollout: RolloutSettings, dtype: str, tokens: int, trainers: int) -> Iterator[None]:
    folder = _servers_folder(run.trl["output_dir"])
    servers = start_managed(rollout, weights_path(run.model), dtype, tokens, folder, trainers)
    try:
        if servers.transport == "ipc":
            servers.wait()
        PartialState().wait_for_everyone()
        yield
    finally:
        servers.stop()


def _processes() -> int:
    """Training processes of this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _beside_trainers(rollout: RolloutSettings, use_cpu: bool) -> tuple[RolloutSettings, int]:
    """The settings for servers beside this machine's trainers, and the number of its GPUs that train.

    Raises `UserError` for a transport between GPUs of which the trainer has none.
    """
    if not use_cpu or rollout.servers != "managed":
        return rollout, 0 if use_cpu else _processes()
    if rollout.transport in ("ipc", "nccl"):
        raise UserError(
            f"rollout.transport: `{rollout.transport}` is between GPUs, and the trainer has none (`use_cpu`).\n"
            "Use `shm`, or leave one of them out."
        )
    return dataclasses.replace(rollout, transport="shm"), 0


def _servers_folder(output_dir: str) -> Path:
    return Path(output_dir) / SERVERS
