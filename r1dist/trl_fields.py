"""The fields of TRL's configuration classes, read from their source text instead of imported.

Importing `GRPOConfig` imports torch, which costs seconds before a misspelt key can be refused. Its fields are
plain annotated assignments, so the syntax tree of the installed package holds everything that is needed.
"""

import ast
import functools
import importlib.util
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, create_model

# Class -> (package, file inside it, base class). A contract test compares the result with the real dataclasses.
SOURCES = {
    "GRPOConfig": ("trl", "trainer/grpo_config.py", "_BaseConfig"),
    "SFTConfig": ("trl", "trainer/sft_config.py", "_BaseConfig"),
    "RewardConfig": ("trl", "trainer/reward_config.py", "_BaseConfig"),
    "_BaseConfig": ("trl", "trainer/base_config.py", "TrainingArguments"),
    "TrainingArguments": ("transformers", "training_args.py", None),
}
PLAIN_TYPES = {"int": int, "float": float, "bool": bool, "str": str, "dict": dict, "list": list, "Any": Any}


@functools.cache
def field_types(class_name: str) -> dict[str, tuple[Any, Any]]:
    """Field name -> (type to validate with, default), inherited ones included.

    A type that is not built of plain ones is `Any`; a default that is not a literal is `...` (unknown).
    """
    package, file, base = SOURCES[class_name]
    folder = Path(importlib.util.find_spec(package).submodule_search_locations[0])
    tree = ast.parse((folder / file).read_text())
    body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name).body
    fields = dict(field_types(base)) if base else {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            fields[node.target.id] = (_plain_type(node.annotation), _default(node.value))
    return fields


@functools.cache
def validator(class_name: str):
    """A pydantic model that takes any subset of the class's fields and checks their types."""
    optional = {name: (annotation, None) for name, (annotation, _) in field_types(class_name).items()}
    return create_model(class_name, __config__=ConfigDict(extra="forbid", protected_namespaces=()), **optional)


def _plain_type(annotation: ast.expr) -> Any:
    names = {n.id for n in ast.walk(annotation) if isinstance(n, ast.Name)}
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
