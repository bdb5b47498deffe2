"""YAML's plain scalars (those without quotes), kept as written until the type of their field says what they are.

PyYAML follows YAML 1.1, which reads `8:00:00` as 28800, `2026-09-13` as a date, `017` as 15 and `no` as false,
whatever the field. Here text fields get the characters themselves, other fields what YAML 1.2's core schema says.
"""

import re
import types
import typing
from collections.abc import Hashable, Iterator
from typing import Any, Literal

import yaml

from .tree import alternatives, child, section_of

NULL = ("", "~", "null", "Null", "NULL")
TRUE, FALSE = ("true", "True", "TRUE"), ("false", "False", "FALSE")
# The bound on the length is below that at which Python refuses to convert.
INTEGER = re.compile(r"[-+]?[0-9]{1,999}")
OTHER_BASE = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"([-+]?)\.(inf|Inf|INF|nan|NaN|NAN)")


class Plain(str):
    """A plain scalar, as written."""


class Loader(yaml.SafeLoader):
    """Mappings, lists, quoted text, and `Plain`. A key that stands twice in a mapping is an error."""

    def construct_document(self, node: yaml.Node) -> Any:
        self.deep_construct = True  # an alias inside of what it names is an error then
        return super().construct_document(node)

    def construct_yaml_str(self, node: yaml.ScalarNode) -> str:
        return Plain(node.value) if node.style is None else node.value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge"):
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise yaml.YAMLError(f"`{key.value}` stands in lines {lines[key.value]} and {line}; keep one")
                lines[key.value] = line
        return {str(key): value for key, value in super().construct_mapping(node, deep).items()}


Loader.yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # of merges alone
Loader.add_constructor("tag:yaml.org,2002:str", Loader.construct_yaml_str)


def load(text: str) -> Any:
    """The tree of a YAML text, with `Plain` scalars. Raises `yaml.YAMLError`."""
    return yaml.load(text, Loader)


def is_text(hint: Any) -> bool:
    """Whether a field of that type holds nothing but text."""
    kinds = set(alternatives(hint))
    return str in kinds and kinds <= {str, types.NoneType}


def _is_list(hint: Any) -> bool:
    kinds = list(alternatives(hint))
    return str not in kinds and any(typing.get_origin(kind) in (list, tuple) for kind in kinds)


def read_as(hint: Any, value: Any) -> Any:
    """`value` with its `Plain` scalars read as the type hint says. A section without fields (`rollout:`) is empty.

    Where a list is meant, a scalar is its entries with commas between them (`greedy,sampled`), unless these are texts,
    which may hold commas.
    """
    if isinstance(value, Plain):
        if value in NULL or not _is_list(hint) or is_text(child(hint, "0")):
            return _scalar(hint, value)
        value = [Plain(part.strip()) for part in value.split(",")]
    if isinstance(value, list):
        return [read_as(child(hint, str(index)), item) for index, item in enumerate(value)]
    if isinstance(value, dict):
        return dict(_entries(hint, value))
    return value


def _entries(hint: Any, tree: dict) -> Iterator[tuple[Any, Any]]:
    for key, value in tree.items():
        inner = child(hint, key)
        nothing = isinstance(value, Plain) and value in NULL
        if nothing and section_of(hint) is not None and section_of(inner) in alternatives(inner):
            yield key, None if types.NoneType in alternatives(inner) else {}
        else:
            yield key, read_as(inner, value)


def _scalar(hint: Any, text: Plain) -> Any:
    kinds = list(alternatives(hint))
    literals = {value for kind in kinds if typing.get_origin(kind) is Literal for value in typing.get_args(kind)}
    if text in literals:
        return str(text)
    if text in NULL:
        return None
    if text in TRUE + FALSE and (bool in kinds or Any in kinds):
        return text in TRUE
    if {int, float, Any} & {*kinds, *map(type, literals)} or section_of(hint) is not None:
        return _number(text)
    return str(text)


def _number(text: str) -> int | float | str:
    if INTEGER.fullmatch(text):
        return int(text)
    if OTHER_BASE.fullmatch(text):
        return int(text, 0)
    if FLOAT.fullmatch(text):
        return float(text)
    if match := NOT_FINITE.fullmatch(text):
        return float("".join(match.groups()))
    return str(text)
