"""GRPO: a narrow subclass of TRL's trainer that lets an `Engine` generate, and sees every rollout through.

Overridden are only the methods named in `OVERRIDDEN`, each of which calls `super()`. A contract test holds
their names and signatures against the pinned TRL.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl.models import unwrap_model_for_generation

from ..config import GRPORun
from ..data.prompts import prompt_dataset
from ..models import load_model_config, load_tokenizer, model_init_kwargs, model_path
from ..parse import trl_value
from ..process import set_up_process
from ..report.progress import show_progress
from ..report.traces import TraceRow, TraceWriter
from ..rewards import Reward, select
from ..rollout.in_process import InProcessEngine
from ..rollout.protocol import Engine, Request, Rollout, Sampling, sample_seed
from .clock import PhaseClock
from .shared import hardware_defaults, open_folder, trl_arguments

OVERRIDDEN = ("_prepare_inputs", "_calculate_rewards", "_get_per_token_logps_and_entropies")
COLUMNS = {
    "reward": "reward",
    "accuracy": "rewards/accuracy/mean",
    "format": "rewards/format/mean",
    "tokens": "completions/mean_length",
    "seconds": "step_time",
}


class _EngineBackend:
    """Stands where TRL keeps its vLLM client, and hands the work to the trainer's engine."""

    def __init__(self, trainer: "GRPOTrainer", engine: Engine):
        self.trainer = trainer
        self.engine = engine

    def sync_weights(self) -> None:
        with self.trainer.clock.phase("sync"):
            self.engine.sync_weights(self.trainer.state.global_step)

    def generate(self, prompts: list[list[int]], images: Any, num_generations: int, profiler: Any) -> tuple:
        """TRL's order: prompt ids, completion ids, logprobs [B][T][1], and their ids (unused)."""
        requests = self.trainer.requests(prompts, num_generations)
        with profiler, self.trainer.clock.phase("generate"):
            rollouts = self.engine.generate(requests, self.trainer.sampling)
        self.trainer.generated = rollouts
        completions = [rollout.token_ids for rollout in rollouts]
        logprobs = [[[logprob] for logprob in rollout.logprobs] for rollout in rollouts]
        return prompts, completions, logprobs, None


class _ClockCallback(TrainerCallback):
    """Ends the phase `train` with the optimizer step and logs the seconds of all phases."""

    def __init__(self, trainer: "GRPOTrainer"):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        clock = self.trainer.clock
        if clock.running("train"):
            clock.stop("train")
        for phase, seconds in clock.take().items():
            self.trainer._metrics["train"][f"seconds/{phase}"].append(seconds)


