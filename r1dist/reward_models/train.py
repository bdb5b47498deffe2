"""Reward models: TRL's trainer on pairs (helpfulness), a classifier on labels (safety).

Rows are put into tokens by the very function that scores with the model later.
"""

import functools
import logging
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy
import torch
import trl
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.trainer.reward_trainer import suppress_seqcls_warning

from ..adapters import lora_config, save_trained
from ..config import RewardModelRun
from ..config.trl_fields import trl_value
from ..data.mapping import kept, mapped
from ..data.sources import load_labels, load_pairs
from ..data.templates import Template, load_template
from ..errors import UserError
from ..evaluation.estimators import clustered_interval
from ..files import write_json
from ..models import check_lora, model_init_kwargs, weights_path
from ..publish.hub import Publication, hub_repository
from ..rewards.model import ModelReward, conversation_ids
from ..run.checkpoints import ResumableTrainer
from ..run.process import set_up_process
from ..run.progress import show_progress
from ..run.setup import check_rows, computing_dtype, hardware_defaults, run_folder, trl_arguments

logger = logging.getLogger(__name__)

COLUMNS = {"loss": "loss", "accuracy": "accuracy", "margin": "margin"}
SCORES = "evaluation.json"


@dataclass(frozen=True)
class Scores:
    """How often the model is right on rows that it was not trained on."""

    rows: int
    accuracy: float
    ci95: tuple[float, float]


class PairTrainer(ResumableTrainer, trl.RewardTrainer):
    """TRL's: -log sigmoid(score of the chosen - score of the rejected)."""

    def __init__(self, **kwargs):
        super().__init__(compute_metrics=_pairs_right, preprocess_logits_for_metrics=_by_pair, **kwargs)


class LabelTrainer(ResumableTrainer, Trainer):
    """Binary cross-entropy of one logit, 1 for good."""

    def __init__(self, **kwargs):
        super().__init__(compute_metrics=_labels_right, **kwargs)


def _by_pair(logits: torch.Tensor, labels: tuple) -> torch.Tensor:
    """Logits [2B, 1], the chosen replies' first, as [B, 2]: of the last batch accelerate drops rows that repeat."""
    return logits.view(2, -1).T.contiguous()


def _pairs_right(found: EvalPrediction) -> dict[str, float]:
    chosen, rejected = found.predictions.T
    return _logged(chosen > rejected)


def _labels_right(found: EvalPrediction) -> dict[str, float]:
    return _logged((found.predictions > 0) == (found.label_ids == 1))  # a probability above a half


def _logged(right: numpy.ndarray) -> dict[str, float]:
    scores = _scores(right.ravel().astype(float).tolist())
    return {"accuracy": scores.accuracy, **dict(zip(("accuracy_low", "accuracy_high"), scores.ci95, strict=True))}


def _scores(right: list[float]) -> Scores:
    return Scores(len(right), fmean(right), clustered_interval(right))


def train(run: RewardModelRun) -> None:
    """Train from `run.model`, save the model into `output_dir` and measure it on `run.holdout`."""
    set_up_process(use_cpu=run.trl.get("use_cpu", False))
    template = load_template(run.model, "chat")
    tokenizer = template.tokenizer
    check_lora(run.model, "SEQ_CLS")
    pairwise = run.loss == "pairwise"
    dataset = training_rows(run, template)
    held_out = holdout_rows(run, template) if run.holdout else None
    evaluated = None if held_out is None else _as_ids(run, template, held_out)
    weights = weights_path(run.model)
    values = hardware_defaults(run.trl, run.model.dtype)
    kwargs = model_init_kwargs(run.model, values)
    arguments = trl_arguments(trl.RewardConfig, **values, model_init_kwargs=kwargs)
    check_rows(run, len(dataset))
    repository = hub_repository(run)
    with run_folder(run, "reward_model") as checkpoint:
        common = {"args": arguments, "train_dataset": dataset, "processing_class": tokenizer}
        common |= {"eval_dataset": evaluated, "stall_timeout": run.train.stall_timeout}
        if pairwise:
            trainer = PairTrainer(model=weights, peft_config=lora_config(run.model.lora, "SEQ_CLS"), **common)
        else:
            collator = DataCollatorWithPadding(tokenizer)
            classifier = new_classifier(run, tokenizer.pad_token_id, kwargs)
            trainer = LabelTrainer(model=classifier, data_collator=collator, **common)
        show_progress(trainer, COLUMNS)
        publication = Publication(run, trainer, repository)
        trainer.train(resume_from_checkpoint=checkpoint)
        save_trained(trainer, run.model, "SEQ_CLS")
        if held_out is not None:
            dtype = computing_dtype(arguments, run.model.dtype)
            scores = measure(run, held_out, arguments.process_index, arguments.world_size, dtype)
            logger.info("right on %.1f %% of %d rows held out", 100 * scores.accuracy, scores.rows)
            if trainer.is_world_process_zero():
                write_json(Path(arguments.output_dir) / SCORES, asdict(scores))
        trainer.accelerator.end_training()  # as in grpo.py
        publication.finish()


