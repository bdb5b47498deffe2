"""A generation's rollouts, and the micro-batches that are made of them.

The loss is a sum over rollouts with a normalizer that does not depend on how they are divided, so within an optimizer
step rollouts may be grouped freely, also across ranks: rollouts of similar length share a micro-batch, which saves
padding, and every rank gets as much work. (`bnpo` divides by the tokens of a micro-step, which stays together.)
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from trl.trainer.utils import pad

from ..data.length_groups import Rows, by_length, by_prompt
from ..generation.engine import RolloutId
from .shared_prompts import SharedPrompts, share_prompts


@dataclass
class RolloutBatch:
    """B rollouts without padding: entry i of each list is rollout i's, with P_i prompt and T_i completion tokens."""

    rollout_ids: list[RolloutId]
    prompt_ids: list[torch.Tensor]
    """int64 [P_i]"""
    completion_ids: list[torch.Tensor]
    """int64 [T_i], T_i >= 1"""
    sampler_logprobs: list[torch.Tensor]
    """float32 [T_i], of the distribution that each token was drawn from; NaN where it is unknown."""
    counts: list[bool]
    """Whether the rollout's tokens count in the loss: False with `mask_truncated_completions` for one cut off."""
    advantages: torch.Tensor
    """float32 [B]"""
    policy_versions: list[int]
    """The optimizer step whose weights drew the rollout."""
    rewards: dict[str, list[float | None]]
    """Reward name -> score of each rollout."""
    prompts: list[Any]
    """As the dataset has them, text or messages."""
    texts: list[str]
    """The completions, decoded."""
    old_logprobs: list[torch.Tensor] | None = None
    """float32 [T_i], of the policy when it received the rollouts; None: it does not move before they are used."""
    reference_logprobs: list[torch.Tensor] | None = None
    """float32 [T_i], of the reference model; None without KL."""

    def __len__(self) -> int:
        return len(self.rollout_ids)

    @property
    def number(self) -> int:
        """Of the generation."""
        return self.rollout_ids[0][0]

    @property
    def lengths(self) -> list[int]:
        """P_i + T_i."""
        return [len(p) + len(c) for p, c in zip(self.prompt_ids, self.completion_ids, strict=True)]

    @property
    def loss_tokens(self) -> int:
        """Tokens that count in the loss."""
        return sum(len(ids) for ids, counts in zip(self.completion_ids, self.counts, strict=True) if counts)

    def select(self, places: Sequence[int]) -> "RolloutBatch":
        """The rollouts at `places`, in that order."""

        def chosen(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: chosen(values) for name, values in value.items()}
            if isinstance(value, torch.Tensor):
                return value[list(places)]
            return None if value is None else [value[place] for place in places]

        return RolloutBatch(**{f.name: chosen(getattr(self, f.name)) for f in dataclasses.fields(self)})


