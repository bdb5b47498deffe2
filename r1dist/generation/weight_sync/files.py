"""One version of the weights as a folder: safetensors shards and an index that is written last.

Both ends of the `shm` transport use this; nothing here knows a trainer or a server.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

INDEX = "index.json"

Bucket = list[tuple[str, torch.Tensor]]


def write_folder(folder: Path, buckets: Iterable[Bucket]) -> str:
    """Write one shard for each bucket into `folder`, readable by this user only; returns the index's digest.

    The folder gets its name when it is whole.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700, parents=True)
    index: dict[str, dict] = {}
    for number, bucket in enumerate(buckets):
        shard = f"{number:05d}.safetensors"
        # Clones, since tied tensors share storage and safetensors refuses that.
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in bucket}, partial / shard)
        index |= {name: {"shard": shard, "shape": list(tensor.shape)} for name, tensor in bucket}
    text = json.dumps(index)
    (partial / INDEX).write_text(text)
    os.replace(partial, folder)
    return hashlib.sha256(text.encode()).hexdigest()


def read_index(folder: Path, digest: str) -> dict[str, dict]:
    """The index of `folder`, after a check that it is the one meant and that every shard holds what it says.

    Raises `ValueError` or `OSError` saying what is wrong.
    """
    text = (folder / INDEX).read_bytes()
    if hashlib.sha256(text).hexdigest() != digest:
        raise ValueError(f"weights refused: {folder} does not hold the version that was announced")
    index = json.loads(text)
    found: dict[str, torch.Tensor] = {}
    for shard in sorted({entry["shard"] for entry in index.values()}):
        with safe_open(folder / shard, "pt") as file:  # refuses a file that is cut off
            found |= {name: {"shard": shard, "shape": file.get_slice(name).get_shape()} for name in file.offset_keys()}
    if found != index:
        raise ValueError(f"weights refused: the shards in {folder} are not what its index says")
    return index


@contextmanager
def opened(folder: Path) -> Iterator[Iterator[tuple[str, torch.Tensor]]]:
    """Every tensor of `folder` by name, read when it is asked for, from files that are all open already."""
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(shard, "pt")) for shard in sorted(folder.glob("*.safetensors"))]
        yield ((name, file.get_tensor(name)) for file in files for name in file.offset_keys())
