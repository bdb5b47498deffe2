"""Attention for decoding: a key-value head is read once for the query heads that share it.

transformers' sdpa repeats keys and values for each of them where there is a mask, which takes longer than attention.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

ATTENTION = "r1dist_decoding"
"""transformers' name of the attention."""


@contextmanager
def decoding_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside, `model` computes by this module's attention, if it computes by sdpa or what takes sdpa's masks."""
    own = model.config._attn_implementation
    if own not in AttentionMaskInterface() or AttentionMaskInterface()[own] is not sdpa_mask:
        yield
        return
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, scaling: float | None = None, **options,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """transformers' attention interface: [B, heads, T, width] each -> [B, T, heads, width]."""
    shared = query.size(1) // key.size(1)
    if query.size(2) > 1 or shared == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    queries = query.reshape(len(query), key.size(1), shared, -1)  # the heads that share keys, as if tokens
    mask = None if attention_mask is None else attention_mask.expand(-1, -1, shared, -1)
    output = F.scaled_dot_product_attention(queries, key, value, attn_mask=mask, scale=scaling)
    return output.flatten(1, 2)[:, None], None


def additive_mask(dtype: torch.dtype, **options) -> torch.Tensor | None:
    """sdpa's mask, added to scores instead of boolean: sdpa itself would convert it anew in each layer."""
    allowed = sdpa_mask(dtype=dtype, **options)
    return None if allowed is None else torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, -torch.inf)


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, additive_mask)
