"""One forward over many rollouts without a column of padding: they lie behind one another in a single row.

Positions start anew with each rollout; that is by what transformers' attention keeps them apart (flash attention by
lengths, sdpa and eager by a mask of blocks, whose cost grows with the square of the whole row).
"""

from dataclasses import dataclass

import torch

IGNORED = -100


@dataclass(frozen=True)
class Packed:
    """A padded batch [B, T] in one row [1, N], N being its real tokens."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    """The tokens to score; elsewhere `IGNORED`, also on each rollout's first token, which follows another's last."""
    places: torch.Tensor
    """Where each of the N tokens lay: its index in the batch made flat, [N]."""


def pack(input_ids: torch.Tensor, attention_mask: torch.Tensor, keep: int) -> Packed:
    """Of a batch [B, T], padded on the left and on the right, whose last `keep` columns are to be scored."""
    real = attention_mask.bool()
    labels = input_ids.clone()
    labels[:, : input_ids.size(1) - keep] = IGNORED
    positions = attention_mask.cumsum(1) - 1
    labels[positions == 0] = IGNORED
    return Packed(
        input_ids[real][None],
        positions[real][None],
        labels[real][None],
        real.flatten().nonzero()[:, 0],
    )


def unpack(values: torch.Tensor, packed: Packed, shape: torch.Size, keep: int) -> torch.Tensor:
    """Values [1, N - 1], each of the token after it, as [B, keep] of the batch of `shape` [B, T]; 0 elsewhere."""
    flat = values.new_zeros(shape.numel())
    return flat.index_put((packed.places[1:],), values[0]).view(shape)[:, -keep:]