def concatenate(batches: Sequence[RolloutBatch]) -> RolloutBatch:
    """The rollouts of `batches`, one batch after another."""

    def joined(values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            return {name: joined([value[name] for value in values]) for name in values[0]}
        if isinstance(values[0], torch.Tensor):
            return torch.cat(values)
        return None if values[0] is None else [*itertools.chain(*values)]

    return RolloutBatch(
        **{f.name: joined([getattr(b, f.name) for b in batches]) for f in dataclasses.fields(RolloutBatch)}
    )


@dataclass(frozen=True)
class MicroBatch:
    """B rollouts of one forward: prompts padded on the left to P tokens, completions on the right to T."""

    input_ids: torch.Tensor
    """[B, P + T]"""
    attention_mask: torch.Tensor
    """[B, P + T]"""
    mask: torch.Tensor
    """[B, T], 1 where a completion's token counts in the loss."""
    advantages: torch.Tensor
    """[B]"""
    sampler_logprobs: torch.Tensor
    """[B, T]"""
    old_logprobs: torch.Tensor | None
    """[B, T]"""
    reference_logprobs: torch.Tensor | None
    """[B, T]"""
    micro_step_tokens: float = 0.0
    """What a token-normalized loss divides by for this micro-step, see `build_micro_batches`."""
    shared: SharedPrompts | None = None
    """The same tokens with each prompt once. None: the forward takes `input_ids`."""

    def to(self, device: torch.device) -> "MicroBatch":
        return MicroBatch(**send_to_device(vars(self), device))


def collate(
    batch: RolloutBatch, pad_id: int, micro_step_tokens: float = 0.0, shared: bool = False, device_type: str = "cpu",
    by_varlen: bool = False,
) -> MicroBatch:  # fmt: skip
    """All rollouts of `batch` as one micro-batch, as wide as the longest prompt and the longest completion.

    `shared`: the forward holds each prompt once; rollouts of one prompt follow one another. `device_type` and
    `by_varlen` are those of `share_prompts`.
    """

    def padded(values: list[torch.Tensor] | None, value: float, side: str = "right") -> torch.Tensor | None:
        return None if values is None else pad(values, padding_value=value, padding_side=side)

    def ones(values: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.ones_like(value) for value in values]

    mask = padded(ones(batch.completion_ids), 0) * torch.tensor(batch.counts).long()[:, None]
    prompts = padded(batch.prompt_ids, pad_id, "left")
    prompt_mask = padded(ones(batch.prompt_ids), 0, "left")
    row = None
    if shared:
        row = share_prompts(batch.prompt_ids, batch.completion_ids, batch.counts, device_type, by_varlen)
    return MicroBatch(
        input_ids=torch.cat([prompts, padded(batch.completion_ids, pad_id)], 1),
        attention_mask=torch.cat([prompt_mask, mask], 1),
        mask=mask,
        advantages=batch.advantages,
        sampler_logprobs=padded(batch.sampler_logprobs, 0.0),
        old_logprobs=padded(batch.old_logprobs, 0.0),
        reference_logprobs=padded(batch.reference_logprobs, 0.0),
        micro_step_tokens=micro_step_tokens,
        shared=row,
    )


@dataclass(frozen=True)
class MicroBatching:
    """How an optimizer step's rollouts become micro-batches."""

    pad_id: int
    token_budget: int | None = None
    """Most tokens of a forward. A longer rollout is alone in its own. None: no bound."""
    packed: bool = False
    """The attention is a varlen kernel: forwards carry no padding, so its columns cost nothing."""
    sharing: bool = False
    """The model can hold a prompt once for all its rollouts."""
    regroup: bool = True
    """False: rollouts stay in their rank's micro-step (`bnpo`)."""
    rank: int = 0
    ranks: int = 1
    gather: Callable[[list], list] = list
    """All ranks' lists, one after another. A collective."""
    device_type: str = "cpu"
    """Of the device that computes the forwards."""

    def rows(self, batch: RolloutBatch) -> Rows:
        """The rollouts in the order in which they are divided."""
        if not self.sharing:
            return by_length(batch.lengths, self.packed)
        numbers: dict[tuple[int, ...], int] = {}
        prompts = [numbers.setdefault(tuple(ids.tolist()), len(numbers)) for ids in batch.prompt_ids]
        # A prompt's last token is each completion's own: it predicts the first.
        return by_prompt(prompts, [len(p) - 1 for p in batch.prompt_ids], [len(c) for c in batch.completion_ids])

    def collate(self, batch: RolloutBatch, rows: Rows, places: list[int], tokens: float = 0.0) -> MicroBatch:
        """One of the groups of `rows`; `tokens`: its `micro_step_tokens`."""
        return collate(batch.select(places), self.pad_id, tokens, rows.shared, self.device_type, self.packed)


def build_micro_batches(
    batch: RolloutBatch, micro_steps: int, accumulation: int, how: MicroBatching
) -> list[list[MicroBatch]]:
    """The micro-batches of each of a generation's `micro_steps`; `accumulation` micro-steps make an optimizer step.

    Over all ranks each rollout is in exactly one micro-batch of its optimizer step, and each rank has as many
    micro-batches. `micro_step_tokens` is the mean of the generation's micro-steps (DAPO), or without `regroup` the
    number of tokens of the micro-step itself (BNPO). A collective.
    """
    rollouts = len(batch) // micro_steps

    def part(first: int, steps: int) -> RolloutBatch:
        return batch.select(range(first * rollouts, (first + steps) * rollouts))

    if not how.regroup:
        parts = [part(i, 1) for i in range(micro_steps)]
        divided = [how.rows(each) for each in parts]
        needed = how.gather([[rows.groups_needed(how.token_budget) for rows in divided]])
        forwards = map(max, zip(*needed, strict=True))
        return [
            [how.collate(each, rows, places, each.loss_tokens) for places in rows.partition(n, how.token_budget)]
            for each, rows, n in zip(parts, divided, forwards, strict=True)
        ]
    tokens = sum(how.gather([batch.loss_tokens])) / how.ranks / micro_steps
    found: list[list[MicroBatch]] = []
    for first in range(0, micro_steps, accumulation):
        steps = min(accumulation, micro_steps - first)
        local = part(first, steps)
        step = concatenate(how.gather([local])) if how.ranks > 1 else local
        rows = how.rows(step)
        on_each_rank = max(steps, math.ceil(rows.groups_needed(how.token_budget) / how.ranks))
        mine = rows.partition(on_each_rank * how.ranks, how.token_budget)[how.rank :: how.ranks]
        batches = [how.collate(step, rows, places, tokens) for places in mine]
        bounds = [round(i * len(batches) / steps) for i in range(steps + 1)]
        found += [batches[a:b] for a, b in itertools.pairwise(bounds)]
    return found
