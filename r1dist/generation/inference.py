"""An engine over fixed weights: for sampling, evaluation and chat."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..config import Model
from ..config import Rollout as RolloutSettings
from ..data.templates import Template
from ..models import weights_path
from .engine import Engine
from .local import load_engine
from .vllm.start import connect_fixed, start_managed


@contextmanager
def fixed_engine(
    rollout: RolloutSettings, model: Model, template: Template, tokens: int, folder: Path
) -> Iterator[Engine]:
    """The engine that `rollout` asks for, with `model`'s own weights; managed servers end with the context.

    Args:
        tokens: The longest prompt and completion together.
        folder: Where managed servers leave their logs.
    """
    if rollout.engine != "vllm":
        yield load_engine(model, template, rollout.batch_size)
        return
    managed = rollout.servers == "managed"
    servers = start_managed(rollout, weights_path(model), model.dtype, tokens, folder, trainers=0) if managed else None
    try:
        engine = connect_fixed(rollout, folder, template.stop_ids)
        try:
            yield engine
        finally:
            engine.close()
    finally:
        if servers is not None:
            servers.stop()
