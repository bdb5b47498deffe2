"""The fields of TRL's configuration classes, read from their source text instead of imported.

Importing `GRPOConfig` imports torch, which costs seconds before a misspelt key can be refused. Its fields are
plain annotated assignments, so the syntax tree of the installed package holds everything that is needed.
"""

import ast
import functools
import importlib.util
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, create_model

from .trl_limits import narrowed

# Class -> (package, file inside it, base class). A contract test compares the result with the real dataclasses.
SOURCES = {
    "GRPOConfig": ("trl", "trainer/grpo_config.py", "_BaseConfig"),
    "SFTConfig": ("trl", "trainer/sft_config.py", "_BaseConfig"),
    "RewardConfig": ("trl", "trainer/reward_config.py", "_BaseConfig"),
    "_BaseConfig": ("trl", "trainer/base_config.py", "TrainingArguments"),
    "TrainingArguments": ("transformers", "training_args.py", None),
}
TRL_CLASS = {"GRPORun": "GRPOConfig", "SFTRun": "SFTConfig", "RewardModelRun": "RewardConfig"}
"""Our configuration's class -> the TRL class of its top-level fields."""
MAY_CHANGE = frozenset(
    (
        "dataloader_num_workers",
        "eval_on_start",
        "eval_steps",
        "eval_strategy",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "hub_always_push",
        "hub_model_id",
        "hub_private_repo",
        "hub_revision",
        "hub_strategy",
        "log_completions",
        "logging_steps",
        "max_steps",
        "num_completions_to_print",
        "num_train_epochs",
        "output_dir",
        "per_device_train_batch_size",
        "project",
        "push_to_hub",
        "report_to",
        "run_name",
        "save_steps",
        "save_strategy",
        "save_total_limit",
        "steps_per_generation",
        "torch_empty_cache_steps",
        "trackio_bucket_id",
        "trackio_space_id",
        "trackio_static_space_id",
    )
)
"""TRL's fields that a run may be resumed with other values of. Those of the batch may if its rows stay the same."""
# The enumerations of transformers that its fields are annotated with -> the file that holds them.
ENUMERATIONS = {
    "SchedulerType": "trainer_utils.py",
    "IntervalStrategy": "trainer_utils.py",
    "SaveStrategy": "trainer_utils.py",
    "HubStrategy": "trainer_utils.py",
    "OptimizerNames": "training_args.py",
}
TRL_DEFAULTS = {"logging_steps": 1, "report_to": "none", "save_total_limit": 2}
"""What this project sets where the YAML is silent."""
GRPO_DEFAULTS = {"vllm_importance_sampling_mode": "token_truncate"}
"""The same, of RL. TRL's own default masks whole sequences, the longer the likelier."""
PLAIN_TYPES = {"int": int, "float": float, "bool": bool, "str": str, "dict": dict, "list": list, "Any": Any}


@functools.cache
def field_types(class_name: str) -> dict[str, tuple[Any, Any]]:
    """Field name -> (type to validate with, default), inherited ones included.

    A type that is not built of plain ones is `Any`; a default that is not a literal is `...` (unknown).
    """
    package, file, base = SOURCES[class_name]
    fields = dict(field_types(base)) if base else {}
    for node in _class_body(package, file, class_name):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            kind = _choices(node.value) or _plain_type(node.annotation)
            fields[node.target.id] = (kind, _default(node.value))
    return fields


@functools.cache
def validated_types(class_name: str) -> dict[str, Any]:
    """Field name -> the type that it is checked with: `field_types`, within the limits of `trl_limits`."""
    return {name: narrowed(name, annotation) for name, (annotation, _) in field_types(class_name).items()}


@functools.cache
def validator(class_name: str):
    """A pydantic model that takes any subset of the class's fields and checks their types and limits."""
    optional: dict[str, Any] = {name: (annotation, None) for name, annotation in validated_types(class_name).items()}
    config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)
    return create_model(class_name, __config__=config, **optional)


@functools.cache
def _module(package: str, file: str) -> ast.Module:
    folder = Path(importlib.util.find_spec(package).submodule_search_locations[0])
    return ast.parse((folder / file).read_text())


def module_body(package: str, file: str) -> list[ast.stmt]:
    """The statements of a module of an installed package, which is not imported."""
    return _module(package, file).body


def _class_body(package: str, file: str, name: str) -> list[ast.stmt]:
    return next(n for n in module_body(package, file) if isinstance(n, ast.ClassDef) and n.name == name).body


def _choices(value: ast.expr | None) -> Any:
    """The choices that the field's metadata name in full, as a `Literal`, else None."""
    keywords = value.keywords if isinstance(value, ast.Call) else []
    metadata = next((k.value for k in keywords if k.arg == "metadata" and isinstance(k.value, ast.Dict)), None)
    for key, choices in zip(metadata.keys, metadata.values, strict=True) if metadata is not None else ():
        if isinstance(key, ast.Constant) and key.value == "choices" and isinstance(choices, ast.List):
            named: Any = Literal[tuple(ast.literal_eval(choices))]
            return named | None if _default(value) is None else named
    return None


def _plain_type(annotation: ast.expr) -> Any:
    names = {n.id for n in ast.walk(annotation) if isinstance(n, ast.Name)}
    for name in names & ENUMERATIONS.keys():
        members = [n.value for n in _class_body("transformers", ENUMERATIONS[name], name) if isinstance(n, ast.Assign)]
        return Literal[tuple(ast.literal_eval(member) for member in members)]
    if not names <= PLAIN_TYPES.keys() or any(isinstance(n, ast.Attribute) for n in ast.walk(annotation)):
        return Any
    return eval(ast.unparse(annotation), {"__builtins__": {}}, PLAIN_TYPES)


def _default(value: ast.expr | None) -> Any:
    if isinstance(value, ast.Call):
        value = next((k.value for k in value.keywords if k.arg == "default"), None)
    try:
        return ast.literal_eval(value)
    except (ValueError, TypeError):
        return ...


def trl_value(run: Any, name: str) -> Any:
    """A TRL field as the run has it: from its YAML, else TRL's own default."""
    return run.trl[name] if name in run.trl else field_types(TRL_CLASS[type(run).__name__])[name][1]


def micro_steps_per_generation(run: Any, processes: int | None) -> int | None:
    """Micro-steps that a generation lasts, as TRL derives them (`GRPOConfig`).

    None where `generation_batch_size` is set and the number of processes is not known.
    """
    rollouts = trl_value(run, "generation_batch_size")
    if rollouts is None:
        return trl_value(run, "steps_per_generation") or trl_value(run, "gradient_accumulation_steps")
    return None if processes is None else rollouts // (trl_value(run, "per_device_train_batch_size") * processes)
