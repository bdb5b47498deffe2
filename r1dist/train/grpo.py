"""GRPO: a narrow subclass of TRL's trainer that lets an `Engine` generate, and sees every rollout through.

Overridden are only the methods named in `OVERRIDDEN`, each of which calls `super()`. A contract test holds
their names and signatures against the pinned TRL.
"""

import functools
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import trl
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl.trainer.utils import selective_log_softmax

from ..config import GRPORun
from ..data.prompts import prompt_dataset
from ..data.templates import prompt_ids
from ..errors import RunStopped, UserError, VerifiersBroken
from ..models import load_model_config, load_tokenizer, model_init_kwargs, model_path
from ..parse import trl_value
from ..process import set_up_process
from ..report.progress import show_progress
from ..report.traces import TraceRow, TraceWriter
from ..rewards import VERIFIERS, Rewards, Scorer
from ..rewards.pool import Pool
from ..rollout.in_process import InProcessEngine
from ..rollout.protocol import Engine, Request, Rollout, RolloutsLost, Sampling, sample_seed
from .backend import EngineBackend
from .checkpoints import ResumableTrainer
from .curriculum import judge, pass_rates
from .dynamic import Resampler
from .engines import in_process_engine, managed_servers, server_engine, servers_folder
from .loss import TrainerOfGroups
from .microbatch import regrouped
from .order import SeededOrder
from .reference import REFERENCE, link, load_reference, replace_trl_callback
from .shared import computing_dtype, hardware_defaults, lora_config, run_folder, trl_arguments
from .tally import texts_gathered

OVERRIDDEN = (
    "_get_train_sampler",
    "_prepare_inputs",
    "_generate_and_score_completions",
    "_calculate_rewards",
    "_get_per_token_logps_and_entropies",
    "_compute_loss",
)
COLUMNS = {
    "reward": "reward",
    "accuracy": "rewards/accuracy/mean",
    "format": "rewards/format/mean",
    "tokens": "completions/mean_length",
    "seconds": "step_time",
}


class _ClockCallback(TrainerCallback):
    """Ends the phase `train` with the optimizer step, logs the seconds of all phases; tells the order of its epoch."""

    def __init__(self, trainer: "GRPOTrainer"):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.begin_epoch(int(state.epoch or 0))

    def on_step_end(self, args, state, control, **kwargs):
        trainer, clock = self.trainer, self.trainer.clock
        if clock.running("train"):
            clock.stop("train")
        trainer.note_memory("train")
        for name, value in trainer.tally.settle().items():
            trainer.note(name, value)
        for phase, seconds in clock.take().items():
            trainer.note(f"seconds/{phase}", seconds)


