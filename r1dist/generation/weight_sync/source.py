"""The policy's weights as a server's checkpoint would name them, gathered and merged a bucket at a time."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from .files import Bucket

BUCKET_BYTES = 512 * 2**20
"""Of gathered weights held at once. One gather for each parameter would wait for the network a thousand times."""


@dataclass(frozen=True)
class Entry:
    """One tensor of the checkpoint, and how it is had from the trainer's parameters."""

    name: str
    shape: torch.Size
    parameters: list[nn.Parameter]
    make: Callable[[], torch.Tensor]


class WeightSource:
    """Reads the weights of `model`, which stays unchanged.

    Args:
        model: The trained module, unwrapped. Its parameters may be ZeRO-3's, and it may be a PEFT model with
            LoRA adapters, which are merged on the way out.
        dtype: What the server computes in: other bytes would be sent for nothing.
        bucket_bytes: The size of a bucket, in bytes of `dtype`.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, bucket_bytes: int = BUCKET_BYTES):
        self.dtype = dtype
        self.bucket_bytes = bucket_bytes
        self.entries = _entries(model)

    def buckets(self, wanted: bool = True) -> Iterator[Bucket]:
        """Buckets of (name, tensor). A tensor is valid until the next bucket is asked for.

        A collective under ZeRO-3: every rank runs through it; those that do not want the tensors get empty ones.
        """
        size = self.dtype.itemsize
        for group in grouped_by_size(self.entries, lambda e: e.shape.numel() * size, self.bucket_bytes):
            with torch.no_grad(), gathered([p for entry in group for p in entry.parameters]):
                yield [(e.name, e.make().to(self.dtype)) for e in group] if wanted else []


def _entries(model: nn.Module) -> list[Entry]:
    adapted = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    entries = []
    # Tied parameters are named twice: a server keeps a packed copy of its head, which is not tied any more.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, last = name.rpartition(".base_layer.")
        if owner in adapted and last == "weight":
            entries.append(_merged(owner, adapted[owner], parameter))
        elif not _belongs_to_adapter(name):
            entries.append(Entry(_plain(name), _shape(parameter), [parameter], _data_of(parameter)))
    return entries


def _merged(owner: str, layer: Any, weight: nn.Parameter) -> Entry:
    """W + sum of s B A over the active adapters (LoRA, arXiv 2106.09685, eq. 3), computed in a copy."""
    adapters = [adapter for adapter in layer.active_adapters if adapter in layer.scaling]
    factors = [p for name, p in layer.named_parameters() if name.startswith("lora_")]

    def make() -> torch.Tensor:
        merged = weight.data.clone()
        for adapter in adapters:
            merged += layer.get_delta_weight(adapter).to(merged.dtype)
        return merged

    return Entry(f"{_plain(owner)}.weight", _shape(weight), [weight, *factors], make)


def _data_of(parameter: nn.Parameter) -> Callable[[], torch.Tensor]:
    return lambda: parameter.data


def _belongs_to_adapter(name: str) -> bool:
    return ".lora_" in name or ".original_module." in name


def _plain(name: str) -> str:
    """The name without what PEFT's wrappers added to it."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    head, marker, tail = name.partition(".modules_to_save.")
    return f"{head}.{tail.partition('.')[2]}" if marker else name


def _shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty tensor behind


T = TypeVar("T")


def grouped_by_size(items: Iterable[T], size: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """`items` in groups of at most `limit` bytes each; a larger item is alone."""
    group: list[T] = []
    held = 0
    for item in items:
        if group and held + size(item) > limit:
            yield group
            group, held = [], 0
        group.append(item)
        held += size(item)
    yield group


def gathered(parameters: Iterable[nn.Parameter], writer: int | None = None) -> AbstractContextManager:
    """Inside the context ZeRO-3's parameters are complete; what the rank `writer` writes into them every rank gets."""
    sharded = {parameter.ds_id: parameter for parameter in parameters if hasattr(parameter, "ds_id")}
    if not sharded:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(sharded.values()), modifier_rank=writer)