def measure(run: RewardModelRun, rows: Dataset, rank: int = 0, ranks: int = 1, dtype: str = "float32") -> Scores:
    """The saved model, in `dtype`, on `rows`: the better reply scored higher, or the label on its side of a half.

    Each rank has the whole model, as a reward has it, and scores its share of the rows. A collective.
    """
    own = rows.select(range(rank, len(rows), ranks))
    if run.loss == "pairwise":
        model = ModelReward("helpfulness", run.trl["output_dir"], dtype)
        chosen, rejected = (model(own[name], list(own)) for name in ("chosen", "rejected"))
        right = [float(better > worse) for better, worse in zip(chosen, rejected, strict=True)]
    else:
        scores = ModelReward("safety", run.trl["output_dir"], dtype)(own["completion"], list(own))
        right = [float((score > 0.5) == bool(label)) for score, label in zip(scores, own["label"], strict=True)]
    return _scores(gather_object(right))


def training_rows(run: RewardModelRun, template: Template) -> Dataset:
    """`run.sources`: `chosen_ids` and `rejected_ids` of pairs, as TRL takes them, or `input_ids` and `labels`, a list
    of one number.
    """
    return _fitting(run, _as_ids(run, template, _load(run, "sources")), dict, "sources")


def holdout_rows(run: RewardModelRun, template: Template) -> Dataset:
    """The rows of `run.holdout` that fit into `max_length`, as texts."""
    return _fitting(run, _load(run, "holdout"), _ids_of(run, template), "holdout")


def _load(run: RewardModelRun, field: str) -> Dataset:
    try:
        return (load_pairs if run.loss == "pairwise" else load_labels)(getattr(run, field))
    except UserError as error:
        raise UserError(f"{field}: {re.sub('^(data[.])?sources: ', '', str(error))}") from error


def _as_ids(run: RewardModelRun, template: Template, rows: Dataset) -> Dataset:
    return mapped(rows, _ids_of(run, template), remove_columns=rows.column_names)


def _ids_of(run: RewardModelRun, template: Template) -> Callable[[dict], dict]:
    return functools.partial(_pair_ids if run.loss == "pairwise" else _labelled_ids, template)


def _pair_ids(template: Template, row: dict) -> dict:
    return {f"{name}_ids": conversation_ids(template, row["problem"], row[name]) for name in ("chosen", "rejected")}


def _labelled_ids(template: Template, row: dict) -> dict:
    return {
        "input_ids": conversation_ids(template, row["problem"], row["completion"]),
        "labels": [float(row["label"])],
    }


def _fitting(run: RewardModelRun, rows: Dataset, ids_of: Callable[[dict], dict], field: str) -> Dataset:
    """The rows of which no `ids_of` is longer than `max_length`. Raises `UserError` if there is none."""
    limit = trl_value(run, "max_length")
    if limit is None:
        return rows
    fitting = kept(rows, lambda row: all(len(ids) <= limit for ids in ids_of(row).values()))
    dropped = len(rows) - len(fitting)
    if dropped:
        logger.warning("%s: dropped %d of %d rows, longer than max_length = %d", field, dropped, len(rows), limit)
    if not len(fitting):
        raise UserError(f"{field}: none of the {len(rows)} rows fits into max_length = {limit} tokens.")
    return fitting


def new_classifier(run: RewardModelRun, pad_token_id: int, kwargs: dict[str, Any]) -> Any:
    """`run.model` with a head of one logit, drawn by the run's seed as TRL does for pairs, and with its adapters.

    `kwargs`: Of `from_pretrained`.
    """
    set_seed(trl_value(run, "seed"))
    with suppress_seqcls_warning():
        model = AutoModelForSequenceClassification.from_pretrained(
            weights_path(run.model),
            num_labels=1,
            problem_type="multi_label_classification",  # transformers' name for cross-entropy on each logit
            pad_token_id=pad_token_id,
            **kwargs,
        )
    return model if run.model.lora is None else _adapted(run, model)


def _adapted(run: RewardModelRun, model: PreTrainedModel) -> Any:
    """`model` with adapters, as TRL's trainers wrap theirs."""
    from peft import get_peft_model

    # ZeRO-3 gathers parameters of one dtype.
    upcast = not is_deepspeed_zero3_enabled()
    adapted = get_peft_model(model, lora_config(run.model.lora, "SEQ_CLS"), autocast_adapter_dtype=upcast)
    if trl_value(run, "gradient_checkpointing"):
        adapted.enable_input_require_grads()
    return adapted
