"""A GRPO run from its configuration to the saved policy."""

import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch
import trl
from datasets import Dataset

from ..adapters import lora_config, save_trained
from ..config import GRPORun
from ..config.trl_fields import trl_value
from ..data.prompts import prompt_dataset
from ..data.templates import Template, load_template
from ..errors import RewardFailed, RunStopped, UserError, VerifiersBroken
from ..evaluation.training import TrainingEvaluation, evaluation_sources, training_evaluation
from ..generation.engine import RolloutsLost
from ..generation.traces import TraceWriter
from ..generation.trainer_engines import local_engine, server_engine, training_servers
from ..models import check_lora, load_model_config, model_init_kwargs, stop_at, weights_path
from ..publish.hub import Publication, hub_repository
from ..rewards import THINKING, Rewards, verifiers_of
from ..rewards.pool import Pool
from ..rewards.registry import isolated, source_digests
from ..run.process import set_up_process
from ..run.progress import show_progress
from ..run.setup import check_rows, computing_dtype, hardware_defaults, run_folder, trl_arguments
from .shared_attention import sharing_attention
from .shared_prompts import can_share
from .trainer import GRPOTrainer

COLUMNS = {
    "reward": "reward",
    "accuracy": "rewards/accuracy/mean",
    "task": "rewards/task/mean",
    "format": "rewards/format/mean",
    "tokens": "completions/mean_length",
    "seconds": "step_time",
}


def train(run: GRPORun) -> None:
    """Train from `run.model` and save the policy into `output_dir`."""
    set_up_process(use_cpu=run.trl.get("use_cpu", False))
    check_lora(run.model)
    verifiers = verifiers_of(run.rewards, [*run.data.sources, *evaluation_sources(run.data)])
    with Pool(
        verifiers | isolated(run.rewards), run.verify, share=int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    ) as pool:
        _train(run, pool)


def _train(run: GRPORun, pool: Pool) -> None:
    weights_path(run.model)  # adapters that cannot be merged are refused before anything is written
    template = load_template(run.model, run.data.template, run.prompting.prefill)
    for name in run.rewards.keys() & THINKING:
        template.require_thoughts(f"rewards.{name} is for replies that think")
    context = load_model_config(run.model).max_position_embeddings
    completion, seed = trl_value(run, "max_completion_length"), trl_value(run, "seed")
    contaminated: list[dict] = []
    dataset = prompt_dataset(run.data, template, context, completion, run.prompting, seed, contaminated)
    arguments = grpo_arguments(run)
    check_rows(run, len(dataset))
    dtype = computing_dtype(arguments, run.model.dtype)
    evaluation = training_evaluation(run, template, pool, arguments.process_index, arguments.world_size)
    rewards = Rewards(run.rewards, pool, dataset, dtype)
    prompts = [*dataset["prompt_ids"], *(evaluation.longest if evaluation else [])]
    servers = training_servers(run, dtype, template, prompts, arguments.process_index)
    repository = hub_repository(run)
    with run_folder(run, "grpo", contaminated, source_digests(run.rewards)) as checkpoint:
        with servers:
            rewards.remember_in(Path(arguments.output_dir), arguments.process_index)
            trainer = build_trainer(run, arguments, template, dataset, rewards, evaluation)
            publication = Publication(run, trainer, repository)
            try:
                trainer.train(resume_from_checkpoint=checkpoint)
            except (RolloutsLost, VerifiersBroken, RewardFailed) as error:
                raise RunStopped(f"{error}\n{trainer.save_before_stopping()}") from error
            finally:
                trainer.close()
            stop_at(trainer.accelerator.unwrap_model(trainer.model), template.stop_ids)
            save_trained(trainer, run.model)
        # If one rank ends before another, their process group still open, some abort.
        trainer.accelerator.end_training()
        publication.finish()


def grpo_arguments(run: GRPORun) -> trl.GRPOConfig:
    """TRL's configuration of `run`, with what our own sections decide."""
    values = hardware_defaults(run.trl, run.model.dtype)
    # TRL's own evaluation, which is not used, wants whole groups.
    values["per_device_eval_batch_size"] = trl_value(run, "num_generations")
    loading = model_init_kwargs(run.model, values)
    if can_share(load_model_config(run.model)):
        loading["attn_implementation"] = sharing_attention(loading["attn_implementation"])
    return trl_arguments(trl.GRPOConfig, **values, model_init_kwargs=loading)


def build_trainer(
    run: GRPORun, arguments: trl.GRPOConfig, template: Template, dataset: Dataset, rewards: Rewards,
    evaluation: TrainingEvaluation | None = None,
) -> GRPOTrainer:  # fmt: skip
    """The trainer of `run`, ready to train. Raises `UserError` for what this machine cannot do."""
    if run.train.activation_offload and not torch.cuda.is_available():
        raise UserError("train.activation_offload saves a GPU's memory, and there is no GPU here. Leave it out.")
    if run.rollout.engine == "vllm":
        serves_own = run.rollout.serve.dtype == "auto"
        dtype = computing_dtype(arguments, run.model.dtype) if serves_own else run.rollout.serve.dtype
        make_engine: Callable = functools.partial(server_engine, run.rollout, dtype, dataset[0]["prompt_ids"])
    else:
        make_engine = functools.partial(local_engine, run.rollout.batch_size)
    trainer = GRPOTrainer(
        make_engine=make_engine,
        rewards=rewards,
        template=template,
        settings=run.train,
        max_staleness=run.rollout.max_staleness,
        traces=TraceWriter(arguments.output_dir, arguments.process_index),
        evaluation=evaluation,
        model=weights_path(run.model),
        args=arguments,
        train_dataset=dataset,
        eval_dataset=dataset.select([0])
        if evaluation
        else None,  # transformers asks for one; `evaluation` has its own
        peft_config=lora_config(run.model.lora),
    )
    show_progress(trainer, COLUMNS)
    return trainer
