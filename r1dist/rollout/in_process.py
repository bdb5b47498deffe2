"""The embedded engine: transformers' `generate` inside the training process.

Each sample draws from a random generator of its own, so a rollout does not depend on what else is in the
batch nor on how many ranks there are. Simplified: no paged cache and no continuous batching; a batch is
decoded until its longest completion ends.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..config import Model
from ..models import model_path, stop_ids
from .protocol import Request, Rollout, Sampling

# Noise is drawn for several positions at once where the vocabulary is small: a call for every row and
# position would cost more than the model.
NOISE_BLOCK = 8192


class SeededDraw(LogitsProcessor):
    """Turns the argmax that follows into a draw from softmax(scores), row i by a generator of its own.

    argmax(p / e) with e ~ Exp(1) is distributed as p (the exponential race). Without seeds the argmax is left
    alone. Keeps the chosen tokens' logprobs in `logprobs`, one tensor [B] per position.
    """

    def __init__(self, seeds: list[int] | None, device: torch.device):
        self.generators = None if seeds is None else [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self.logprobs: list[torch.Tensor] = []
        self._noise: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        logprobs = scores.float().log_softmax(dim=-1)
        raced = logprobs if self.generators is None else logprobs - self._next_noise(logprobs).log()
        self.logprobs.append(logprobs.gather(1, raced.argmax(dim=-1, keepdim=True)).squeeze(1))
        return raced

    def _next_noise(self, scores: torch.Tensor) -> torch.Tensor:
        """Exponential noise [B, V] for the next position. The block depends on V alone, so rows repeat exactly."""
        rows, vocabulary = scores.shape
        block = max(1, NOISE_BLOCK // vocabulary)
        place = len(self.logprobs) % block
        if place == 0:
            self._noise = scores.new_empty(rows, block, vocabulary)
            for row, generator in zip(self._noise, self.generators, strict=True):
                row.exponential_(generator=generator)
        return self._noise[:, place]


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
                yield from zip(chosen, self._decode(model, [requests[i] for i in chosen], sampling), strict=True)

    def rest(self) -> None:
        pass

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass

    @torch.no_grad()
    def _decode(self, model: PreTrainedModel, requests: list[Request], sampling: Sampling) -> list[Rollout]:
        longest = max(len(request.prompt_ids) for request in requests)
        padded = [[self.pad_id] * (longest - len(r.prompt_ids)) + r.prompt_ids for r in requests]
        mask = [[0] * (longest - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in requests]
        greedy = sampling.temperature == 0
        draw = SeededDraw(None if greedy else [request.seed for request in requests], model.device)
        output = model.generate(
            input_ids=torch.tensor(padded, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            logits_processor=LogitsProcessorList([*_warpers(sampling), draw]),
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_tokens,
                do_sample=False,
                eos_token_id=self.stop_ids,
                pad_token_id=self.pad_id,
                repetition_penalty=1.0,  # unset, the model's own generation_config would fill it in
                disable_compile=True,
            ),
        )
        completions = output[:, longest:].tolist()
        logprobs = torch.stack(draw.logprobs, dim=1).tolist()
        return [
            self._rollout(request, ids, scores)
            for request, ids, scores in zip(requests, completions, logprobs, strict=True)
        ]

    def _rollout(self, request: Request, ids: list[int], logprobs: list[float]) -> Rollout:
        end = next((i + 1 for i, token in enumerate(ids) if token in self.stop_ids), None)
        length = end or len(ids)
        reason = "length" if end is None else "stop"
        return Rollout(request, ids[:length], logprobs[:length], reason, self.version)


def load_engine(model: Model, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> InProcessEngine:
    """The engine over `model`, loaded for nothing but to generate, on the GPU if there is one."""
    loaded = AutoModelForCausalLM.from_pretrained(
        model_path(model), dtype=getattr(torch, model.dtype), attn_implementation=model.attn_implementation
    )
    loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    @contextmanager
    def unwrapped():
        yield loaded

    return InProcessEngine(unwrapped, stop_ids(model, tokenizer), tokenizer.pad_token_id, batch_size)


def _warpers(sampling: Sampling) -> list[LogitsProcessor]:
    """In the order in which transformers applies them when it samples itself."""
    warpers: list[LogitsProcessor] = []
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
