"""Rollouts of one prompt in a single row that holds the prompt once, exact in logprobs and gradients.

The row is a prompt without its last token, then the prompt's completions one after another, then the next prompt. A
completion of T tokens has T places: the prompt's last token and all tokens of the completion but the last, so each
place predicts one token of the completion. Within the row only attention knows of sequences: a prompt attends to
itself, a completion to its prompt and itself. It takes them in blocks, each padded to sequences of similar length;
no other layer pads.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

ATTENTION = "r1dist_shared_prompts"
"""transformers' name of the attention: sdpa, which also takes rows with shared prompts."""
IGNORED = -100
"""A label of which no logprob is computed."""
MODELS = ("llama", "mistral", "qwen2", "qwen3")
"""Whose layers, but for attention, treat each token alone."""
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


class SharedPrompts(NamedTuple):
    """The row's T tokens, and how its N tokens of completions are the entries of [B, longest] that are no padding."""

    input_ids: torch.Tensor
    """[1, T]"""
    positions: torch.Tensor
    """[1, T]"""
    labels: torch.Tensor
    """[1, T], the token that each place predicts, `IGNORED` where none counts."""
    attention: Blocks
    places: torch.Tensor
    """[N], of completions in the row."""
    entries: torch.Tensor
    """[N], of [B, longest], flattened."""


def can_share(config: PretrainedConfig) -> bool:
    """Whether a model's layers are ones that this module knows, all with full attention."""
    full = all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or ())
    windowed = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return config.model_type in MODELS and full and not windowed


def share_prompts(
    prompts: list[torch.Tensor], completions: list[torch.Tensor], counts: list[bool], device_type: str = "cpu"
) -> SharedPrompts:
    """The row of B rollouts, of which those of one prompt follow one another.

    Args:
        prompts: [P_i], P_i >= 1, of each rollout.
        completions: [T_i], T_i >= 1.
        counts: Whether the rollout's tokens are scored.
        device_type: Of the device that computes it.
    """
    longest = max(map(len, completions))
    ids, positions, labels, places, entries, used = [], [], [], [], [], 0
    sequences: list[Sequence] = []
    for _, group in itertools.groupby(range(len(prompts)), lambda i: prompts[i].tolist()):
        members = list(group)
        prompt = prompts[members[0]]
        length = len(prompt) - 1
        shared = used + torch.arange(length)
        ids.append(prompt[:-1])
        positions.append(torch.arange(length))
        labels.append(torch.full((length,), IGNORED))
        used += length
        for i in members:
            own = torch.arange(len(completions[i]))
            ids += [prompt[-1:], completions[i][:-1]]
            positions.append(length + own)
            labels.append(completions[i] if counts[i] else torch.full_like(own, IGNORED))
            places.append(used + own)
            entries.append(i * longest + own)
            used += len(own)
        wholes = [torch.cat([shared, own]) for own in places[-len(members) :]]
        if len(members) == 1:
            sequences.append(Sequence(wholes[0], wholes[0]))
        else:
            sequences += [Sequence(shared, shared)] * (length > 0)
            sequences += [Sequence(whole[length:], whole) for whole in wholes]
    return SharedPrompts(
        torch.cat(ids)[None], torch.cat(positions)[None], torch.cat(labels)[None],
        _blocks(sequences, used, device_type), torch.cat(places), torch.cat(entries),
    )  # fmt: skip


def _blocks(sequences: list[Sequence], tokens: int, device_type: str) -> Blocks:
    """The calls of attention that take the least time."""
    parts = [part for sequence in sequences for part in _parts(sequence)] if device_type == "cpu" else sequences
    parts.sort(key=lambda part: (part.prefix, len(part.queries)))
    sizes = torch.tensor([(part.prefix, len(part.queries)) for part in parts])
    blocks, of_queries, of_keys, row, used = [], [], [], torch.empty(tokens, dtype=torch.long), 0
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
        blocks.append(Block(shape, _mask(sizes[first:last, 0], width)))
    return Blocks(torch.cat(of_queries), torch.cat(of_keys), blocks, row)


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


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
