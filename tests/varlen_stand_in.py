"""Flash attention 2's functions, computed on a CPU by softmax. Everything above them is transformers' own."""

from types import ModuleType

import pytest
import torch
from transformers import modeling_flash_attention_utils
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "kernels-community/flash-attn2"


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, causal: bool) -> torch.Tensor:
    """[T, heads, width], [N, heads, width] -> [T, heads, width]; the causal mask is aligned with the last key."""
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.size(-1) ** -0.5)
    if causal:
        queries, keys = torch.arange(len(q))[:, None] + len(k) - len(q), torch.arange(len(k))
        scores = scores.masked_fill(keys > queries, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
):
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    queries, keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert (max(queries), max(keys)) == (max_seqlen_q, max_seqlen_k) and (sum(queries), sum(keys)) == (len(q), len(k))
    parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    return torch.cat([attention(*part, softmax_scale, causal) for part in parts])


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    return torch.stack([attention(*row, softmax_scale, causal) for row in zip(q, k, v, strict=True)])


def install(patch: pytest.MonkeyPatch) -> None:
    """As where the `kernels` package has it from the hub, and transformers has loaded it."""
    kernel = ModuleType("flash_attn2")
    kernel.flash_attn_varlen_func, kernel.flash_attn_func = flash_attn_varlen_func, flash_attn_func
    hub = "transformers.integrations.hub_kernels"
    patch.setattr(f"{hub}.is_kernels_available", lambda: True)
    patch.setattr(f"{hub}.get_kernel", lambda repo, **_: kernel)
    patch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, NAME, flash_attention_forward)
