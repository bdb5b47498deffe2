"""Each field with its default and its meaning, for `--help` and docs/configuration_reference.md."""

import dataclasses
import textwrap
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from .convert import ConvertRun
from .objective import LOSS_TYPES, PAPER
from .pipeline import PipelineRun
from .runs import ChatRun, EvaluateRun, GRPORun, RewardModelRun, ServeRun, SFTRun
from .sampling import SampleRun
from .tree import may_change, section_of
from .trl_fields import GRPO_DEFAULTS, MAY_CHANGE, TRL_CLASS, TRL_DEFAULTS, field_types

LAUNCHERS = {
    "grpo": GRPORun, "sft": SFTRun, "reward_model": RewardModelRun, "sample": SampleRun, "evaluate": EvaluateRun,
    "pipeline": PipelineRun, "serve": ServeRun, "chat": ChatRun, "convert": ConvertRun,
}  # fmt: skip
"""Launcher -> its configuration."""
# The fields of TRL and transformers that most runs set, and what they mean.
COMMON = {
    "output_dir": "The folder of the run. It belongs to one run.",
    "seed": "Seed of the order of prompts, of each sample, and of new weights.",
    "max_steps": "Optimizer steps; -1: `num_train_epochs` counts.",
    "num_train_epochs": "Passes over the data.",
    "learning_rate": "Peak learning rate.",
    "lr_scheduler_type": "How it changes: `linear`, `cosine`, `constant_with_warmup`, ...",
    "lr_scheduler_kwargs": "Parameters of the schedule, e.g. `{min_lr_rate: 0.1}`.",
    "warmup_steps": "Steps until the peak; below 1, a share of all steps.",
    "per_device_train_batch_size": "Rows (RL: rollouts) of a micro-step on each process.",
    "gradient_accumulation_steps": "Micro-steps of an optimizer step.",
    "gradient_checkpointing": "Recompute activations in the backward pass: less memory, more time.",
    "bf16": "bfloat16 mixed precision. Unset: on where the GPU has it.",
    "max_grad_norm": "The gradient is scaled down to this norm.",
    "weight_decay": "Decoupled weight decay.",
    "optim": "The optimizer, by transformers' name.",
    "save_strategy": "`steps`, `epoch` or `no`.",
    "save_steps": "Optimizer steps between two checkpoints.",
    "save_total_limit": "Checkpoints that are kept.",
    "logging_steps": "Optimizer steps between two lines of the log.",
    "report_to": "Trackers: `tensorboard`, `wandb`, `trackio`, `mlflow`, or `none`. See docs/trackers.md.",
    "run_name": "The run's name there.",
    "project": "Trackio's project.",
    "push_to_hub": "Upload the model to the Hugging Face hub. See docs/after_training.md.",
    "hub_model_id": "The repository. Unset: the name of `output_dir`, of the account that the token belongs to.",
    "hub_private_repo": "Whether a new repository is private. Unset: as the account makes them.",
    "hub_strategy": "What is uploaded: the model at the `end`, at `every_save`, or besides the whole `checkpoint` (in "
    "`last-checkpoint`), or `all_checkpoints`.",
}
FIELDS = {
    "GRPOConfig": {
        **COMMON,
        "num_generations": "Rollouts of a group, the completions of one prompt.",
        "steps_per_generation": "Micro-steps that a generation lasts. Unset: from `generation_batch_size`, else "
        "`gradient_accumulation_steps`. One must be a multiple of the other.",
        "num_iterations": "Times that each generation is trained on.",
        "max_completion_length": "Tokens after which a rollout is cut off.",
        "temperature": "Sampling temperature; the loss uses the same.",
        "top_p": "Nucleus. Keep 1 in RL.",
        "top_k": "Tokens to draw from; 0: all. Keep 0 in RL.",
        "min_p": "Least probability of a token, relative to the best one's.",
        "repetition_penalty": "1: none.",
        "loss_type": f"One of {', '.join(LOSS_TYPES)}.",
        "importance_sampling_level": "`token`, or `sequence` (GSPO).",
        "beta": "Weight of the KL divergence from the reference model; 0: no reference model is loaded.",
        "use_bias_correction_kl": "Weight the KL estimate by the probability ratio.",
        "epsilon": "Clip range of the ratio, downwards.",
        "epsilon_high": "Clip range upwards. Unset: `epsilon`.",
        "delta": "Upper bound of the ratio where the advantage is negative.",
        "scale_rewards": "What advantages are divided by: the deviation of the `group`, of the `batch`, or `none`.",
        "multi_objective_aggregation": "`sum_then_normalize` or `normalize_then_sum` (GDPO).",
        "mask_truncated_completions": "Leave rollouts that were cut off out of the loss.",
        "sync_ref_model": "Reset the reference model to the policy now and then.",
        "ref_model_sync_steps": "Optimizer steps between two resets.",
        "ref_model_mixup_alpha": "Share of the policy in the new reference.",
        "vllm_importance_sampling_correction": "Weight tokens by policy over sampler probability, for rollouts of "
        "servers.",
        "vllm_importance_sampling_mode": "`token_truncate`, `token_mask`, `sequence_truncate` or `sequence_mask`.",
        "vllm_importance_sampling_clip_min": "Lower bound of that weight.",
        "vllm_importance_sampling_clip_max": "Upper bound of that weight.",
        "log_completions": "Show completions in the terminal, and as a table in W&B and Trackio.",
    },
    "SFTConfig": {
        **COMMON,
        "max_length": "Tokens of a row; longer rows are dropped and counted.",
        "packing": "Join rows to blocks of `max_length`. Ours: true.",
        "completion_only_loss": "The loss is on completions only. Ours: true.",
    },
    "RewardConfig": {**COMMON, "max_length": "Tokens of a conversation; longer rows are dropped and counted."},
}


