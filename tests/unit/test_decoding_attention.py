"""Attention for decoding computes what sdpa computes, and is a model's only while it decodes."""

import pytest
import torch
import varlen_stand_in
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from r1dist.generation import attention
from r1dist.rl.shared_attention import ATTENTION as SHARED_PROMPTS
from r1dist.rl.shared_attention import sharing_attention

SHAPE = {
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6,
    "head_dim": 4,
}  # fmt: skip


def llama(kernel: str, heads: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_key_value_heads=heads, attn_implementation=kernel)
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits(model, mask: torch.Tensor) -> torch.Tensor:
    """Of a prompt's last place and three tokens more, one after another."""
    ids = torch.randint(50, mask.shape, generator=torch.Generator().manual_seed(0))
    cache, found = DynamicCache(config=model.config), []
    width = mask.size(1) - 3
    places = (mask.cumsum(1) - 1).clamp(min=0)
    for begin, end in ((0, width), *((width + k, width + k + 1) for k in range(3))):
        output = model(
            input_ids=ids[:, begin:end], attention_mask=mask[:, :end], position_ids=places[:, begin:end],
            past_key_values=cache,
        )  # fmt: skip
        found.append(output.logits[:, -1])
    return torch.stack(found)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("heads", [1, 2, 6])
def test_it_computes_what_sdpa_computes(heads, padded):
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, : 4 * padded] = 0
    model = llama("sdpa", heads)
    expected = logits(model, mask)
    with attention.decoding_attention(model):
        torch.testing.assert_close(logits(model, mask), expected)


@pytest.mark.parametrize("padded", [True, False])
def test_a_varlen_kernel_with_shared_prompts_decodes_with_a_cache_too(padded, monkeypatch):
    varlen_stand_in.install(monkeypatch)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, : 4 * padded] = 0
    model = llama(sharing_attention(varlen_stand_in.NAME))
    with attention.decoding_attention(model):
        torch.testing.assert_close(logits(model, mask), logits(llama("sdpa"), mask))


def test_a_sliding_window_keeps_its_mask():
    torch.manual_seed(0)
    config = Gemma2Config(**SHAPE, num_key_value_heads=2, sliding_window=4, attn_implementation="sdpa")
    model = Gemma2ForCausalLM(config).eval()
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, :3] = 0
    expected = logits(model, mask)
    with attention.decoding_attention(model):
        torch.testing.assert_close(logits(model, mask), expected)


@pytest.mark.parametrize("kernel", ["sdpa", SHARED_PROMPTS, "eager"])
def test_it_is_a_model_s_only_inside(kernel, monkeypatch):
    model, used = llama(kernel), []
    own = attention.F.scaled_dot_product_attention
    monkeypatch.setattr(
        attention.F, "scaled_dot_product_attention",
        lambda query, key, *args, **kwargs: (used.append(key.size(1)), own(query, key, *args, **kwargs))[1],
    )  # fmt: skip
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 0] = 0
    with pytest.raises(ZeroDivisionError), attention.decoding_attention(model):
        logits(model, mask)
        assert used == ([] if kernel == "eager" else [6] * 2 + [2] * 6)  # the prompt's keys are repeated
        raise ZeroDivisionError
    assert model.config._attn_implementation == kernel
    used.clear()
    logits(model, mask)
    assert used == ([] if kernel == "eager" else [6] * 8)
