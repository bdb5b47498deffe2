"""An engine over fixed weights: for sampling, evaluation and chat."""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..config import Rollout as RolloutSettings
from ..data.templates import Template
from ..models import weights_path
from .engine import Engine
from .local import load_engine
from .vllm.limits import Demand, check_running
from .vllm.start import connect_fixed, start_managed


@contextmanager
def engine_when_needed(
    rollout: RolloutSettings, demand: Demand, template: Template, folder: Path
) -> Iterator[Callable[[], Engine]]:
    """A function that gives `fixed_engine`'s engine, which is started by its first call and ends with the context."""
    with ExitStack() as stack:
        yield functools.cache(lambda: stack.enter_context(fixed_engine(rollout, demand, template, folder)))


@contextmanager
def fixed_engine(rollout: RolloutSettings, demand: Demand, template: Template, folder: Path) -> Iterator[Engine]:
    """The engine that `rollout` asks for, with `demand.model`'s own weights; managed servers end with the context.

    Args:
        folder: Where managed servers leave their logs.

    Raises `UserError` where servers cannot do what `demand` says.
    """
    model = demand.model
    if rollout.engine != "vllm":
        yield load_engine(model, template, rollout.batch_size)
        return
    started = None
    if rollout.servers == "managed":
        started = start_managed(rollout, weights_path(model), model.dtype, demand.tokens, folder, trainers=0)
    else:
        check_running(rollout, demand)
    try:
        engine = connect_fixed(rollout, folder, template.stop_ids)
        try:
            yield engine
        finally:
            engine.close()
    finally:
        if started is not None:
            started.stop()
