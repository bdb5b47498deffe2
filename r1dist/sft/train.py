"""SFT on completions: TRL's trainer, packed, with over-long rows dropped before packing could cut them."""

import logging

import torch
import trl
from datasets import Dataset

from ..adapters import lora_config, save_trained
from ..config import SFTRun
from ..config.trl_fields import trl_value
from ..data.prompts import completion_dataset
from ..data.templates import load_template
from ..models import INSTALL_VARLEN, check_lora, model_init_kwargs, weights_path
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
    """TRL's, which can be stopped anywhere and resumed."""


def train(run: SFTRun) -> None:
    """Fine-tune `run.model` and save it into `output_dir`."""
    set_up_process(use_cpu=run.trl.get("use_cpu", False))
    template = load_template(run.model, run.data.template)
    check_lora(run.model)
    max_length, seed = trl_value(run, "max_length"), trl_value(run, "seed")
    contaminated: list[dict] = []
    dataset = completion_dataset(run.data, template, max_length, seed, contaminated)
    weights = weights_path(run.model)
    values = {**DEFAULTS, **hardware_defaults(run.trl, run.model.dtype)}
    kwargs = model_init_kwargs(run.model, values)
    arguments = trl_arguments(trl.SFTConfig, **values, model_init_kwargs=kwargs)
    if arguments.packing:
        warn_of_masks(kwargs["attn_implementation"])
    counts = arguments.packing and arguments.dataloader_drop_last
    check_rows(run, len(dataset), packed_blocks(dataset["length"], arguments) if counts else None)
    with run_folder(run, "sft", contaminated) as checkpoint:
        trainer = SFTTrainer(
            model=weights,
            args=arguments,
            train_dataset=dataset.remove_columns("length"),
            processing_class=template.tokenizer,
            peft_config=lora_config(run.model.lora),
            stall_timeout=run.train.stall_timeout,
        )
        show_progress(trainer, COLUMNS)
        trainer.train(resume_from_checkpoint=checkpoint)
        save_trained(trainer, run.model)
        trainer.accelerator.end_training()  # as in grpo.py


def warn_of_masks(kernel: str) -> None:
    """Log what mends it where packing on a GPU needs masks: only a varlen kernel tells rows apart without."""
    if torch.cuda.is_available() and "flash" not in kernel:
        logger.warning(
            "packing with %s: each block of `max_length` tokens has a mask with their square, which is slower than "
            "flash attention. %s adds that", kernel, INSTALL_VARLEN,
        )  # fmt: skip


def packed_blocks(lengths: list[int], arguments: trl.SFTConfig) -> int:
    """The blocks that TRL packs rows of so many tokens into."""
    blocks = 0
    for start in range(0, len(lengths), PACKED_TOGETHER):
        rows = Dataset.from_dict({"input_ids": [[0] * n for n in lengths[start : start + PACKED_TOGETHER]]})
        blocks += len(trl.pack_dataset(rows, arguments.max_length, arguments.packing_strategy))
    return blocks