class GRPOTrainer(ResumableTrainer, TrainerOfGroups):
    """`trl.GRPOTrainer` whose completions come from an `Engine`, with traces and a clock by phase.

    Args:
        make_engine: Builds the engine from this trainer, once TRL has prepared the model.
        dynamic_sampling: The YAML's `train.dynamic_sampling`.
        pass_rate: The YAML's `train.pass_rate`, which needs `traces`.
        rewards: What TRL's `reward_funcs` are made of; verification starts as rollouts arrive.
        traces: Where each rollout is written; None writes none.
        **kwargs: `TrainerOfGroups`'s and `trl.GRPOTrainer`'s own arguments.
    """

    def __init__(
        self,
        *,
        make_engine: Callable[["GRPOTrainer"], Engine],
        rewards: Rewards,
        traces: TraceWriter | None,
        dynamic_sampling: int = 0,
        pass_rate: list[float] | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.rewards = rewards
        self.traces = traces
        self.resampler = Resampler(self, dynamic_sampling) if dynamic_sampling else None
        self.resampling = False
        self.pass_rate = pass_rate
        self.generated: list[Rollout] | None = None
        self.local_rewards: list[dict[str, float | None]] = []
        self.generation_rows: list[dict] = []
        self._generated_at: int | None = None  # the micro-step before which the rollouts at hand were made
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
        self.vllm_generation = EngineBackend(self, make_engine(self), self.max_staleness)
        self._last_loaded_step = -1
        if isinstance(self.vllm_generation.engine, InProcessEngine):
            # It samples from the trained module itself: there is nothing to correct.
            self.vllm_importance_sampling_correction = False
        self.corrects_late = self.corrects_late and self.vllm_importance_sampling_correction
        self.add_callback(_ClockCallback(self))
        replace_trl_callback(self)

    def note_memory(self, phase: str) -> None:
        """Log the GiB in use on this GPU at the end of `phase`, by all processes: allocators keep their peak."""
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            self.note(f"memory/{phase}", (total - free) / 2**30)

    @torch.no_grad()
    def score(self, tokens: list[int]) -> list[float]:
        """The policy's logprob of each token but the first, at temperature 1. A collective under ZeRO-3."""
        was_training = self.model.training
        self.model.eval()
        logits = self.model(input_ids=torch.tensor([tokens], device=self.accelerator.device)).logits[0, :-1]
        self.model.train(was_training)
        following = torch.tensor(tokens[1:], device=logits.device)
        return selective_log_softmax(logits.float(), following).tolist()

    def begin_epoch(self, epoch: int) -> None:
        """Set the order of an epoch's prompts. A collective where pass rates decide."""
        self.order.set_epoch(epoch)
        if self.pass_rate is None:
            return
        begins = self.step_of(epoch * self.order.generations)
        rates = pass_rates(self.traces.all_rows(), begins) if self.accelerator.is_main_process else {}
        (rates,) = broadcast_object_list([rates])
        self.order.verdict = judge(rates, self.train_dataset["prompt_id"], *self.pass_rate)
        if self.state.global_step == begins:  # not where a run is taken up within the epoch
            self.note("curriculum/unfit", len(self.order.verdict.unfit) / len(self.train_dataset))

    @property
    def generation(self) -> int:
        """The number of the generation that is at hand, from the run's beginning."""
        return self._step // self.generation_every

    def step_of(self, generation: int) -> int:
        """The optimizer step at which a generation is due."""
        return generation * self.generation_every // self.args.gradient_accumulation_steps

    def rows_of(self, generation: int) -> list[dict] | None:
        """This rank's rows of a generation to come; None after the last."""
        if self.step_of(generation) >= self.state.max_steps:
            return None
        mine = self.args.per_device_train_batch_size * self.args.steps_per_generation
        indices = self.order.rows_of(generation, mine * self.args.world_size)
        first = mine * self.args.process_index
        return [self.train_dataset[i] for i in indices[first : first + mine]]

    def prompt_ids_of(self, rows: list[dict]) -> list[list[int]]:
        return self._tokenize_prompts([row["prompt"] for row in rows])[0]

    def requests(self, prompts: list[list[int]], rows: list[dict], num_generations: int, step: int) -> list[Request]:
        """What to ask of the engine for this rank's rows, whose groups lie one after another over the ranks."""
        first = self.accelerator.process_index * len(prompts)
        requests = []
        for offset, (ids, row) in enumerate(zip(prompts, rows, strict=True)):
            index = (first + offset) % num_generations
            seed = sample_seed(self.args.seed, step, row["prompt_id"], index)
            requests.append(Request(ids, row["prompt_id"], index, seed))
        return requests

    def position(self) -> dict[str, Any]:
        return {
            **super().position(),
            "micro_steps": self._step,
            "generated_at": self._generated_at,
            "rollouts": self._buffered_inputs if self.in_generation() else None,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "trace_bytes": self.traces.size() if self.traces else 0,
        }

    def take_position(self, position: dict[str, Any]) -> None:
        super().take_position(position)
        self._step = position["micro_steps"]
        self._generated_at = position["generated_at"]
        self._buffered_inputs = position["rollouts"]
        self._metrics["train"].update(position["metrics"])
        if self.traces is not None:
            self.traces.cut(position["trace_bytes"])

    def in_generation(self) -> bool:
        begun = self._step % (self.args.steps_per_generation * self.num_iterations) != 0
        return self._buffered_inputs is not None and (begun or self._generated_at == self._step)

    def restore(self, checkpoint: Path) -> None:
        if (checkpoint / REFERENCE).exists():
            load_reference(self.accelerator.unwrap_model(self.ref_model), checkpoint / REFERENCE)

    def write_more(self, checkpoint: Path) -> None:
        if (Path(self.args.output_dir) / REFERENCE).exists():
            link(Path(self.args.output_dir) / REFERENCE, checkpoint / REFERENCE)

    def _get_train_sampler(self, dataset=None):
        self.order = SeededOrder(super()._get_train_sampler(dataset))
        return self.order

    def _prepare_inputs(self, generation_batch):
        if self.clock.running("train"):
            self.clock.stop("train")
        if self.model.training and self._generated_at == self._step:
            # A checkpoint held these rollouts, which nothing was trained on yet.
            self.clock.start("train")
            return self._buffered_inputs[self._step % self.args.steps_per_generation]
        self.generated = None
        self.vllm_generation.look()
        with self.clock.phase("prepare"), self.correcting_late():
            inputs = super()._prepare_inputs(generation_batch)
        if self.model.training:
            if self.generated is not None:
                inputs = self._take_up(inputs)
                self._generated_at = self._step
                self.note_generation()
            self.clock.start("train")
        return inputs

    def begin_rewards(self, step: int, row: dict, rollout: Rollout) -> None:
        """Let verification start on a rollout of `step`, while others are still on their way."""
        self.watchdog.beat()
        text = self.processing_class.decode(rollout.token_ids, skip_special_tokens=True)
        self.rewards.begin(step, text, row)

    def _generate_and_score_completions(self, inputs):
        theirs = super()._generate_and_score_completions

        def generate(rows: list[dict]) -> dict[str, torch.Tensor]:
            self.generation_rows = rows
            with texts_gathered(self.log_completions):
                scored = theirs(rows)
            if (ratio := scored.get("importance_sampling_ratio")) is not None:  # else it is found in the loss
                scored["importance_sampling_ratio"] = self.held_to_clip(ratio, scored["old_per_token_logps"], scored)
            return self._traced(rows, scored)

        scored = generate(inputs)
        if self.resampler is None or not self.model.training:
            return scored
        self.resampling = True
        try:
            return self.resampler.fill(inputs, scored, generate)
        finally:
            self.resampling = False

    def _traced(self, rows: list[dict], scored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.traces is not None and self.model.training:
            self.traces.write(self._trace_rows(rows, self.generated, scored["advantages"].tolist()))
        return scored

    def _take_up(self, inputs: dict) -> dict:
        """Group by length what was just generated, and return what the first micro-step trains on."""
        if not self.groups:
            return inputs
        accumulated = self.args.gradient_accumulation_steps
        self._buffered_inputs = regrouped(self._buffered_inputs, accumulated, self.grouping)
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        with self.clock.phase("reward"):
            self._settle_or_stop()
            groups = group_tokens(inputs, completion_ids_list)
            rows = [{**row, "group_tokens": tokens} for row, tokens in zip(inputs, groups, strict=True)]
            rows = self.rewards.graded(self.state.global_step, texts_of(completions), rows)
            rewards = super()._calculate_rewards(rows, prompts, completions, completion_ids_list)
        for name, unscored in zip(self.reward_func_names, rewards.isnan().sum(0).tolist(), strict=True):
            self.note(f"rewards/{name}/unscored", unscored)
        first = self.accelerator.process_index * len(prompts)
        self.local_rewards = [
            {
                name: None if value != value else value  # TRL writes NaN for None
                for name, value in zip(self.reward_func_names, row, strict=True)
            }
            for row in rewards[first : first + len(prompts)].tolist()
        ]
        return rewards

    def _settle_or_stop(self) -> None:
        """Wait for this rank's verification. Where it is broken on one rank, every rank raises `VerifiersBroken`."""
        pool = self.rewards.pool
        broken = pool.settle()
        outcomes = gather_object([(broken, pool.counts.copy())])
        pool.counts.clear()
        reasons = [reason for reason, _ in outcomes if reason is not None]
        if reasons:
            raise VerifiersBroken(reasons[0])
        for name, count in sum((counts for _, counts in outcomes), Counter()).items():
            self.note(f"verify/{name}", count)

    def _trace_rows(self, rows: list[dict], rollouts: list[Rollout], advantages: list[float]) -> list[TraceRow]:
        texts = self.processing_class.batch_decode([r.token_ids for r in rollouts], skip_special_tokens=True)
        return [
            TraceRow.of(self.state.global_step, rollout, rewards, advantage, row["problem"], text)
            for row, rollout, rewards, advantage, text in zip(
                rows, rollouts, self.local_rewards, advantages, texts, strict=True
            )
        ]


def as_trl_reward(name: str, scorer: Scorer, from_step: int) -> Callable:
    """TRL's signature around one of ours, which sees completions' texts and their rows."""

    def rewards(prompts, completions, completion_ids, trainer_state, **columns) -> list[float | None]:
        if trainer_state.global_step < from_step:
            return [None] * len(completions)
        texts = texts_of(completions)
        rows = [
            {**{k: v[i] for k, v in columns.items() if isinstance(v, list)}, "tokens": len(ids)}
            for i, ids in enumerate(completion_ids)
        ]
        return scorer(texts, rows)

    rewards.__name__ = name
    return rewards


def texts_of(completions: list[str] | list[list[dict]]) -> list[str]:
    """The texts of completions, which TRL gives as messages where the prompt was a conversation."""
    return [c if isinstance(c, str) else c[-1]["content"] for c in completions]


def group_tokens(rows: list[dict], completion_ids: list[list[int]]) -> list[list[int]]:
    """For each row, the tokens of all completions of its prompt. A collective: groups may straddle ranks."""
    lengths = [(row["prompt_id"], len(ids)) for row, ids in zip(rows, completion_ids, strict=True)]
    by_prompt = defaultdict(list)
    for prompt, tokens in gather_object(lengths):
        by_prompt[prompt].append(tokens)
    return [by_prompt[row["prompt_id"]] for row in rows]


def arguments_of(run: GRPORun) -> trl.GRPOConfig:
    """TRL's configuration of `run`, with what our own sections decide."""
    return trl_arguments(
        trl.GRPOConfig,
        **hardware_defaults(run.trl),
        model_init_kwargs=model_init_kwargs(run.model),
        reward_weights=[reward.weight for reward in run.rewards.values()],
        remove_unused_columns=False,
    )


def build(
    run: GRPORun,
    arguments: trl.GRPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    rewards: Rewards,
) -> GRPOTrainer:
    """The trainer of `run`, ready to train. Raises `UserError` for what this machine cannot do."""
    if run.train.activation_offload and not torch.cuda.is_available():
        raise UserError("train.activation_offload spares a GPU's memory, and there is no GPU here. Leave it out.")
    if run.rollout.engine == "vllm":
        probe = prompt_ids(tokenizer, dataset[0]["prompt"])
        dtype = run.rollout.serve.dtype
        dtype = computing_dtype(arguments, run.model.dtype) if dtype == "auto" else dtype
        make_engine = functools.partial(server_engine, run.rollout, servers_folder(run), dtype, probe)
    else:
        make_engine = functools.partial(in_process_engine, run.rollout.batch_size)
    trainer = GRPOTrainer(
        make_engine=make_engine,
        rewards=rewards,
        traces=TraceWriter(arguments.output_dir, arguments.process_index),
        max_staleness=run.rollout.max_staleness,
        dynamic_sampling=run.train.dynamic_sampling,
        pass_rate=run.train.pass_rate,
        token_budget=run.train.token_budget,
        activation_offload=run.train.activation_offload,
        stall_timeout=run.train.stall_timeout,
        model=model_path(run.model),
        reward_funcs=[
            as_trl_reward(name, scorer, run.rewards[name].from_step) for name, scorer in rewards.scorers.items()
        ],
        args=arguments,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=lora_config(run.model.lora),
    )
    show_progress(trainer, COLUMNS)
    return trainer


def train(run: GRPORun) -> None:
    """Train from `run.model` and save the policy into `output_dir`."""
    set_up_process()
    with Pool(VERIFIERS, run.verify, share=int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) as pool:
        _train(run, pool)


def _train(run: GRPORun, pool: Pool) -> None:
    # Before TRL's arguments: once they have told transformers of ZeRO 3, a reward model would be sharded, too.
    rewards = Rewards(run.rewards, pool)
    tokenizer = load_tokenizer(run.model)
    context = load_model_config(run.model).max_position_embeddings
    completion = trl_value(run, "max_completion_length")
    dataset = prompt_dataset(run.data, tokenizer, run.model.path, context, completion)
    arguments = arguments_of(run)
    with run_folder(run, "grpo") as checkpoint, managed_servers(run, arguments, dataset):
        trainer = build(run, arguments, tokenizer, dataset, rewards)
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except (RolloutsLost, VerifiersBroken) as error:
            raise RunStopped(f"{error}\n{save_before_stopping(trainer)}") from error
        finally:
            trainer.vllm_generation.close()
        trainer.save_model()
    # Ranks that end one before the other, their process group still open, abort now and then.
    trainer.accelerator.end_training()


def save_before_stopping(trainer: GRPOTrainer) -> str:
    """Save a checkpoint, unless nothing was learnt yet; says where it is."""
    step = trainer.state.global_step
    if step == 0:
        return "No step was finished, so there is nothing to save."
    trainer.save_where_it_began()
    return f"Step {step} is saved in {trainer.args.output_dir}; --resume goes on from there."
