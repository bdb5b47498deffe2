"""What TRL's fields may be, beyond their types.

TRL and transformers check some of it, and most of that only when the model is loaded or the first batch is made.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, PositiveInt

from .values import PathText, Seed, expanded

SHARDS = "shards as only DeepSpeed may here, by the configuration of `accelerate launch`"


def _steps(value: int) -> int:
    if value == 0 or value < -1:
        raise ValueError("it is -1 (then `num_train_epochs` counts) or at least 1")
    return value


# Fields whose None would fail later, or that are narrower than their annotation says.
TYPES: dict[str, Any] = {
    "max_steps": Annotated[int, AfterValidator(_steps)],
    "seed": Seed,
    "data_seed": Seed | None,
    "num_generations": Annotated[int, Field(ge=2)],
    "max_completion_length": PositiveInt,
    "pad_to_multiple_of": PositiveInt | Literal["auto"] | None,
    "save_strategy": Literal["no", "steps", "epoch"],
    "eval_strategy": Literal["no", "steps", "epoch"],
    "scale_rewards": Literal["group", "batch", "none"],
    "importance_sampling_level": Literal["token", "sequence"],
    "multi_objective_aggregation": Literal["sum_then_normalize", "normalize_then_sum"],
    "vllm_mode": Literal["server", "colocate"],
    "vllm_importance_sampling_mode": Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"],
    "log_level": Literal["passive", "detail", "debug", "info", "warning", "error", "critical"],
    "log_level_replica": Literal["passive", "detail", "debug", "info", "warning", "error", "critical"],
    "output_dir": PathText,
    "deepspeed": Annotated[dict | str | None, AfterValidator(expanded)],
}

_ABOVE_0 = (
    "num_train_epochs", "logging_steps", "save_steps", "ddp_timeout", "temperature", "repetition_penalty", "delta",
    "vllm_importance_sampling_clip_max", "vllm_server_timeout", "vllm_gpu_memory_utilization", "top_p",
)  # fmt: skip
_AT_LEAST_1 = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "save_total_limit",
    "torch_empty_cache_steps", "dataloader_prefetch_factor", "dataset_num_proc", "num_generations_eval",
    "generation_batch_size", "steps_per_generation", "num_iterations", "ref_model_sync_steps", "max_length",
    "num_completions_to_print", "vllm_server_port", "vllm_max_model_length", "vllm_tensor_parallel_size",
)  # fmt: skip
_AT_LEAST_0 = (
    "learning_rate", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "label_smoothing_factor", "neftune_noise_alpha", "dataloader_num_workers", "top_k", "min_p", "beta", "epsilon",
    "epsilon_high", "ref_model_mixup_alpha", "vllm_importance_sampling_clip_min", "center_rewards_coefficient",
    "router_aux_loss_coef",
)  # fmt: skip
_BELOW_1 = ("adam_beta1", "adam_beta2", "label_smoothing_factor")
_AT_MOST = {"top_p": 1, "min_p": 1, "ref_model_mixup_alpha": 1, "vllm_gpu_memory_utilization": 1} | {
    "vllm_server_port": 65535
}


def narrowed(name: str, annotation: Any) -> Any:
    """The type that a field is checked with: its own, or that of `TYPES`, within its bounds."""
    bounds = {
        "gt": 0 if name in _ABOVE_0 else None,
        "ge": 1 if name in _AT_LEAST_1 else 0 if name in _AT_LEAST_0 else None,
        "lt": 1 if name in _BELOW_1 else None,
        "le": _AT_MOST.get(name),
    }
    bounds = {key: bound for key, bound in bounds.items() if bound is not None}
    kind = TYPES.get(name, annotation)
    return Annotated[kind, Field(**bounds)] if bounds else kind  # type: ignore[call-overload]


# TRL's fields that one of ours replaces: set, they would be contradicted or ignored.
OURS_INSTEAD = {
    "chat_template_path": "`model.tokenizer`, a folder with that chat template,",
    "chat_template_kwargs": "`model.chat_template_kwargs`",
    "eos_token": "`data.template`: what ends a reply in the chat template ends it everywhere;",
    "assistant_only_loss": "`data.sources`: the loss falls on the last turn;",
    "model_init_kwargs": "`model.dtype` and `model.attn_implementation`",
    "reward_weights": "`rewards`",
    "vllm_model_impl": "`rollout.serve.arguments: [--model-impl, transformers]`",
    "vllm_group_port": "`rollout.transport`, which chooses free ports,",
    "vllm_structured_outputs_regex": "a reward for the form",
    "use_transformers_continuous_batching": "`rollout.engine`",
    "use_transformers_paged": "`rollout.engine`",
    "generation_kwargs": "`temperature`, `top_p`, `top_k`, `min_p` and `repetition_penalty`",
    "cache_implementation": "`rollout.engine`",
    "ds3_gather_for_generation": "`rollout.engine: vllm`, which gathers in buckets,",
    "resume_from_checkpoint": "`resume`",
    "remove_unused_columns": "`data.sources`",
    "do_eval": "`eval_strategy`",
    "do_predict": "launch/evaluate.py",
    "hub_token": "`hf auth login`, or the environment's HF_TOKEN: a run records its configuration,",
}

# Fields that break checkpoints or what the run's folder promises -> the values that are fine, and what they would do.
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "auto_find_batch_size": ((False,), "changes the batch during the run, and no checkpoint could be resumed"),
    "ignore_data_skip": ((False,), "would give a resumed run rows again that it had already"),
    "enable_jit_checkpoint": ((False,), "would save beside the checkpoint that a SIGTERM makes anyway"),
    "restore_callback_states_from_checkpoint": ((False,), "would end a resumed run at once, as it ended before"),
    "save_on_each_node": ((False,), "would have nodes that share the run's folder write the same files"),
    "accelerator_config": ((None,), "changes how rows are dealt out, on which a resume depends"),
    "batch_eval_metrics": ((False,), "scores batches, and an interval is of all rows"),
    "eval_do_concat_batches": ((True,), "keeps batches apart, and scores are of all rows"),
    "fsdp": ((None, ""), SHARDS),
    "fsdp_config": ((None, {}), SHARDS),
    "parallelism_config": ((None,), SHARDS),
}
# Of GRPO alone: our own sampler and loss do not have them.
UNSUPPORTED_IN_GRPO: dict[str, tuple[tuple[Any, ...], str]] = {
    "entropy_coef": ((0.0,), "is no part of the loss"),
    "use_adaptive_entropy": ((False,), "is no part of the loss"),
    "top_entropy_quantile": ((1.0,), "is no part of the loss"),
    "off_policy_mask_threshold": ((None,), "is no part of the loss"),
    "use_liger_kernel": ((False,), "has a loss of its own"),
    "label_smoothing_factor": ((0.0,), "is no part of the loss"),
    "neftune_noise_alpha": ((None,), "trains on other probabilities than the rollouts were drawn from"),
    "max_tool_calling_iterations": ((None,), "is about tools, which there are none of"),
    "data_seed": ((None,), "decides nothing; `seed` decides the order of prompts"),
    "train_sampling_strategy": (("random",), "decides nothing; prompts are shuffled, or not, by `shuffle_dataset`"),
}
