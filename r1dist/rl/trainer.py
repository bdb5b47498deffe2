"""The GRPO step: take a generation's rollouts, compute logprobs, compute the loss, log once per step.

`trl.GRPOTrainer` loads the models, wraps them for DeepSpeed or PEFT, and runs the optimizer loop and the logging.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import trl
from accelerate.utils import broadcast_object_list, gather_object
from transformers import Trainer
from trl.models.activation_offloading import get_act_offloading_ctx_manager
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import RepeatSampler, use_adapter

from ..config import TrainRL
from ..data.curriculum import filter_by_pass_rate, pass_rates
from ..data.order import PromptOrder
from ..data.templates import Template
from ..evaluation.training import TrainingEvaluation
from ..generation.engine import Engine
from ..generation.local import InProcessEngine
from ..generation.traces import TraceWriter
from ..rewards import Rewards
from ..run.accumulation import without_gradient_exchange
from ..run.checkpoints import ResumableTrainer
from ..run.clock import PhaseClock
from ..run.metrics import StepMetrics, memory_gib
from ..run.reporting import Reporting
from ..run.schedule import GenerationSchedule
from .batch import MicroBatch, MicroBatching, RolloutBatch, build_micro_batches
from .logprobs import batch_logprobs, forward
from .loss import LossConfig, grpo_loss, loss_normalizer
from .prompts import Prompts
from .reference import restore_reference, save_reference_link, use_reference_reset
from .rollouts import RolloutPipeline
from .shared_attention import ATTENTION, VARLEN_ATTENTION


class GRPOTrainer(ResumableTrainer, trl.GRPOTrainer):
    """Trains on the batches of a `RolloutPipeline`.

    Args:
        make_engine: Builds the engine from this trainer, once TRL has prepared the model.
        rewards: Scores rollouts.
        template: Of the prompts; its tokenizer is TRL's `processing_class`.
        settings: The YAML's `train`.
        max_staleness: The YAML's `rollout.max_staleness`.
        traces: Where rollouts are written; None writes none.
        evaluation: What `eval_strategy` measures; None: nothing.
        **kwargs: `trl.GRPOTrainer`'s own arguments.
    """

    def __init__(
        self, *, make_engine: Callable[["GRPOTrainer"], Engine], rewards: Rewards, template: Template,
        settings: TrainRL, max_staleness: int = 0, traces: TraceWriter | None = None,
        evaluation: TrainingEvaluation | None = None, **kwargs,
    ):  # fmt: skip
        # TRL wants reward functions; what would call them is not used.
        kwargs |= {"reward_funcs": [rewards.score], "processing_class": template.tokenizer}
        super().__init__(stall_timeout=settings.stall_timeout, **kwargs)
        self.rewards, self.template, self.settings = rewards, template, settings
        self.max_staleness, self.traces, self.evaluation = max_staleness, traces, evaluation
        self.clock, self.step_metrics = PhaseClock(), StepMetrics()
        self.engine = make_engine(self)
        self.offload = get_act_offloading_ctx_manager(self.model) if settings.activation_offload else nullcontext()
        # The in-process engine draws from the trained module itself: there is nothing to correct.
        corrected = not isinstance(self.engine, InProcessEngine)
        self.loss_config = LossConfig.of(self.args, corrected=corrected, stale=max_staleness > 0)
        kernel, regroup = self.model.config._attn_implementation or "", self.loss_type != "bnpo"
        packed = kernel == VARLEN_ATTENTION or "flash" in kernel
        # A router's load-balancing loss is over the tokens of a forward, in which a prompt counts for each rollout.
        sharing = kernel in (ATTENTION, VARLEN_ATTENTION) and not self.aux_loss_enabled
        self.micro_batching = MicroBatching(
            self.processing_class.pad_token_id, settings.token_budget, packed, sharing, regroup,
            self.args.process_index, self.args.world_size, gather_object, self.accelerator.device.type,
        )  # fmt: skip
        self.pipeline: RolloutPipeline | None = None
        self.batch: RolloutBatch | None = None
        self.used_prompts: dict[int, set[int]] = {}  # the pipeline's, as a checkpoint had them
        self.micro_batches: list[list[MicroBatch]] = []  # of `batch`, by micro-step
        self.micro_step = 0  # from the run's beginning, with the accumulation of this start
        self.step_seconds = 0.0
        use_reference_reset(self)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One micro-step: forward and backward of each micro-batch; gradients are exchanged after the last."""
        began = time.perf_counter()
        *early, last = self._next_micro_batches()
        with without_gradient_exchange(self.accelerator, model):
            losses = [Trainer.training_step(self, model, micro_batch) for micro_batch in early]
        loss = sum(losses) + Trainer.training_step(self, model, last)
        self.micro_step += 1
        self.step_seconds += time.perf_counter() - began
        self.end_micro_step()
        return loss

    def _prepare_inputs(self, inputs: MicroBatch) -> MicroBatch:
        return inputs.to(self.accelerator.device)

    def _compute_loss(self, model, inputs: MicroBatch) -> torch.Tensor:
        """The micro-batch's share of the optimizer step's loss; shares add up over micro-batches, ranks average."""
        micro_steps = self.current_gradient_accumulation_steps
        rollouts = self.args.per_device_train_batch_size * micro_steps
        normalizer = loss_normalizer(self.loss_config, rollouts, inputs.micro_step_tokens * micro_steps)
        with self.offload, self.accelerator.autocast():
            output = forward(model, inputs, self.micro_batching.packed, self.aux_loss_enabled)
        loss, metrics = grpo_loss(
            output.logprobs, inputs.old_logprobs, inputs.reference_logprobs, inputs.sampler_logprobs,
            inputs.advantages, inputs.mask, self.loss_config, normalizer,
        )  # fmt: skip
        metrics.add_mean("entropy", output.entropy, inputs.mask)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * output.router_loss * len(inputs.mask) / rollouts
            metrics.means["aux_loss"] = (output.router_loss, torch.ones_like(output.router_loss))
        self.step_metrics.add(metrics)
        return loss

    def _next_micro_batches(self) -> list[MicroBatch]:
        """The micro-batches of this micro-step, after a new generation if one is due. A collective."""
        self.clock.stop_if_running("train")
        generation, place = divmod(self.micro_step, self.schedule.micro_steps)
        if not self.in_generation():
            self.batch, self.micro_batches = self._next_batch(generation), []
            if generation == self.schedule.generations_of(self.state.global_step)[0]:
                self.mark_step_start()  # should the step be interrupted, the rollouts are kept
        if not self.micro_batches:
            steps, accumulation = self.args.steps_per_generation, self.args.gradient_accumulation_steps
            self.micro_batches = build_micro_batches(self.batch, steps, accumulation, self.micro_batching)
        self.pipeline.source.poll(generation)
        self.clock.start("train")
        return self.micro_batches[place % self.args.steps_per_generation]

    def _next_batch(self, generation: int) -> RolloutBatch:
        """The generation's rollouts with the logprobs that stay fixed while they are trained on."""
        with self.clock.phase("prepare"):
            batch = self.pipeline.next_batch(generation)
            self._log_batch(batch)
            checkpointing = self.args.gradient_checkpointing_kwargs
            with disable_gradient_checkpointing(self.model, checkpointing), self.accelerator.autocast():
                # Within one optimizer step the policy does not move: then its own forward gives the old logprobs.
                if self.args.gradient_accumulation_steps % self.schedule.micro_steps:
                    with self.clock.phase("old_logprobs"):
                        batch.old_logprobs = self._logprobs(self.model, batch)
                if self.loss_config.beta:
                    with self.clock.phase("reference"):
                        batch.reference_logprobs = self._reference_logprobs(batch)
        # Each of the generation's optimizer steps gets rollouts of all groups, as in TRL.
        return batch.select(torch.randperm(len(batch)).tolist())

    def _logprobs(self, model, batch: RolloutBatch) -> list[torch.Tensor]:
        rollouts, heartbeat = self.args.per_device_train_batch_size, self.watchdog.heartbeat
        return batch_logprobs(model, batch, rollouts, self.micro_batching, self.accelerator.device, heartbeat)

    def _reference_logprobs(self, batch: RolloutBatch) -> list[torch.Tensor]:
        if self.ref_model is not None:
            return self._logprobs(self.ref_model, batch)
        policy = self.accelerator.unwrap_model(self.model)  # with adapters, whose base model is the reference
        with use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None):
            return self._logprobs(self.model, batch)

    # The order of prompts, generations and steps.

    def _get_train_sampler(self, dataset=None) -> PromptOrder:
        repeats = self.num_iterations * self.args.steps_per_generation
        prompts = self.args.generation_batch_size // self.num_generations
        shuffle, seed = self.shuffle_dataset, self.args.seed
        sampler = RepeatSampler(self.train_dataset, self.num_generations, prompts, repeats, shuffle, seed)
        self.order = PromptOrder(sampler, max(1, self.args.gradient_accumulation_steps // repeats))
        self.schedule = GenerationSchedule(self.args.gradient_accumulation_steps, repeats, self.order.generations)
        return self.order

    def begin_training(self) -> None:
        """Build the pipeline, and find the place to begin at. A collective."""
        rollouts = self.args.generation_batch_size // self.args.world_size
        prompts = Prompts(
            self.train_dataset, self.order, self.schedule, self.state.max_steps, self.num_generations, rollouts,
            self.args.seed, self.args.process_index, self.args.world_size,
        )  # fmt: skip
        self.pipeline = RolloutPipeline(
            self.engine, prompts, self.rewards, self.template, self.args, self.settings.dynamic_sampling,
            self.max_staleness, Reporting(self.log_value, self.watchdog.heartbeat, self.clock), self.traces,
        )  # fmt: skip
        self.micro_step = self.schedule.micro_step_at(self.state.global_step)
        self.pipeline.used = self.used_prompts

    def begin_epoch(self, epoch: int) -> None:
        """Set the order of an epoch's prompts. A collective where pass rates decide."""
        self.order.set_epoch(epoch)
        if self.settings.pass_rate is None:
            return
        first_step, prompt_ids = self.schedule.step_of(epoch * self.order.generations), self.train_dataset["prompt_id"]
        rates = pass_rates(self.traces.all_rows(), first_step) if self.accelerator.is_main_process else {}
        rates = broadcast_object_list([rates])[0]
        self.order.pass_rate_filter = filter_by_pass_rate(rates, prompt_ids, *self.settings.pass_rate)
        if self.state.global_step == first_step:  # not where a run resumes within the epoch
            self.log_value("curriculum/dropped", len(self.order.pass_rate_filter.drop) / len(prompt_ids))

    # Logging, once per optimizer step.

    def log_value(self, name: str, value: float) -> None:
        """TRL logs the mean of the values since the last log line."""
        self._metrics["train"][name].append(value)

    def measure(self) -> dict[str, float]:
        step = self.state.global_step
        with self.clock.phase("evaluate"), self.pipeline.source.with_weights(step) as engine:
            return self.evaluation.measure(engine, step, self.watchdog.heartbeat)

    def end_step(self) -> None:
        """A collective."""
        self.clock.stop_if_running("train")
        values = {"step_time": self.step_seconds, **self.step_metrics.gather(), **self.clock.take()}
        values["memory/train"] = memory_gib()
        self.step_seconds = 0.0
        for name, value in values.items():
            self.log_value(name, value)

    def _log_batch(self, batch: RolloutBatch) -> None:
        """A collective with `log_completions`, TRL's table."""
        self.state.num_input_tokens_seen += self.pipeline.take_tokens_generated()
        self._metrics["train"]["num_tokens"] = [self.state.num_input_tokens_seen]
        if self.log_completions:
            columns = {"prompt": batch.prompts, "completion": batch.texts, "advantages": batch.advantages.tolist()}
            for log, of in ((self._logs, columns), (self._logs["rewards"], batch.rewards)):
                for name, values in of.items():
                    log[name].extend(gather_object(values))

    def close(self) -> None:
        """Cancel what is generated ahead, and release the engine."""
        (self.pipeline.source if self.pipeline else self.engine).close()

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "batch": vars(self.batch) if self.in_generation() else None,
            "used_prompts": {step: list(used) for step, used in self.pipeline.used.items()},
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "trace_bytes": self.traces.size() if self.traces else 0,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.batch = None if state["batch"] is None else RolloutBatch(**state["batch"])
        self.used_prompts = {step: set(used) for step, used in state.get("used_prompts", {}).items()}
        self._metrics["train"].update(state["metrics"])
        if self.traces is not None:
            self.traces.truncate(state["trace_bytes"])

    def in_generation(self) -> bool:
        return self.batch is not None and self.batch.number == self.micro_step // self.schedule.micro_steps

    def batch_shape(self) -> dict[str, int]:
        return {**super().batch_shape(), "generation_rows": self.args.generation_batch_size}

    def load_shared(self, checkpoint: Path | None) -> None:
        restore_reference(self, checkpoint)

    def save_shared(self, checkpoint: Path) -> None:
        save_reference_link(self, checkpoint)
