"""TRL's loss over micro-batches of ours: grouped by length, cut to a token budget, packed, waiting for nobody.

What is learnt is what TRL would learn; tests hold loss and gradient against TRL's own, ungrouped.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import trl
from accelerate.utils import gather_object
from trl.models.activation_offloading import get_act_offloading_ctx_manager

from .clock import PhaseClock
from .importance import CLIPPED, importance_ratio, within_clip
from .microbatch import ROW_MEANS, Grouping, forwards_needed, logprobs_by_length, may_group
from .packing import pack, unpack
from .tally import Tally


class TrainerOfGroups(trl.GRPOTrainer):
    """`trl.GRPOTrainer` whose micro-step may be given several micro-batches, of any number of rows.

    Args:
        token_budget: The YAML's `train.token_budget`.
        activation_offload: The YAML's `train.activation_offload`.
        max_staleness: The YAML's `rollout.max_staleness`.
        **kwargs: `trl.GRPOTrainer`'s own arguments.
    """

    def __init__(
        self, *, token_budget: int | None = None, activation_offload: bool = False, max_staleness: int = 0, **kwargs
    ):
        super().__init__(**kwargs)
        self._kept_apart = get_act_offloading_ctx_manager(self.model) if activation_offload else nullcontext()
        self.clock = PhaseClock()
        self.tally = Tally()
        self.generation_every = self.args.steps_per_generation * self.num_iterations
        # Where each rollout is trained on before the policy moves, the old logprobs are those of its own forward.
        self.corrects_late = self.args.gradient_accumulation_steps % self.generation_every == 0
        self.max_staleness = max_staleness
        # TRL clips by how far the policy moves from where a generation is taken up; how far it had moved since the
        # rollouts were drawn is left out. Without a bound on that, steps in a row overshoot: R1-Zero lost its format.
        self.clips_to_sampler = max_staleness > 0 and self.loss_type in CLIPPED
        self.groups = may_group(self.args) and not self.aux_loss_enabled
        self._correcting: dict[str, torch.Tensor] | None = None
        self._packs = "flash" in (self.model.config._attn_implementation or "")
        self.grouping = Grouping(
            self._tokenizer.pad_token_id, token_budget, self._packs, self.args.process_index, self.args.world_size,
            gather_object,
        )  # fmt: skip

    def note(self, name: str, value: float) -> None:
        """Log the mean of such values until the next log line."""
        self._metrics["train"][name].append(value)

    @contextmanager
    def correcting_late(self) -> Iterator[None]:
        """Keep TRL from a forward of its own for the importance ratio, which `_compute_loss` finds on its way."""
        corrects = self.vllm_importance_sampling_correction
        self.vllm_importance_sampling_correction = corrects and not self.corrects_late
        try:
            yield
        finally:
            self.vllm_importance_sampling_correction = corrects

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **kwargs
    ):
        if torch.is_grad_enabled():
            found = self._logprobs(model, input_ids, attention_mask, logits_to_keep, **kwargs)
            if self._correcting is not None:
                self._correct(found[0].detach())
            return found

        def score(ids: torch.Tensor, mask: torch.Tensor, keep: int) -> torch.Tensor:
            return self._logprobs(model, ids, mask, keep)[0]

        with self.clock.phase("reference" if model is self.ref_model else "old_logprobs"):
            chunks = math.ceil(len(input_ids) / (batch_size or len(input_ids)))
            chunks = max(chunks, self._chunks_within_budget(attention_mask))
            found = logprobs_by_length(score, input_ids, attention_mask, logits_to_keep, chunks, self.grouping)
            return found, None, None

    def _logprobs(self, model, input_ids, attention_mask, keep, compute_entropy=False, **kwargs) -> tuple:
        """As TRL's `_get_per_token_logps_and_entropies`, of one forward, which is packed where that is worth it."""
        if not self._packs:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, keep, compute_entropy=compute_entropy, **kwargs
            )
        packed = pack(input_ids, attention_mask, keep)
        with self.accelerator.autocast():
            output = model(
                input_ids=packed.input_ids, position_ids=packed.position_ids, labels=packed.labels, fused_lm_head=True
            )
        logprobs = unpack(output.log_probs, packed, input_ids.shape, keep)
        return logprobs, unpack(output.entropy, packed, input_ids.shape, keep) if compute_entropy else None, None

    def _chunks_within_budget(self, attention_mask: torch.Tensor) -> int:
        """Forwards that keep within the token budget, the same on every rank."""
        if self.grouping.token_budget is None:
            return 1
        return max(gather_object([forwards_needed(attention_mask.sum(1).tolist(), self.grouping)]))

    def _compute_loss(self, model, inputs):
        if not isinstance(inputs, list):  # as TRL made it
            return self._loss_of(model, inputs, super()._compute_loss)
        *early, last = inputs
        total = 0.0
        for batch in early:
            with self._accumulating(model):
                loss = self._share(batch) * self._loss_of(model, batch, super()._compute_loss)
                self.accelerator.backward(loss, **({"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}))
            total += loss.detach()
        return self._share(last) * self._loss_of(model, last, super()._compute_loss) + total

    def _share(self, batch: dict[str, torch.Tensor]) -> float:
        """What a micro-batch's loss weighs, which TRL takes for that of `per_device_train_batch_size` rows."""
        rows = len(batch["prompt_ids"])
        return rows / self.args.per_device_train_batch_size if self.loss_type in ROW_MEANS else 1.0

    def _loss_of(self, model, batch: dict[str, torch.Tensor], theirs: Callable) -> torch.Tensor:
        """TRL's loss of a micro-batch."""
        self._correcting = batch if self.corrects_late else None
        local = self.groups and self.model.training
        with self.tally.instead_of(self.accelerator, self._metrics) if local else nullcontext(), self._kept_apart:
            loss = theirs(model, batch)
        self._correcting = None
        return loss

    @contextmanager
    def _accumulating(self, model) -> Iterator[None]:
        """Gradients are added up and not yet exchanged, whatever the place in the optimizer step."""
        state = self.accelerator.gradient_state
        last = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            with self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(last)

    def _correct(self, logprobs: torch.Tensor) -> None:
        """Weigh the micro-batch at hand by what the policy makes of its tokens now, and log how far that is."""
        batch = self._correcting
        mask, sampling = batch["completion_mask"], batch["sampling_per_token_logps"]
        ratio = importance_ratio(
            logprobs, sampling, mask, self.vllm_importance_sampling_mode,
            self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max,
        )  # fmt: skip
        batch["importance_sampling_ratio"] = self.held_to_clip(ratio, logprobs, batch)
        known = mask.bool() & ~sampling.isnan()
        apart = (logprobs - sampling).abs()[known]
        weights = ratio.flatten() if ratio.size(1) == 1 else ratio[mask.bool()]
        for name, values in (("sampling_logp_difference", apart), ("importance_sampling_ratio", weights)):
            self.tally.add(f"sampling/{name}/mean", values.sum(), values.new_tensor(values.numel()))
            if values.numel():
                self.tally.values[f"sampling/{name}/min"].append(values.min().item())
                self.tally.values[f"sampling/{name}/max"].append(values.max().item())

    def held_to_clip(
        self, ratio: torch.Tensor, logprobs: torch.Tensor, batch: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """`ratio`, 0 where the policy has moved out of the clip range since stale rollouts were drawn."""
        if not self.clips_to_sampler:
            return ratio
        mask = batch["completion_mask"]
        inside = within_clip(
            logprobs, batch["sampling_per_token_logps"], mask, batch["advantages"],
            self.epsilon_low, self.epsilon_high, self.importance_sampling_level,
        )  # fmt: skip
        self.tally.add("sampling/outside_clip/mean", (~inside * mask).sum(), mask.sum())
        return ratio * inside
