"""Rollouts that share their prompt in a forward: logprobs, entropies and gradients of each rollout alone."""

import math
import random
from itertools import combinations, pairwise

import pytest
import torch
import varlen_stand_in
from peft import LoraConfig, get_peft_model
from test_batch import rollouts
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from trl.trainer.utils import add_fused_lm_head

from r1dist.config import GRPORun
from r1dist.config.loader import build
from r1dist.rl import shared_attention
from r1dist.rl.batch import MicroBatching, RolloutBatch, build_micro_batches, collate
from r1dist.rl.logprobs import batch_logprobs, forward
from r1dist.rl.shared_attention import ATTENTION, VARLEN_ATTENTION, _divided, sharing_attention
from r1dist.rl.shared_prompts import can_share, share_prompts
from r1dist.rl.train import grpo_arguments

PROMPTS = (5, 5, 5, 1, 1, 9, 7, 7)
COMPLETIONS = (4, 9, 1, 3, 6, 2, 8, 5)


@pytest.fixture(params=["sdpa", varlen_stand_in.NAME])
def kernel(request, monkeypatch) -> str:
    """transformers' name of the attention over rows with shared prompts, by sdpa and by a varlen kernel."""
    varlen_stand_in.install(monkeypatch)
    return sharing_attention(request.param)


def shape(kind: type[PretrainedConfig] = LlamaConfig, **fields) -> PretrainedConfig:
    return kind(**{
        "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True, "initializer_range": 0.2,
        "sliding_window": None, **fields,
    })  # fmt: skip


def policy(config: PretrainedConfig, kernel: str = ATTENTION):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=kernel).train()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return model


def grouped(prompts=PROMPTS, completions=COMPLETIONS, **fields) -> RolloutBatch:
    """Rollouts whose prompts are the same where they are as long."""
    batch = rollouts(list(prompts), list(completions), **fields)
    known: dict[int, torch.Tensor] = {}
    batch.prompt_ids = [known.setdefault(len(ids), ids) for ids in batch.prompt_ids]
    return batch


