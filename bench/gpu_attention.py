"""Flash attention over a row with shared prompts against sdpa over padded rollouts: a part of bench/gpu_check.py."""

import random
import statistics
import time
from typing import Any

import torch
from transformers import PretrainedConfig, Qwen2ForCausalLM
from trl.trainer.utils import add_fused_lm_head

from r1dist.cluster.shapes import QWEN_HALF_BILLION
from r1dist.rl.batch import MicroBatch, RolloutBatch, collate
from r1dist.rl.logprobs import forward
from r1dist.rl.shared_attention import VARLEN_ATTENTION, sharing_attention

PROMPT_TOKENS, GROUP = 64, 4


def compare_attention(
    kernel: str, tokens: int, rounds: int, config: PretrainedConfig = QWEN_HALF_BILLION, device: str = "cuda"
) -> dict[str, Any]:
    """The logprobs of `kernel` and of sdpa, both in bfloat16, beside those of sdpa in float32; and their speed.

    `mean_diff` and `max_diff` are of a completion token's logprob from the float32 one, `seconds` those of a forward
    and backward over `tokens` tokens of rollouts of unequal length.
    """
    batch, sharing = rollouts(tokens, config.vocab_size), sharing_attention(kernel)
    padded = collate(batch, 0).to(device)
    shared = collate(batch, 0, shared=True, device_type=device, by_varlen=sharing == VARLEN_ATTENTION).to(device)
    exact = _logprobs(model_of(config, "sdpa", torch.float32, device), padded)
    found: dict[str, Any] = {"tokens": int(padded.attention_mask.sum())}
    for key, name, attention, micro_batch in (("shared", kernel, sharing, shared), ("padded", "sdpa", "sdpa", padded)):
        model = model_of(config, attention, torch.bfloat16, device)
        diff = (_logprobs(model, micro_batch) - exact).abs()[padded.mask.bool()]
        seconds = [_seconds(model, micro_batch) for _ in range(rounds + 1)][1:]
        found[key] = {"attention": name, "mean_diff": diff.mean().item(), "max_diff": diff.max().item(),
                      "seconds": statistics.median(seconds)}  # fmt: skip
    return found


def model_of(config: PretrainedConfig, attention: str, dtype: torch.dtype, device: str) -> Qwen2ForCausalLM:
    """The same random weights each time."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM._from_config(config, attn_implementation=attention).to(device, dtype)
    add_fused_lm_head(model)
    return model


def rollouts(tokens: int, vocabulary: int) -> RolloutBatch:
    """Of about `tokens` tokens, `GROUP` to a prompt, the shortest completion a sixteenth of the longest."""
    draw, torch_draw = random.Random(0), torch.Generator().manual_seed(0)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(vocabulary, (length,), generator=torch_draw)

    longest = tokens // 8
    lengths: list[int] = []
    while sum(lengths) + len(lengths) * PROMPT_TOKENS < tokens - longest:
        lengths.append(draw.randint(longest // 16, longest))
    count = len(lengths)
    prompts = [ids(PROMPT_TOKENS) for _ in range(0, count, GROUP)]
    return RolloutBatch(
        rollout_ids=[(0, place // GROUP, place % GROUP) for place in range(count)],
        prompt_ids=[prompts[place // GROUP] for place in range(count)],
        completion_ids=[ids(length) for length in lengths],
        sampler_logprobs=[torch.zeros(length) for length in lengths],
        counts=[True] * count,
        advantages=torch.zeros(count),
        policy_versions=[0] * count,
        rewards={},
        prompts=[""] * count,
        texts=[""] * count,
    )


@torch.no_grad()
def _logprobs(model: Qwen2ForCausalLM, batch: MicroBatch) -> torch.Tensor:
    return forward(model, batch, packed=False).logprobs.float()


def _seconds(model: Qwen2ForCausalLM, batch: MicroBatch) -> float:
    _wait()
    began = time.perf_counter()
    forward(model, batch, packed=False).logprobs.sum().backward()
    _wait()
    model.zero_grad()
    return time.perf_counter() - began


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
