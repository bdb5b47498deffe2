"""Attention over a row in which sequences share tokens: a prompt's are keys for each of its completions.

By sdpa in blocks, each padded to sequences of similar length, or by a varlen kernel (flash attention) in one call
without padding.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.flash_attention import flash_attention_forward, get_target_dtype
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask, sdpa_mask
from transformers.modeling_flash_attention_utils import _flash_attention_forward, flash_attn_supports_top_left_mask

ATTENTION = "r1dist_shared_prompts"
"""transformers' name of sdpa that also takes rows with shared prompts."""
VARLEN_ATTENTION = "r1dist_shared_prompts_varlen"
"""The same of the varlen kernel that `sharing_attention` was given last."""
PARTS, PART = 4, 64
"""Into how many parts a sequence's queries are divided at most, and the least length of one: a part does not compute
the keys that come after it."""
CALL = {"cpu": 1024}
"""Pairs of a query and a key, of all heads, that take as long as one more call of attention, by device."""
CALL_OF_OTHERS = 1 << 18


class Sequence(NamedTuple):
    """Places of the row: the last of `keys` are those of `queries`, each of which attends to all before it."""

    queries: torch.Tensor
    keys: torch.Tensor

    @property
    def prefix(self) -> int:
        return len(self.keys) - len(self.queries)


class Block(NamedTuple):
    """One call of attention."""

    shape: tuple[int, int, int]
    """B sequences, Q queries and N keys of each."""
    mask: torch.Tensor | None
    """bool [B or 1, 1, Q, N]; None: causal, Q == N."""


class Blocks(NamedTuple):
    """How attention computes the T tokens of a row. Padding names any place of it."""

    queries: torch.Tensor
    """[sum of B x Q], places in the row, of one block after the other."""
    keys: torch.Tensor
    """[sum of B x N], places in the row."""
    blocks: list[Block]
    row: torch.Tensor
    """[T], places in `queries`."""


class Varlen(NamedTuple):
    """How one call of a varlen kernel computes a row. Its queries are the row: each token is one sequence's query."""

    keys: torch.Tensor | None
    """[sum of N], places in the row, of one of the S sequences after the other; None: the row itself."""
    query_bounds: torch.Tensor
    """int32 [S + 1], where the sequences' queries begin, and the last ones end."""
    key_bounds: torch.Tensor
    """int32 [S + 1], of `keys`."""
    most_queries: int
    most_keys: int


def varlen(sequences: list[Sequence]) -> Varlen:
    """Of sequences in the order of their queries in the row."""
    sizes = torch.tensor([(len(sequence.queries), len(sequence.keys)) for sequence in sequences])
    queries, keys = F.pad(sizes.cumsum(0), (0, 0, 1, 0)).int().unbind(1)
    places = torch.cat([sequence.keys for sequence in sequences]) if any(s.prefix for s in sequences) else None
    return Varlen(places, queries, keys, *sizes.amax(0).tolist())


def blocks(sequences: list[Sequence], tokens: int, device_type: str) -> Blocks:
    """The calls of sdpa that take the least time."""
    parts = [part for sequence in sequences for part in _parts(sequence)] if device_type == "cpu" else sequences
    parts.sort(key=lambda part: (part.prefix, len(part.queries)))
    sizes = torch.tensor([(part.prefix, len(part.queries)) for part in parts])
    found, of_queries, of_keys, row, used = [], [], [], torch.empty(tokens, dtype=torch.long), 0
    for first, last in _divided(sizes, CALL.get(device_type, CALL_OF_OTHERS)):
        block, (prefix, width) = parts[first:last], sizes[first:last].amax(0).tolist()
        shape = len(block), width, prefix + width
        # Gradients of padding are 0; added to many tokens, they do not wait for one another.
        queries = torch.arange(shape[0] * shape[1]).view(shape[:2]) % tokens
        keys = torch.arange(shape[0] * shape[2]).view(shape[0], shape[2]) % tokens
        for i, part in enumerate(block):
            own = len(part.queries)
            queries[i, :own] = part.queries
            keys[i, : part.prefix] = part.keys[: part.prefix]
            keys[i, prefix : prefix + own] = part.queries
            row[part.queries] = used + i * width + torch.arange(own)
        used += queries.numel()
        of_queries.append(queries.flatten())
        of_keys.append(keys.flatten())
        found.append(Block(shape, _mask(sizes[first:last, 0], width)))
    return Blocks(torch.cat(of_queries), torch.cat(of_keys), found, row)


