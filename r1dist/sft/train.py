"""SFT on completions: TRL's trainer, packed, with over-long rows dropped before packing could cut them."""

import logging
import os
from contextlib import nullcontext

import torch
import trl
from datasets import Dataset

from ..adapters import lora_config, save_trained
from ..config import Data, SFTRun
from ..config.trl_fields import trl_value
from ..data.prompts import completion_dataset
from ..data.templates import Template, load_template
from ..errors import RunStopped, UserError, VerifiersBroken
from ..evaluation.training import TrainingEvaluation, evaluation_sources, training_evaluation
from ..generation.trainer_engines import local_engine
from ..models import INSTALL_VARLEN, check_lora, model_init_kwargs, stop_at, weights_path
from ..publish.hub import Publication, hub_repository
from ..rewards import verifiers_of
from ..rewards.pool import Pool
from ..run.checkpoints import ResumableTrainer
from ..run.process import set_up_process
from ..run.progress import show_progress
from ..run.setup import check_rows, hardware_defaults, run_folder, trl_arguments

logger = logging.getLogger(__name__)

COLUMNS = {"loss": "loss", "token accuracy": "mean_token_accuracy"}
# Packing joins rows to blocks of max_length; the loss falls on completions only.
DEFAULTS = {"packing": True, "completion_only_loss": True}

PACKED_TOGETHER = 1000  # rows: the batches of `datasets.map`, by which TRL packs


class SFTTrainer(ResumableTrainer, trl.SFTTrainer):
    """TRL's, which can be stopped anywhere and resumed.

    Args:
        holdout: The rows whose loss `eval_strategy` measures, in the form of `train_dataset`; None: none.
        evaluation: What it measures, too, `per_device_eval_batch_size` rollouts at a time; None: nothing.
        template: Of its prompts.
        **kwargs: `ResumableTrainer`'s and `trl.SFTTrainer`'s arguments.
    """

    def __init__(
        self, *, train_dataset: Dataset, holdout: Dataset | None, evaluation: TrainingEvaluation | None,
        template: Template, **kwargs,
    ):  # fmt: skip
        # transformers asks for rows even where `evaluation` alone is measured, which has its own.
        eval_dataset = train_dataset.select([0]) if holdout is None and evaluation else holdout
        super().__init__(train_dataset=train_dataset, eval_dataset=eval_dataset, **kwargs)
        self.holdout, self.evaluation, self.template = holdout, evaluation, template

    def measure(self) -> dict[str, float]:
        found = {} if self.holdout is None else super().measure()
        if self.evaluation is not None:
            engine = local_engine(self.args.per_device_eval_batch_size, self)
            found |= self.evaluation.measure(engine, self.state.global_step, self.watchdog.heartbeat)
        return found


def train(run: SFTRun) -> None:
    """Fine-tune `run.model` and save it into `output_dir`."""
    set_up_process(use_cpu=run.trl.get("use_cpu", False))
    share = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    verifiers = verifiers_of((), evaluation_sources(run.data))
    with Pool(verifiers, run.verify, share) if run.data.eval else nullcontext() as pool:
        _train(run, pool)


def _train(run: SFTRun, pool: Pool | None) -> None:
    template = load_template(run.model, run.data.template)
    check_lora(run.model)
    max_length, seed = trl_value(run, "max_length"), trl_value(run, "seed")
    contaminated: list[dict] = []
    dataset = completion_dataset(run.data, template, max_length, seed, contaminated)
    holdout = holdout_dataset(run, template, max_length) if run.holdout else None
    weights = weights_path(run.model)
    values = {**DEFAULTS, **hardware_defaults(run.trl, run.model.dtype)}
    kwargs = model_init_kwargs(run.model, values)
    arguments = trl_arguments(trl.SFTConfig, **values, model_init_kwargs=kwargs)
    if arguments.packing:
        warn_of_masks(kwargs["attn_implementation"], arguments.per_device_train_batch_size)
    counts = arguments.packing and arguments.dataloader_drop_last
    check_rows(run, len(dataset), packed_blocks(dataset["length"], arguments) if counts else None)
    evaluation = training_evaluation(run, template, pool, arguments.process_index, arguments.world_size)
    repository = hub_repository(run)
    with run_folder(run, "sft", contaminated) as checkpoint:
        trainer = SFTTrainer(
            train_dataset=dataset.remove_columns("length"),
            holdout=holdout,
            evaluation=evaluation,
            template=template,
            model=weights,
            args=arguments,
            processing_class=template.tokenizer,
            peft_config=lora_config(run.model.lora),
            stall_timeout=run.train.stall_timeout,
        )
        show_progress(trainer, COLUMNS)
        publication = Publication(run, trainer, repository)
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except VerifiersBroken as error:
            raise RunStopped(f"{error}\n{trainer.save_before_stopping()}") from error
        stop_at(trainer.accelerator.unwrap_model(trainer.model), template.stop_ids)
        save_trained(trainer, run.model)
        trainer.accelerator.end_training()  # as in grpo.py
        publication.finish()


def holdout_dataset(run: SFTRun, template: Template, max_length: int | None) -> Dataset:
    """The rows of `run.holdout`, as `completion_dataset` makes them for training. Raises `UserError`."""
    try:
        rows = completion_dataset(Data(sources=run.holdout, template=run.data.template), template, max_length)
    except UserError as error:
        raise UserError(f"holdout: {str(error).removeprefix('data.sources: ')}") from error
    return rows.remove_columns("length")


def warn_of_masks(kernel: str, blocks: int) -> None:
    """Log what mends it where packing needs masks: only a varlen kernel tells rows apart without.

    TRL makes one sequence of the blocks of a forward, whose mask and attention have the square of its length.
    """
    if "flash" in kernel:
        return
    if torch.cuda.is_available():
        logger.warning("packing with %s is slower than with flash attention. %s adds that", kernel, INSTALL_VARLEN)
    if blocks > 1:
        logger.warning(
            "packing with %s: the mask of a forward has the square of its tokens. `per_device_train_batch_size: 1` "
            "with %d times the `gradient_accumulation_steps` is the same step, faster and in less memory",
            kernel, blocks,
        )  # fmt: skip


def packed_blocks(lengths: list[int], arguments: trl.SFTConfig) -> int:
    """The blocks that TRL packs rows of so many tokens into."""
    blocks = 0
    for start in range(0, len(lengths), PACKED_TOGETHER):
        rows = Dataset.from_dict({"input_ids": [[0] * n for n in lengths[start : start + PACKED_TOGETHER]]})
        blocks += len(trl.pack_dataset(rows, arguments.max_length, arguments.packing_strategy))
    return blocks