class GRPOTrainer(trl.GRPOTrainer):
    """`trl.GRPOTrainer` whose completions come from an `Engine`, with traces and a clock by phase.

    Args:
        make_engine: Builds the engine from this trainer, once TRL has prepared the model.
        traces: Where each rollout is written; None writes none.
        **kwargs: `trl.GRPOTrainer`'s own arguments.
    """

    def __init__(self, *, make_engine: Callable[["GRPOTrainer"], Engine], traces: TraceWriter | None, **kwargs):
        super().__init__(**kwargs)
        self.clock = PhaseClock()
        self.traces = traces
        self.generated: list[Rollout] | None = None
        self.local_rewards: list[dict[str, float | None]] = []
        self._generation_rows: list[dict] = []
        self.sampling = Sampling(
            max_tokens=self.max_completion_length,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k or 0,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )
        # From here on TRL takes its path for vLLM, which ends in our backend.
        self.use_vllm = True
        self.vllm_generation = _EngineBackend(self, make_engine(self))
        self._last_loaded_step = -1
        # The in-process engine samples from the trained module itself: there is nothing to correct.
        self.vllm_importance_sampling_correction = False
        self.add_callback(_ClockCallback(self))

    def requests(self, prompts: list[list[int]], num_generations: int) -> list[Request]:
        """What to ask of the engine for this rank's rows, whose groups lie one after another over the ranks."""
        first = self.accelerator.process_index * len(prompts)
        requests = []
        for offset, (ids, row) in enumerate(zip(prompts, self._generation_rows, strict=True)):
            index = (first + offset) % num_generations
            seed = sample_seed(self.args.seed, self.state.global_step, row["prompt_id"], index)
            requests.append(Request(ids, row["prompt_id"], index, seed))
        return requests

    def _prepare_inputs(self, generation_batch):
        if self.clock.running("train"):
            self.clock.stop("train")
        self._generation_rows = generation_batch
        self.generated = None
        with self.clock.phase("prepare"):
            inputs = super()._prepare_inputs(generation_batch)
        if self.generated is not None and self.traces is not None and self.model.training:
            self.traces.write(self._trace_rows(generation_batch, self.generated))
        if self.model.training:
            self.clock.start("train")
        return inputs

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        with self.clock.phase("reward"):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        first = self.accelerator.process_index * len(prompts)
        self.local_rewards = [
            {
                name: None if value != value else value  # TRL writes NaN for None
                for name, value in zip(self.reward_func_names, row, strict=True)
            }
            for row in rewards[first : first + len(prompts)].tolist()
        ]
        return rewards

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        if torch.is_grad_enabled():
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        with self.clock.phase("reference" if model is self.ref_model else "old_logprobs"):
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    def _trace_rows(self, rows: list[dict], rollouts: list[Rollout]) -> list[TraceRow]:
        first = self.accelerator.process_index * len(rows)
        # TRL keeps the gathered advantages of the whole generation batch, in its order.
        advantages = list(self._logs["advantages"])[first : first + len(rows)]
        texts = self.processing_class.batch_decode([r.token_ids for r in rollouts], skip_special_tokens=True)
        return [
            TraceRow.of(self.state.global_step, rollout, rewards, advantage, row["problem"], text)
            for row, rollout, rewards, advantage, text in zip(
                rows, rollouts, self.local_rewards, advantages, texts, strict=True
            )
        ]


def as_trl_reward(name: str, reward: Reward) -> Callable:
    """TRL's signature around one of ours, which sees the completion's text and its row."""

    def rewards(prompts, completions, completion_ids, **columns) -> list[float | None]:
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        rows = [{k: v[i] for k, v in columns.items() if isinstance(v, list)} for i in range(len(texts))]
        return [reward(text, row) for text, row in zip(texts, rows, strict=True)]

    rewards.__name__ = name
    return rewards


def in_process_engine(batch_size: int, trainer: GRPOTrainer) -> InProcessEngine:
    """The engine that generates with the trainer's own module."""

    def unwrapped() -> AbstractContextManager:
        return unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
        )

    return InProcessEngine(unwrapped, trainer.eos_token_ids, trainer.processing_class.pad_token_id, batch_size)


def arguments_of(run: GRPORun) -> trl.GRPOConfig:
    """TRL's configuration of `run`, with what our own sections decide."""
    return trl_arguments(
        trl.GRPOConfig,
        **hardware_defaults(run.trl),
        model_init_kwargs=model_init_kwargs(run.model),
        reward_weights=list(run.rewards.values()),
        remove_unused_columns=False,
    )


def build(
    run: GRPORun, arguments: trl.GRPOConfig, tokenizer: PreTrainedTokenizerBase, dataset: Dataset
) -> GRPOTrainer:
    """The trainer of `run`, ready to train."""
    rewards = select(run.rewards)
    trainer = GRPOTrainer(
        make_engine=functools.partial(in_process_engine, run.rollout.batch_size),
        traces=TraceWriter(arguments.output_dir, arguments.process_index),
        model=model_path(run.model),
        reward_funcs=[as_trl_reward(name, reward) for name, reward in rewards.items()],
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    show_progress(trainer, COLUMNS)
    return trainer


def train(run: GRPORun) -> None:
    """Train from `run.model` and save the policy into `output_dir`."""
    select(run.rewards)
    set_up_process()
    tokenizer = load_tokenizer(run.model)
    context = load_model_config(run.model).max_position_embeddings
    completion = trl_value(run, "max_completion_length")
    dataset = prompt_dataset(run.data, tokenizer, run.model.path, context, completion)
    arguments = arguments_of(run)
    checkpoint = open_folder(run, "grpo")
    trainer = build(run, arguments, tokenizer, dataset)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
