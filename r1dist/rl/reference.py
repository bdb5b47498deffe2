"""The reference model: its resets, and how a checkpoint keeps it.

R1-Zero's reference becomes the policy every 400 steps (DeepSeek-R1, arXiv 2501.12948, section 2.1): TRL's
`sync_ref_model: true`, `ref_model_sync_steps: 400`, `ref_model_mixup_alpha: 1`.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import Trainer, TrainerCallback
from trl.trainer.callbacks import SyncRefModelCallback

from ..files import REFERENCE, link
from ..generation.weight_sync.source import gathered, grouped_by_size

BUCKET_BYTES = 128 * 2**20
"""Weights gathered at once, of each model. TRL's callback gathers both models completely."""


class ReferenceReset(TrainerCallback):
    """Blends the policy into the reference every `ref_model_sync_steps`, bucket by bucket, and saves the reference.

    The file is written to the run's folder once for each reset; checkpoints link to it.
    """

    def __init__(self, reference: nn.Module, accelerator):
        self.reference = accelerator.unwrap_model(reference)
        self.accelerator = accelerator

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % args.ref_model_sync_steps:
            return
        policy = self.accelerator.unwrap_model(model)
        blend(policy, self.reference, args.ref_model_mixup_alpha)
        save_reference(self.reference, Path(args.output_dir), args.should_save)


@torch.no_grad()
def blend(policy: nn.Module, reference: nn.Module, alpha: float) -> None:
    """reference <- (1 - alpha) reference + alpha policy (TR-DPO, arXiv 2404.09656, eq. 3).

    A collective under ZeRO-3.
    """
    pairs = zip(reference.parameters(), policy.parameters(), strict=True)
    for group in grouped_by_size(pairs, lambda pair: _bytes(pair[0]), BUCKET_BYTES):
        with gathered([p for pair in group for p in pair], writer=0):
            for target, source in group:
                target.data.lerp_(source.data.to(target.dtype), alpha)


@torch.no_grad()
def save_reference(reference: nn.Module, folder: Path, writes: bool) -> None:
    """Write the reference into the run's `folder`, atomically. A collective under ZeRO-3."""
    tensors: dict[str, torch.Tensor] = {}
    for group in _named_buckets(reference):
        with gathered([parameter for _, parameter in group]):
            if writes:
                tensors |= {name: parameter.data.detach().cpu().clone() for name, parameter in group}
    if writes:
        partial = folder / f".{REFERENCE}"
        save_file(tensors, partial)
        os.replace(partial, folder / REFERENCE)


@torch.no_grad()
def load_reference(reference: nn.Module, path: Path) -> None:
    """Load what `save_reference` wrote into `reference`. A collective under ZeRO-3."""
    with safe_open(path, "pt") as tensors:
        for group in _named_buckets(reference):
            with gathered([parameter for _, parameter in group], writer=0):
                for name, parameter in group:
                    parameter.data.copy_(tensors.get_tensor(name))


def use_reference_reset(trainer: Trainer) -> None:
    """Replace TRL's callback for `sync_ref_model`, if there is one, by `ReferenceReset`."""
    if trainer.pop_callback(SyncRefModelCallback) is not None:
        trainer.add_callback(ReferenceReset(trainer.ref_model, trainer.accelerator))


def restore_reference(trainer: Trainer, checkpoint: Path | None) -> None:
    """Load the reference that `checkpoint` keeps, if it has one; every rank calls it. None: the run begins anew."""
    kept = Path(trainer.args.output_dir) / REFERENCE
    saved = None if checkpoint is None or not (checkpoint / REFERENCE).exists() else checkpoint / REFERENCE
    if trainer.args.should_save:
        kept.unlink(missing_ok=True)
        if saved is not None:
            link(saved, kept)
    if saved is not None:
        load_reference(trainer.accelerator.unwrap_model(trainer.ref_model), saved)


def save_reference_link(trainer: Trainer, checkpoint: Path) -> None:
    """Let `checkpoint` keep the reference, if it was ever reset."""
    if (kept := Path(trainer.args.output_dir) / REFERENCE).exists():
        link(kept, checkpoint / REFERENCE)


def _named_buckets(model: nn.Module) -> Iterator[list[tuple[str, nn.Parameter]]]:
    return grouped_by_size(model.named_parameters(), lambda named: _bytes(named[1]), BUCKET_BYTES)


def _bytes(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
