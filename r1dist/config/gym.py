"""The tasks of reasoning-gym, and which configuration each takes. The package is imported once one is named."""

import dataclasses
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ..errors import UserError, did_you_mean
from .source import Source, sources_in

PATH = "reasoning_gym"
"""What `path` of such a source is."""
SPLITS = ("train", "test")
CHUNK = 500
"""Items of one seed: the package's own default of `size`."""
INSTEAD = {"seed": "`seed` of the source", "size": "`limit` of the source"}
"""Fields of configurations -> where that is said instead."""
REFUSED = {
    "coin_flip": "its scorer gives full marks to a part of the answer, such as 0",
    "composite": "name its tasks as several sources",
    "game_of_life_halting": "its scorer takes any text for True",
    "puzzle24": "its scorer takes any four numbers that give 24",
}
"""Tasks -> why they are not used: of scorers, what a policy would find out soon."""


def tasks() -> dict[str, tuple[type, type]]:
    """Task -> (dataset, configuration), its classes. Raises `UserError` where the package is not installed."""
    try:
        from reasoning_gym.factory import DATASETS  # two seconds, and matplotlib: only for those that ask for a task
    except ModuleNotFoundError as error:
        raise UserError(
            f"data.sources: rows of `{PATH}` need the package {error.name}, which is not installed in this "
            "environment.\n`pip install -e '.[gym]'` adds it."
        ) from error
    return DATASETS


def create(task: str, config: dict[str, Any], seed: int = 0) -> Any:
    """The task's `ProceduralDataset` of `CHUNK` items, which also scores answers.

    Raises `UserError` for a task or a field that there is not, and for values that the task refuses.
    """
    registered = tasks()
    if task in REFUSED:
        raise UserError(f"task `{task}` cannot be used: {REFUSED[task]}.")
    if task not in registered:
        raise UserError(f"`{task}` is not a task of reasoning-gym{_nearest(task, registered.keys() - REFUSED.keys())}")
    from reasoning_gym.factory import create_dataset

    config_class = registered[task][1]
    hints = typing.get_type_hints(config_class)
    known = {field.name for field in dataclasses.fields(config_class)} - INSTEAD.keys()
    values = {}
    for field, value in config.items():
        if field in INSTEAD:
            raise UserError(f"`config.{field}` is not set here; use {INSTEAD[field]}.")
        if field not in known:
            raise UserError(f"`config.{field}` is not a field of task `{task}`{_nearest(field, known)}")
        try:
            values[field] = TypeAdapter(hints[field]).validate_python(value)
        except ValidationError as error:
            raise UserError(f"`config.{field}`: {error.errors()[0]['msg']}; got {value!r}.") from error
    try:
        return create_dataset(task, **values, seed=seed, size=CHUNK)
    except (AssertionError, ValueError, TypeError) as error:
        raise UserError(f"`config`: task `{task}` refuses it: {error or 'without a reason'}; got {config}.") from error


def has_tasks(source: Source) -> bool:
    """Whether rows of `source` may be of a task."""
    return source.path == PATH or source.entry is not None


def check_tasks(run: Any, where: str) -> None:
    """Raises `UserError`, which names the file `where`, for a source in `run` whose task cannot be used."""
    for name, source in sources_in(run):
        if source.path != PATH:
            if source.task is not None or source.config is not None:
                raise UserError(f"{where}: `{name}`: `task` and `config` are of `path: {PATH}`, not of {source.path}.")
            if source.entry is not None:
                _check_entry(source, f"{where}: `{name}`")
            continue
        if source.entry is not None:
            raise UserError(f"{where}: `{name}`: `entry` is of files; rows of `path: {PATH}` have one already.")
        if source.task is None:
            raise UserError(f"{where}: `{name}`: `path: {PATH}` needs `task`, such as `chain_sum`.")
        if source.split not in SPLITS:
            raise UserError(f"{where}: `{name}`: {PATH} has no split `{source.split}`; it has {', '.join(SPLITS)}.")
        try:
            create(source.task, source.config or {})
        except UserError as error:
            raise UserError(f"{where}: `{name}`: {error}") from error


def _check_entry(source: Source, where: str) -> None:
    if Path(source.path).suffix != ".jsonl":  # no hub id, so that nobody else's code is run
        raise UserError(f"{where}: `entry` is of .jsonl files that launch/sample.py made, not of {source.path}.")
    tasks()


def _nearest(name: str, known: Iterable[str]) -> str:
    return f"{did_you_mean(name, known)}\nThere are {', '.join(sorted(known))}."
