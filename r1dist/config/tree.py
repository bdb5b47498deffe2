"""A configuration as one level of dotted names, and what is not the same in two of them."""

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo

from .resumable import MAY_CHANGE
from .rewards import OF_SERVER
from .trl_fields import MAY_CHANGE as TRL_MAY_CHANGE
from .trl_fields import TRL_CLASS, validated_types


def flat(tree: dict | list) -> dict[str, Any]:
    """Dotted name -> value; a number between the dots counts into a list. Empty lists and sections are values."""
    return dict(_fields(tree, ""))


def parts_of(name: str) -> list[str]:
    """The parts of a dotted name. A reward's key is one, whatever dots it has (`rewards.own.py:function.weight`)."""
    found = re.fullmatch(r"(rewards)\.([^:]+:\w+)(?:\.(.+))?", name)
    if found is None:
        return name.split(".")
    section, key, field = found.groups()
    return [section, key, *(field.split(".") if field else [])]


def differences(old: dict[str, Any], new: dict[str, Any], run_class: type | None = None) -> list[str]:
    """Names of the fields that are not the same in both.

    With `run_class`, fields that `old` lacks had their defaults there: a later version of that class has added them.
    """
    before = {name: old.get(name) for name in old.keys() | new.keys()}
    if run_class is not None:
        before |= {name: _unset(run_class, name, old) for name in new.keys() - old.keys()}
    return sorted(name for name, value in before.items() if value != new.get(name))


def changed_on_resume(run_class: type, before: dict, now: dict) -> dict[str, tuple[Any, Any]]:
    """Dotted name -> (before, now) of the fields that differ in two configurations and may not."""
    old, new = flat(before), flat(now)
    names = [name for name in differences(old, new, run_class) if not may_change(run_class, name)]
    return {name: (old.get(name), new.get(name)) for name in names}


def alternatives(hint: Any) -> Iterator[Any]:
    """The types that a type hint allows, without annotations: those of a union, or the one itself."""
    if typing.get_origin(hint) is typing.Annotated:
        yield from alternatives(typing.get_args(hint)[0])
    elif typing.get_origin(hint) in (types.UnionType, typing.Union):
        for member in typing.get_args(hint):
            yield from alternatives(member)
    else:
        yield hint


def section_of(hint: Any) -> type | None:
    """The dataclass in a type hint: itself, or that of its list or of its optional value."""
    for kind in alternatives(hint):
        if typing.get_origin(kind) is list:
            kind = section_of(typing.get_args(kind)[0])
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            return kind
    return None


def child(hint: Any, key: str) -> Any:
    """The type hint of the entry `key` of a section, dictionary or list; `Any` where none says."""
    for kind in alternatives(hint):
        arguments = typing.get_args(kind)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            fields = hints_of(kind)
            return fields.get(key, fields.get(f"{key}_", Any))  # `from`, a keyword, is `from_`
        if typing.get_origin(kind) is dict and arguments:
            return arguments[1]
        if typing.get_origin(kind) in (list, tuple):
            return arguments[0]
    return Any


@functools.cache
def hints_of(section: type) -> dict[str, Any]:
    """Field name -> type hint, of all fields: a training run's include TRL's."""
    trl = validated_types(TRL_CLASS[section.__name__]) if section.__name__ in TRL_CLASS else {}
    return {**trl, **typing.get_type_hints(section, include_extras=True)}


def may_change(run_class: type, name: str) -> bool:
    """Whether the field of that dotted name may differ on resume; see `resumable`."""
    first, *rest = parts_of(name)
    if first not in typing.get_type_hints(run_class):
        return first in TRL_MAY_CHANGE
    if first == "rewards" and len(rest) == 2 and ":" not in rest[0] and rest[1] in OF_SERVER:
        return True
    hint: Any = run_class
    for part in (first, *rest):
        hint = child(hint, part)
        if MAY_CHANGE in getattr(hint, "__metadata__", ()):
            return True
    return False


def _unset(run_class: type, name: str, tree: dict[str, Any]) -> Any:
    """The default of the field `name`, or of the section or list that holds it, whichever `tree` begins to lack.

    None where that is an entry of a list, or of a section that `tree` sets as a whole.
    """
    hint, parts = run_class, parts_of(name)
    for place, part in enumerate(parts):
        path = ".".join(parts[: place + 1])
        if path in tree:
            return None
        if any(known.startswith(f"{path}.") for known in tree):
            hint = child(hint, part)
            continue
        section = None if part.isdigit() else section_of(hint)
        field = next((f for f in dataclasses.fields(section) if f.name == part), None) if section else None
        if field is None:
            return None
        given = field if field.default is dataclasses.MISSING else field.default
        default = FieldInfo.from_annotated_attribute(Any, given).get_default(call_default_factory=True)
        if dataclasses.is_dataclass(default) and not isinstance(default, type):
            default = dataclasses.asdict(default)
        return flat({part: default}).get(".".join(parts[place:]))
    return None


def _fields(tree: dict | list, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        name = f"{prefix}{key}"
        if isinstance(value, dict | list) and value:
            yield from _fields(value, f"{name}.")
        else:
            yield name, value
