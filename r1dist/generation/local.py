"""The embedded engine: a decoding loop inside the training process.

Each sample draws from a random generator of its own, so a rollout does not depend on what else is in the
batch nor on how many ranks there are. A prompt is read once for all of its samples, and a long beginning that all
prompts have in common (examples, a system prompt) once for all of them. Rows that have ended leave the batch and the
cache. Simplified: no paged cache, no continuous batching.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

import torch
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedConfig,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer

from ..adapters import load_model
from ..config import Model
from ..data.templates import Template
from ..models import attention, model_path
from .attention import decoding_attention
from .draw import SeededDraw
from .engine import Request, Rollout, Sampling

SHRINK = 0.75
"""Rows that have ended are taken out when this share of the batch is left: copying the cache costs about a step."""
COMMON = 64
"""Tokens that all prompts must begin with to be read once: a forward of their own costs about as many."""
ROOM = 32
"""Least number of positions by which a full cache grows: transformers' own copies all of it for each token."""


class _RoomyLayer(DynamicLayer):
    """A cache layer with room for tokens to come. `keys` and `values` show the part that is taken."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._all = [states[..., :0, :] for states in (key_states, value_states)]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        taken = self.get_seq_length()
        needed = taken + key_states.shape[-2]
        if needed > self._all[0].shape[-2]:
            self._all = [_enlarged(states, taken, needed + max(ROOM, needed // 8)) for states in self._all]
        for states, new in zip(self._all, (key_states, value_states), strict=True):
            states[..., taken:needed, :] = new
        self._show(needed)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        taken = self.get_seq_length()
        self._all = [states.index_select(0, indices) for states in self._all]
        self._show(taken)

    def _show(self, taken: int) -> None:
        self.keys, self.values = (states[..., :taken, :] for states in self._all)


def _enlarged(states: torch.Tensor, taken: int, room: int) -> torch.Tensor:
    """[..., room, width], of which the first `taken` positions are those of `states`, the others anything."""
    large = states.new_empty(*states.shape[:-2], room, states.size(-1))
    large[..., :taken, :] = states[..., :taken, :]
    return large


def roomy_cache(config: PreTrainedConfig) -> DynamicCache:
    """An empty one. Layers of other kinds (a sliding window) stay transformers' own."""
    cache = DynamicCache(config=config)
    cache.layers = [_RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class InProcessEngine:
    """Generates with the very module that is trained (`rollout.engine: transformers`).

    Args:
        unwrapped: Gives the plain model inside a context, parameters gathered (ZeRO-3) and ready to generate.
        stop_ids: Token ids that end a completion.
        pad_id: Filler to the left of short prompts.
        batch_size: Sequences decoded at once.
    """

    def __init__(
        self,
        unwrapped: Callable[[], AbstractContextManager[PreTrainedModel]],
        stop_ids: list[int],
        pad_id: int,
        batch_size: int,
    ):
        self.unwrapped = unwrapped
        self.stop_ids = stop_ids
        self.pad_id = pad_id
        self.batch_size = batch_size
        self.version = 0

    def sync_weights(self, version: int) -> None:
        self.version = version

    def stream(self, requests: list[Request], sampling: Sampling) -> Iterator[tuple[int, Rollout]]:
        # Prompts of like length together: less padding.
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
        with self.unwrapped() as model:
            for begin in range(0, len(order), self.batch_size):
                chosen = order[begin : begin + self.batch_size]
                with decoding_attention(model):
                    rollouts = self._decode(model, [requests[i] for i in chosen], sampling)
                yield from zip(chosen, rollouts, strict=True)

    def end_generation(self) -> None:
        pass

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass

    @torch.no_grad()
    def _decode(self, model: PreTrainedModel, requests: list[Request], sampling: Sampling) -> list[Rollout]:
        numbers: dict[tuple[int, ...], int] = {}
        prompt_of = [numbers.setdefault(tuple(request.prompt_ids), len(numbers)) for request in requests]
        prompts = list(numbers)
        common = _common_length(prompts)
        longest = max(map(len, prompts))
        ids = torch.tensor(
            [[*p[:common], *[self.pad_id] * (longest - len(p)), *p[common:]] for p in prompts], device=model.device
        )
        mask = torch.tensor(
            [[1] * common + [0] * (longest - len(p)) + [1] * (len(p) - common) for p in prompts], device=model.device
        )
        places = (mask.cumsum(1) - 1).clamp(min=0)
        stops = torch.tensor(self.stop_ids, device=model.device)
        warpers = _warpers(sampling)
        draw = SeededDraw(None if sampling.temperature == 0 else [r.seed for r in requests], model.device)
        cache = roomy_cache(model.config)

        def scores_after(tokens: torch.Tensor, mask: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
            """[B, V]. The tokens go into the cache."""
            output = model(
                input_ids=tokens, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
            return output.logits[:, -1].float()

        if common:
            scores_after(*(x[:1, :common] for x in (ids, mask, places)))
            cache.batch_select_indices(torch.zeros(len(prompts), dtype=torch.long, device=model.device))
        of_request = torch.tensor(prompt_of, device=model.device)
        scores = scores_after(ids[:, common:], mask, places[:, common:])[of_request]
        cache.batch_select_indices(of_request)
        ids, mask, places = ids[of_request], mask[of_request], places[of_request]
        rows = torch.arange(len(requests), device=model.device)  # the request of each row of the batch
        ended = torch.zeros_like(rows, dtype=torch.bool)
        drawn = []
        while True:
            tokens, logprobs = draw(warpers(ids, scores))
            drawn.append((rows[~ended], tokens[~ended], logprobs[~ended]))
            ended |= torch.isin(tokens, stops)
            left = int((~ended).sum())
            if left == 0 or len(drawn) == sampling.max_tokens:
                break
            following, places = tokens[:, None], places[:, -1:] + 1
            ids = torch.cat([ids, following], dim=1)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            if left <= SHRINK * len(rows):
                kept = (~ended).nonzero().squeeze(1)
                cache.batch_select_indices(kept)
                draw.keep(kept)
                rows, ids, mask, places, following = (x[kept] for x in (rows, ids, mask, places, following))
                ended = ended[kept]
            scores = scores_after(following, mask, places)
        completions: list[list[int]] = [[] for _ in requests]
        of_tokens: list[list[float]] = [[] for _ in requests]
        for step in drawn:
            for row, token, logprob in zip(*(part.tolist() for part in step), strict=True):
                completions[row].append(token)
                of_tokens[row].append(logprob)
        return [self._rollout(*found) for found in zip(requests, completions, of_tokens, strict=True)]

    def _rollout(self, request: Request, ids: list[int], logprobs: list[float]) -> Rollout:
        reason: Literal["stop", "length"] = "stop" if ids[-1] in self.stop_ids else "length"
        return Rollout(request, ids, logprobs, reason, self.version)


def load_engine(model: Model, template: Template, batch_size: int) -> InProcessEngine:
    """The engine over `model`, loaded for nothing but to generate, on this process's GPU if there are any."""
    kernel = attention(model, half=model.dtype != "float32")
    loaded = load_model(model_path(model), dtype=getattr(torch, model.dtype), attn_implementation=kernel)
    own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # `torchrun` numbers a machine's processes
    loaded.to(own if torch.cuda.is_available() else "cpu").eval()

    @contextmanager
    def unwrapped():
        yield loaded

    return InProcessEngine(unwrapped, template.stop_ids, template.tokenizer.pad_token_id, batch_size)


def _common_length(prompts: list[tuple[int, ...]]) -> int:
    """Tokens of the beginning that is read once for all prompts; 0 where that does not pay. Each keeps its last."""
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda tokens: len(set(tokens)) == 1, columns))
    return common if len(prompts) > 1 and common >= COMMON else 0


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    """In the order in which transformers applies them when it samples itself."""
    warpers = LogitsProcessorList()
    if sampling.repetition_penalty != 1.0:
        warpers.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature not in (0, 1.0):
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p is not None:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers
