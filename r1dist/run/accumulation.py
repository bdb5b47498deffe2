"""Gradient accumulation within one of transformers' micro-steps."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from torch import nn


@contextmanager
def without_gradient_exchange(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Backward passes add to the gradients and do nothing else, as in a micro-step that is not the step's last."""
    state = accelerator.gradient_state
    last = state.sync_gradients
    state._set_sync_gradients(False)  # as transformers' training loop does
    try:
        with accelerator.no_sync(model):
            yield
    finally:
        state._set_sync_gradients(last)