class FieldHelp(NamedTuple):
    """`default` is empty where there is none."""

    name: str
    """Dotted; `N` counts into a list."""
    default: str
    on_resume: bool
    """Whether a run may be resumed with another value."""
    meaning: str


def own_fields(run_class: type) -> Iterator[FieldHelp]:
    """The fields of a launcher's configuration but for TRL's, sections one after another."""
    return _fields(run_class, run_class, "")


def trl_fields(run_class: type) -> Iterator[FieldHelp]:
    """Those of TRL's fields that most runs set; none for a launcher that does not train."""
    trl_class = TRL_CLASS.get(run_class.__name__)
    if trl_class is None:
        return
    defaults = {name: default for name, (_, default) in field_types(trl_class).items()} | TRL_DEFAULTS
    if trl_class == "GRPOConfig":
        defaults |= GRPO_DEFAULTS | PAPER
    for name, text in FIELDS[trl_class].items():
        yield FieldHelp(name, _shown(defaults[name]), name in MAY_CHANGE, text)


def help_text(run_class: type) -> str:
    """What `--help` prints of a launcher's fields."""
    lines = ["Fields, in the YAML that --config names or as --field value:", ""]
    for field in (*own_fields(run_class), *trl_fields(run_class)):
        lines.append(f"  --{field.name}" + (f"  (default: {field.default})" if field.default else ""))
        lines += textwrap.wrap(field.meaning, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    if run_class.__name__ in TRL_CLASS:
        lines += ["", f"Any other field of TRL's {TRL_CLASS[run_class.__name__]} may be set, too."]
    return "\n".join(lines)


def _fields(launcher: type, section: type, prefix: str) -> Iterator[FieldHelp]:
    schema = TypeAdapter(section).json_schema()["properties"]
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        if field.name == "trl":
            continue
        name, inner = f"{prefix}{field.name}", section_of(hints[field.name])
        shown = schema.get(field.name) or schema[field.name.rstrip("_")]
        if inner is not None and inner is not section:
            is_list = typing.get_origin(hints[field.name]) is list
            yield from _fields(launcher, inner, f"{name}.N." if is_list else f"{name}.")
            continue
        default = _shown(shown["default"]) if "default" in shown else ""
        meaning = " ".join(shown.get("description", "").split())
        yield FieldHelp(name.rstrip("_"), default, may_change(launcher, name.replace(".N", ".0")), meaning)


def _shown(value: Any) -> str:
    if value is None or value is ... or value == {} or value == []:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)