def _parts(sequence: Sequence) -> Iterator[Sequence]:
    """The sequence's queries in parts, each with the keys up to its end."""
    parts = max(1, min(PARTS, len(sequence.queries) // PART))
    bounds = [len(sequence.queries) * i // parts for i in range(parts + 1)]
    for first, last in itertools.pairwise(bounds):
        yield Sequence(sequence.queries[first:last], sequence.keys[: sequence.prefix + last])


def _divided(sizes: torch.Tensor, call: int) -> list[tuple[int, int]]:
    """Ranges of consecutive sequences, one for each block, with the least cost.

    A block costs its pairs of a query and a key, padding included, and `call`.

    Args:
        sizes: [n, 2], each sequence's prefix and number of queries, prefixes ascending.
    """
    count = len(sizes)
    least = torch.zeros(count + 1, dtype=torch.long)
    begins = [0] * (count + 1)
    for last in range(1, count + 1):
        width = sizes[:last, 1].flip(0).cummax(0).values.flip(0)
        pairs = torch.arange(last, 0, -1) * width * (sizes[last - 1, 0] + width)
        cost = least[:last] + pairs + call
        begins[last] = int(cost.argmin())
        least[last] = cost[begins[last]]
    ranges, last = [], count
    while last > 0:
        ranges.append((begins[last], last))
        last = begins[last]
    return ranges[::-1]


def _mask(prefixes: torch.Tensor, width: int) -> torch.Tensor | None:
    """Of a block's sequences with `prefixes` [B]; one for all where these are equal."""
    most = int(prefixes.max())
    if most == 0:
        return None
    prefixes = prefixes[:1] if bool((prefixes == most).all()) else prefixes
    within = torch.arange(most) < prefixes[:, None, None]
    causal = torch.ones(width, width, dtype=torch.bool).tril().expand(len(prefixes), -1, -1)
    return torch.cat([within.expand(-1, width, -1), causal], 2)[:, None]


def attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, shared_prompts: Blocks | None = None, **options,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """transformers' attention interface: [1, heads, T, width] each -> [1, T, heads, width].

    Without `shared_prompts` it is sdpa. A prompt's keys and values are repeated for its completions, as sdpa repeats
    those of a head for the queries that share it.
    """
    if shared_prompts is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    shapes = [block.shape for block in shared_prompts.blocks]
    queries = [rows * width for rows, width, _ in shapes]
    keys = [rows * width for rows, _, width in shapes]

    def of_blocks(x: torch.Tensor, places: torch.Tensor, counts: list[int]) -> list[torch.Tensor]:
        """[B x N, heads, width] of each block. Gathered at once: a gradient of the whole row is made for each time."""
        return list(x[0].transpose(0, 1).index_select(0, places).split(counts))

    found = []
    for (shape, mask), *gathered in zip(
        shared_prompts.blocks,
        of_blocks(query, shared_prompts.queries, queries),
        of_blocks(key, shared_prompts.keys, keys),
        of_blocks(value, shared_prompts.keys, keys),
        strict=True,
    ):
        q, k, v = (x.unflatten(0, (shape[0], -1)).transpose(1, 2) for x in gathered)  # [B, heads, N, width]
        output = sdpa_attention_forward(module, q, k, v, mask, is_causal=mask is None, **options)[0]
        found.append(output.flatten(0, 1))  # [B x Q, heads, width]
    return torch.cat(found).index_select(0, shared_prompts.row)[None], None


def attend_varlen(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, shared_prompts: Varlen | None = None, *, kernel: str, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, **options,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """As `attend`, by the varlen kernel of transformers' name `kernel`; without `shared_prompts` it is that kernel.

    Of a sequence with fewer queries than keys, the last query attends to all keys, the one before to all but the last.
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # [B, T, heads, width]
    if shared_prompts is not None:
        attention_mask = None  # a placeholder, so that the model builds none
        options |= {"cu_seq_lens_q": shared_prompts.query_bounds, "max_length_q": shared_prompts.most_queries}
        options |= {"cu_seq_lens_k": shared_prompts.key_bounds, "max_length_k": shared_prompts.most_keys}
        if shared_prompts.keys is not None:
            key, value = (x.index_select(1, shared_prompts.keys) for x in (key, value))
    output = _flash_attention_forward(
        query, key, value, attention_mask, query_length=query.size(1), dropout=dropout, softmax_scale=scaling,
        is_causal=module.is_causal if is_causal is None else is_causal, attn_implementation=kernel,
        use_top_left_mask=flash_attn_supports_top_left_mask(), target_dtype=get_target_dtype(query, module), **options,
    )  # fmt: skip
    return output, None


def sharing_attention(kernel: str) -> str:
    """transformers' name of the attention that computes by `kernel`, and rows with shared prompts, too.

    It is `kernel` itself where there is none: with `eager`, `flex_attention`, kernels that transformers does not call
    as it calls flash attention, and those that align the causal mask with the first key.
    """
    if kernel == "sdpa":
        return ATTENTION
    if AttentionInterface().get(kernel) is not flash_attention_forward or flash_attn_supports_top_left_mask():
        return kernel
    AttentionInterface.register(VARLEN_ATTENTION, functools.partial(attend_varlen, kernel=kernel))
    return VARLEN_ATTENTION


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
AttentionMaskInterface.register(VARLEN_ATTENTION, flash_attention_mask)
