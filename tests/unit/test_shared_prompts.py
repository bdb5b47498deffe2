"""Rollouts that share their prompt in a forward: logprobs, entropies and gradients of each rollout alone."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_batch import rollouts
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config
from trl.trainer.utils import add_fused_lm_head

from r1dist.config import GRPORun
from r1dist.config.loader import build
from r1dist.rl.batch import MicroBatching, RolloutBatch, build_micro_batches, collate
from r1dist.rl.logprobs import batch_logprobs, forward
from r1dist.rl.shared_prompts import ATTENTION, can_share
from r1dist.rl.train import grpo_arguments

PROMPTS = (5, 5, 5, 1, 1, 9, 7, 7)
COMPLETIONS = (4, 9, 1, 3, 6, 2, 8, 5)


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
def test_logprobs_entropies_and_gradients_are_those_of_each_rollout_alone(kind, checkpointed, lora):
    """Prompts of unequal length, also of one token; one completion or several to a prompt."""
    model, batch = policy(shape(kind)), grouped()
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    expected = alone(model, batch)
    right = gradients(model, expected[0])
    micro_batch = collate(batch, 0, shared=True)
    assert micro_batch.shared.input_ids.numel() == sum({5: 4, 1: 0, 9: 8, 7: 6}.values()) + sum(COMPLETIONS)
    output, real = forward(model, micro_batch, packed=False), micro_batch.mask.bool()
    assert not output.logprobs[~real].any() and not output.entropy[~real].any()
    torch.testing.assert_close(output.logprobs[real], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.entropy[real], expected[1], rtol=1e-5, atol=1e-5)
    found = gradients(model, output.logprobs[real])
    assert (found - right).norm() < 3e-6 * right.norm() and right.norm() > 1


def test_one_prompt_of_one_token_and_rollouts_that_do_not_count():
    model = policy(shape())
    batch = grouped((1, 1, 1), (3, 1, 6), counts=[True, False, True])
    micro_batch = collate(batch, 0, shared=True)
    output = forward(model, micro_batch, packed=False)
    expected = alone(model, batch.select([0, 2]))[0]
    torch.testing.assert_close(output.logprobs[micro_batch.mask.bool()], expected, rtol=1e-5, atol=1e-5)
    assert not output.logprobs[1].any()


def test_a_forward_without_shared_prompts_is_sdpas():
    batch = collate(grouped(), 0)
    found, expected = (forward(policy(shape(), kernel), batch, packed=False) for kernel in (ATTENTION, "sdpa"))
    assert torch.equal(found.logprobs, expected.logprobs)


@pytest.mark.parametrize("budget", [None, 24, 60])
def test_micro_batches_split_groups_and_add_up_to_the_same_gradient(budget):
    model, batch = policy(shape()), grouped((30,) * 5 + (22,) * 3)
    expected = gradients(model, alone(model, batch)[0])
    how = MicroBatching(0, budget, sharing=True)
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


@pytest.mark.parametrize(
    ("prompt", "completions", "shared"),
    [(120, (32, 48), True), (1000, (100, 8000), False), (1000, (900, 1000), True)],
)
def test_prompts_are_shared_where_that_saves_work(prompt, completions, shared):
    """Completions that are long, and of unequal length within a group, cost more in attention than a prompt saves."""
    lengths = torch.linspace(*completions, 8).long().tolist()
    batch = grouped([prompt + group for group in range(8) for _ in range(8)], lengths * 8)
    micro_batches = build_micro_batches(batch, 1, 1, MicroBatching(0, 16384, sharing=True))[0]
    assert all((m.shared is not None) == shared for m in micro_batches)


def test_models_whose_layers_mix_tokens_otherwise_do_not_share():
    assert all(can_share(shape(kind)) for kind in (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config))
    assert not can_share(shape(MistralConfig, sliding_window=16))
    windows = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    assert not can_share(shape(Qwen2Config, **windows))
    assert not can_share(PretrainedConfig(model_type="mamba"))


def test_a_run_shares_prompts_unless_it_names_another_kernel(small_grpo, tmp_path):
    def kernel(**model) -> str:
        run = build(GRPORun, {**small_grpo, "model": {**small_grpo.get("model", {}), **model}}, "test")
        return grpo_arguments(run).model_init_kwargs["attn_implementation"]

    assert (
        kernel() == kernel(attn_implementation="sdpa") == ATTENTION and kernel(attn_implementation="eager") == "eager"
    )
    policy(shape()).save_pretrained(tmp_path)
    assert ATTENTION not in (tmp_path / "config.json").read_text()  # others load the model without this package
