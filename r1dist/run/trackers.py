"""Trackers (`report_to`): what must be there before a model is loaded, and where a run can be looked at.

transformers' own callbacks report; nothing of them is replaced.
"""

import shlex
from collections.abc import Callable
from pathlib import Path

from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

from ..errors import UserError


def require_trackers(arguments: TrainingArguments) -> None:
    """Raises `UserError` where W&B has no valid key, and what transformers raises where a tracker cannot be used."""
    for callback in get_reporting_integration_callbacks(arguments.report_to):
        callback()
    if "wandb" in arguments.report_to and arguments.process_index == 0:
        _require_wandb_key()


def _require_wandb_key() -> None:
    import wandb

    mode = wandb.setup().settings.mode
    if mode in ("offline", "dryrun", "disabled"):
        return
    try:
        known = wandb.login(prompt=False)  # asks the server whether the key is valid
    except wandb.errors.Error as error:
        raise UserError(
            f"`report_to`: wandb: {' '.join(str(error).split())}\n"
            "`wandb login --relogin` stores another key; WANDB_MODE=offline writes to this disk instead."
        ) from error
    if not known:
        raise UserError(
            "`report_to`: wandb has no API key here.\n"
            "`wandb login` stores one, WANDB_API_KEY names one; WANDB_MODE=offline writes to this disk instead."
        )


class TrackerLinks(TrainerCallback):
    """Prints where each tracker shows the run, once they have begun it: to be added after them."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        for name in args.report_to:
            if name in PLACES:
                print(f"{name}: {PLACES[name](self.trainer)}", flush=True)


def _wandb_place(trainer: Trainer) -> str:
    import wandb

    if wandb.run.disabled:
        return "disabled (WANDB_MODE)"
    return f"wandb sync {shlex.quote(str(Path(wandb.run.dir).parent))}" if wandb.run.offline else wandb.run.url


def _tensorboard_place(trainer: Trainer) -> str:
    callbacks = trainer.callback_handler.callbacks
    folder = next(c.tb_writer.log_dir for c in callbacks if isinstance(c, TensorBoardCallback))
    return f"tensorboard --logdir {shlex.quote(str(folder))}"


def _trackio_place(trainer: Trainer) -> str:
    import trackio

    space = trackio.context_vars.current_space_id.get()
    here = f"trackio show --project {shlex.quote(trainer.args.project)}"
    return f"https://huggingface.co/spaces/{space}" if space else here


def _mlflow_place(trainer: Trainer) -> str:
    import mlflow

    store, run = mlflow.get_tracking_uri(), mlflow.active_run().info
    if store.startswith("http"):
        return f"{store}/#/experiments/{run.experiment_id}/runs/{run.run_id}"
    return f"run {run.run_id}; mlflow ui --backend-store-uri {shlex.quote(store)}"


PLACES: dict[str, Callable[[Trainer], str]] = {
    "wandb": _wandb_place,
    "tensorboard": _tensorboard_place,
    "trackio": _trackio_place,
    "mlflow": _mlflow_place,
}
"""Tracker -> a link, or a command, that shows the run."""
