"""Benchmarks by name, and the protocols by which they are usually asked. The table is benchmarks.yaml."""

import functools
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass

from ..errors import did_you_mean
from .rewards import STRICT
from .source import Source

TABLE = Path(__file__).with_name("benchmarks.yaml")
PROTOCOLS: dict[str, dict[str, Any]] = {
    "greedy": {"modes": ["greedy"]},
    "r1": {"modes": ["sampled"], "sampling": {"temperature": 0.6, "top_p": 0.95, "max_tokens": 32768}},
}
"""Name -> the fields of an evaluation that it sets where the YAML is silent.

`r1` is the report's (arXiv 2501.12948, section 3): no system prompt, pass@1 as the mean over several samples.
"""


@dataclass(config=STRICT, kw_only=True)
class Benchmark:
    """Problems with a name. An entry of the table, or one of the user's own."""

    name: str = Field(pattern=r"^[\w-]+$")
    """What results call it."""
    sources: list[Source] = Field(min_length=1)
    """Where its problems come from."""
    samples: PositiveInt | None = None
    """Sampled completions of each problem. Unset: `sampling.samples` if that is set, else what the protocol says."""
    instruction: str | None = None
    """Words that follow each question, on a line of their own. Unset: the table's if there is a `protocol`."""


@functools.cache
def table() -> dict[str, dict]:
    """Name -> fields of `Benchmark`, and `usual_samples`, `usual_instruction`: what holds under a protocol."""
    return yaml.safe_load(TABLE.read_text(encoding="utf-8"))


def entries(value: Any) -> Any:
    """What `benchmarks` holds, with the table's entries in the place of their names.

    An entry is a name, or a section with `name` that adds to the table's: `path` puts a local copy in the place of
    the hub's, `limit` takes the first problems only. With `sources` it is the user's own. Raises `ValueError`.
    """
    return [_entry(item) for item in value] if isinstance(value, list) else value


def _is_benchmark(item: Any) -> bool:
    return isinstance(item, dict) and isinstance(item.get("sources"), list)


def _entry(item: Any) -> Any:
    given = {"name": str(item)} if isinstance(item, str) else item
    if not isinstance(given, dict) or "sources" in given or "name" not in given:
        return given
    name = str(given["name"])
    if name not in table():
        raise ValueError(
            f"`{name}` is not a benchmark{did_you_mean(name, table())} There are {', '.join(table())}; one of your "
            "own has `sources`"
        )
    usual = table()[name]["sources"]
    changed = {field: given[field] for field in ("path", "limit") if field in given}
    if "path" in changed and len(usual) > 1:
        raise ValueError(f"`{name}` has {len(usual)} sources; name your own as `sources` instead of `path`")
    dropped = ("subset", "split") if "path" in changed else ()
    sources = [{**{k: v for k, v in source.items() if k not in dropped}, **changed} for source in usual]
    return {**{k: v for k, v in given.items() if k not in changed}, "name": name, "sources": sources}


def sources_of(value: Any) -> Any:
    """What `data.decontaminate.against` holds, with the benchmarks' sources in the place of their names.

    Raises `ValueError`.
    """
    found = entries(value)
    if not isinstance(found, list):
        return found
    return [source for item in found for source in (item["sources"] if _is_benchmark(item) else [item])]


def settle(benchmarks: list[Benchmark], protocol: str | None, samples: int, explicit: bool) -> None:
    """Decide what entries leave open, in place: `samples`, and `instruction` under a protocol.

    `samples`: `sampling.samples`; `explicit`: whether the user has set it.
    """
    for benchmark in benchmarks:
        usual = table().get(benchmark.name, {})
        if benchmark.samples is None:
            benchmark.samples = usual.get("usual_samples", samples) if protocol == "r1" and not explicit else samples
        if benchmark.instruction is None and protocol is not None:
            benchmark.instruction = usual.get("usual_instruction")