def alone(model, batch: RolloutBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logprobs and entropies [sum of T_i] from a forward of each rollout, by log_softmax."""
    found = []
    for prompt, completion in zip(batch.prompt_ids, batch.completion_ids, strict=True):
        logits = model(input_ids=torch.cat([prompt, completion])[None], use_cache=False).logits[0]
        logps = logits[len(prompt) - 1 : -1].float().log_softmax(-1)
        found.append((logps.gather(1, completion[:, None])[:, 0], -(logps.exp() * logps).sum(-1)))
    logprobs, entropies = (torch.cat(column) for column in zip(*found, strict=True))
    return logprobs, entropies


def gradients(model, values: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    weights = torch.randn(len(values), generator=torch.Generator().manual_seed(1))
    (values * weights).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_logprobs_entropies_and_gradients_are_those_of_each_rollout_alone(kernel, kind, checkpointed, lora):
    """Prompts of unequal length, also of one token; one completion or several to a prompt."""
    model, batch = policy(shape(kind), kernel), grouped()
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    expected = alone(model, batch)
    right = gradients(model, expected[0])
    micro_batch = collate(batch, 0, shared=True, by_varlen=kernel == VARLEN_ATTENTION)
    assert micro_batch.shared.input_ids.numel() == sum({5: 4, 1: 0, 9: 8, 7: 6}.values()) + sum(COMPLETIONS)
    output, real = forward(model, micro_batch, packed=False), micro_batch.mask.bool()
    assert not output.logprobs[~real].any() and not output.entropy[~real].any()
    torch.testing.assert_close(output.logprobs[real], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.entropy[real], expected[1], rtol=1e-5, atol=1e-5)
    found = gradients(model, output.logprobs[real])
    assert (found - right).norm() < 3e-6 * right.norm() and right.norm() > 1


def test_one_prompt_of_one_token_and_rollouts_that_do_not_count(kernel):
    model = policy(shape(), kernel)
    batch = grouped((1, 1, 1), (3, 1, 6), counts=[True, False, True])
    micro_batch = collate(batch, 0, shared=True, by_varlen=kernel == VARLEN_ATTENTION)
    output = forward(model, micro_batch, packed=False)
    expected = alone(model, batch.select([0, 2]))[0]
    torch.testing.assert_close(output.logprobs[micro_batch.mask.bool()], expected, rtol=1e-5, atol=1e-5)
    assert not output.logprobs[1].any()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("own", ["sdpa", varlen_stand_in.NAME])
def test_a_forward_without_shared_prompts_is_the_kernels_own(own, packed, monkeypatch):
    varlen_stand_in.install(monkeypatch)
    batch = collate(grouped(), 0)
    found, expected = (forward(policy(shape(), name), batch, packed) for name in (sharing_attention(own), own))
    assert torch.equal(found.logprobs, expected.logprobs)


def test_a_varlen_kernel_repeats_nothing_where_no_rollouts_share_a_prompt():
    apart, shared = (share_prompts(*rows, by_varlen=True).attention for rows in (
        ([torch.arange(3), torch.arange(5)], [torch.arange(2)] * 2, [True] * 2),
        ([torch.arange(3)] * 2, [torch.arange(2), torch.arange(4)], [True] * 2),
    ))  # fmt: skip
    assert apart.keys is None and apart.query_bounds.tolist() == apart.key_bounds.tolist() == [0, 4, 10]
    assert shared.query_bounds.tolist() == [0, 2, 4, 8] and shared.key_bounds.tolist() == [0, 2, 6, 12]
    assert shared.keys.tolist() == [0, 1, 0, 1, 2, 3, 0, 1, 4, 5, 6, 7]
    assert (shared.most_queries, shared.most_keys) == (4, 6)


@pytest.mark.parametrize("budget", [None, 24, 60])
def test_micro_batches_split_groups_and_add_up_to_the_same_gradient(kernel, budget):
    model, batch = policy(shape(), kernel), grouped((30,) * 5 + (22,) * 3)
    expected = gradients(model, alone(model, batch)[0])
    how = MicroBatching(0, budget, kernel == VARLEN_ATTENTION, sharing=True)
    micro_batches = [m for part in build_micro_batches(batch, 2, 2, how) for m in part]
    assert len(micro_batches) > 1 and all(m.shared for m in micro_batches)
    weights = torch.randn(sum(COMPLETIONS), generator=torch.Generator().manual_seed(1)).split(COMPLETIONS)
    model.zero_grad()
    for m in micro_batches:
        logprobs = forward(model, m, packed=False).logprobs
        for row, place in zip(logprobs, m.advantages.long().tolist(), strict=True):
            (row[: COMPLETIONS[place]] * weights[place]).sum().backward(retain_graph=True)
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (found - expected).norm() < 3e-6 * expected.norm()
    own = batch_logprobs(model, batch, 3, how, torch.device("cpu"), lambda: None)
    torch.testing.assert_close(torch.cat(own), alone(model, batch)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("draw", range(30))
def test_any_groups_lengths_and_divisions_give_the_same_loss_and_gradient(kernel, draw):
    """In float32 within 1e-5 of each rollout alone; sequences long enough to be computed in parts, too."""
    chance = random.Random(draw)
    longest = chance.choice([3, 40, 300])
    groups = [(chance.randint(1, longest), chance.randint(1, 6)) for _ in range(chance.randint(1, 4))]
    lengths = [prompt for prompt, count in groups for _ in range(count)]
    completions = [chance.randint(1, longest) for _ in lengths]
    model, batch = policy(shape(num_hidden_layers=2), kernel), grouped(lengths, completions)
    if chance.random() < 0.5:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = alone(model, batch)[0]
    right = gradients(model, expected)
    device_type = chance.choice(["cpu", "cuda"])  # in how many calls of attention
    varlen = kernel == VARLEN_ATTENTION
    how = MicroBatching(0, chance.choice([None, longest]), varlen, sharing=True, device_type=device_type)
    micro_batches = build_micro_batches(batch, 1, 1, how)[0]
    weights = torch.randn(len(expected), generator=torch.Generator().manual_seed(1)).split(completions)
    model.zero_grad()
    loss = 0.0
    for m in micro_batches:
        logprobs, places = forward(model, m, packed=False).logprobs, m.advantages.long().tolist()
        part = sum((row[: completions[p]] * weights[p]).sum() for row, p in zip(logprobs, places, strict=True))
        part.backward()
        loss += part.item()
    right_loss = (expected * torch.cat(weights)).sum().item()
    assert loss == pytest.approx(right_loss, rel=1e-5, abs=1e-5 * expected.abs().sum().item())
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (found - right).norm() < 1e-5 * right.norm()


@pytest.mark.parametrize("draw", range(50))
def test_sequences_are_divided_into_the_cheapest_calls(draw):
    """Against every way to cut them."""
    chance = random.Random(draw)
    sizes = sorted((chance.randint(0, 30), chance.randint(1, 30)) for _ in range(chance.randint(1, 8)))
    call = chance.choice([0, 200, 2000])

    def cost(ranges) -> int:
        return sum(
            call + (b - a) * max(own for _, own in sizes[a:b]) * (sizes[b - 1][0] + max(own for _, own in sizes[a:b]))
            for a, b in ranges
        )

    every = (
        list(pairwise((0, *cuts, len(sizes))))
        for n in range(len(sizes))
        for cuts in combinations(range(1, len(sizes)), n)
    )
    assert cost(_divided(torch.tensor(sizes), call)) == min(map(cost, every))


def test_attention_pads_little_on_a_cpu_and_calls_little_elsewhere():
    prompts, completions = [torch.arange(100)] * 8, [torch.arange(n) for n in range(20, 340, 40)]
    few, many = (
        share_prompts(prompts, completions, [True] * 8, device).attention.blocks for device in ("cuda", "cpu")
    )
    assert len(few) <= 2 and len(many) > 8
    exact = sum(len(c) * (99 + len(c)) for c in completions) + 99**2
    assert sum(math.prod(block.shape) for block in many) < 0.8 * exact


def test_models_whose_layers_mix_tokens_otherwise_do_not_share():
    assert all(can_share(shape(kind)) for kind in (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config))
    assert not can_share(shape(MistralConfig, sliding_window=16))
    windows = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    assert not can_share(shape(Qwen2Config, **windows))
    assert not can_share(PretrainedConfig(model_type="mamba"))


def test_a_run_shares_prompts_unless_it_names_another_kernel(small_grpo, tmp_path, monkeypatch):
    def kernel(**model) -> str:
        run = build(GRPORun, {**small_grpo, "model": {**small_grpo.get("model", {}), **model}}, "test")
        return grpo_arguments(run).model_init_kwargs["attn_implementation"]

    assert kernel() == kernel(attn_implementation="sdpa") == ATTENTION
    assert kernel(attn_implementation="eager") == "eager"
    varlen_stand_in.install(monkeypatch)
    assert kernel(attn_implementation=varlen_stand_in.NAME) == VARLEN_ATTENTION
    monkeypatch.setitem(AttentionInterface._global_mapping, "its-own/flash-kernel", lambda *args, **kwargs: None)
    assert sharing_attention("its-own/flash-kernel") == "its-own/flash-kernel"
    monkeypatch.setattr(shared_attention, "flash_attn_supports_top_left_mask", lambda: True)
    assert kernel(attn_implementation=varlen_stand_in.NAME) == varlen_stand_in.NAME
    policy(shape()).save_pretrained(tmp_path)
    assert ATTENTION not in (tmp_path / "config.json").read_text()  # others load the model without this package
