"""A configuration as one level of dotted names, and what is not the same in two of them."""

from collections.abc import Iterator
from typing import Any


def flat(tree: dict | list) -> dict[str, Any]:
    """Dotted name -> value; a number between the dots counts into a list. Empty lists and sections are values."""
    return dict(_fields(tree, ""))


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Names of the fields that are not the same in both."""
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def _fields(tree: dict | list, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        name = f"{prefix}{key}"
        if isinstance(value, dict | list) and value:
            yield from _fields(value, f"{name}.")
        else:
            yield name, value
