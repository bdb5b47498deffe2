"""The reference model's resets, and its way into checkpoints.

R1-Zero's reference becomes the policy every 400 steps (DeepSeek-R1, arXiv 2501.12948, section 2.1): TRL's
`sync_ref_model: true`, `ref_model_sync_steps: 400`, `ref_model_mixup_alpha: 1`.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback
from trl.trainer.callbacks import SyncRefModelCallback

REFERENCE = "reference.safetensors"
BUCKET = 128 * 2**20
"""Weights gathered at once, of each model. TRL gathers both models whole."""


class ReferenceReset(TrainerCallback):
    """In the place of TRL's: bucket by bucket, and the new reference is kept for the checkpoints to come.

    It lies in the run's folder, and each checkpoint has it as a link: it is written once a reset.
    """

    def __init__(self, reference: nn.Module, accelerator):
        self.reference = accelerator.unwrap_model(reference)
        self.accelerator = accelerator

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % args.ref_model_sync_steps:
            return
        policy = self.accelerator.unwrap_model(model)
        blend(policy, self.reference, args.ref_model_mixup_alpha)
        keep_reference(self.reference, Path(args.output_dir), args.should_save)


@torch.no_grad()
def blend(policy: nn.Module, reference: nn.Module, alpha: float) -> None:
    """reference <- (1 - alpha) reference + alpha policy (TR-DPO, arXiv 2404.09656, eq. 3).

    A collective under ZeRO-3.
    """
    pairs = list(zip(reference.parameters(), policy.parameters(), strict=True))
    for group in _buckets(pairs):
        with _gathered([p for pair in group for p in pair], writer=0):
            for target, source in group:
                target.data.lerp_(source.data.to(target.dtype), alpha)


@torch.no_grad()
def keep_reference(reference: nn.Module, folder: Path, writes: bool) -> None:
    """Write the reference into the run's `folder`, whole or not at all. A collective under ZeRO-3."""
    kept = {}
    for group in _buckets([(p, name) for name, p in reference.named_parameters()]):
        with _gathered([parameter for parameter, _ in group], writer=None):
            if writes:
                kept |= {name: parameter.data.detach().cpu().clone() for parameter, name in group}
    if writes:
        beside = folder / f".{REFERENCE}"
        save_file(kept, beside)
        os.replace(beside, folder / REFERENCE)


@torch.no_grad()
def load_reference(reference: nn.Module, path: Path) -> None:
    """Put what `keep_reference` wrote into `reference`. A collective under ZeRO-3."""
    with safe_open(path, "pt") as kept:
        for group in _buckets([(p, name) for name, p in reference.named_parameters()]):
            with _gathered([parameter for parameter, _ in group], writer=0):
                for parameter, name in group:
                    parameter.data.copy_(kept.get_tensor(name))


def link(source: Path, target: Path) -> None:
    """`target` becomes the same file as `source`, or a copy where a file system has no links."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def replace_trl_callback(trainer) -> None:
    """Where TRL would reset the reference, let `ReferenceReset` do it."""
    if trainer.pop_callback(SyncRefModelCallback) is not None:
        trainer.add_callback(ReferenceReset(trainer.ref_model, trainer.accelerator))


def _buckets(items: list[tuple]) -> Iterator[list[tuple]]:
    """`items`, whose first member is a parameter, in groups of at most `BUCKET` bytes of those."""
    group, held = [], 0
    for item in items:
        size = getattr(item[0], "ds_numel", item[0].numel()) * item[0].element_size()
        if group and held + size > BUCKET:
            yield group
            group, held = [], 0
        group.append(item)
        held += size
    yield group


def _gathered(parameters: list[nn.Parameter], writer: int | None) -> AbstractContextManager:
    """ZeRO-3's parameters whole; what the rank `writer` writes into them is everybody's afterwards."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=writer)
