"""Which rows a run has, and how they become prompts."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from .benchmarks import Benchmark, entries, sources_of
from .resumable import MayChange
from .rewards import STRICT
from .source import Source
from .values import TemplateName

SHORTEST = 3
"""Least words that say that one problem is in another."""


@dataclass(config=STRICT, kw_only=True)
class Decontaminate:
    """Rows that share words with a test problem are dropped."""

    against: Annotated[list[Source], BeforeValidator(sources_of), Field(min_length=1)]
    """Where the test problems come from: names of benchmarks, as in the `benchmarks` of an evaluation, and sources, of
    whose columns only `problem` is needed."""
    ngram: int = Field(default=13, ge=SHORTEST)
    """Words in a row that a question may not share with a test problem; a test problem with fewer may not be in it as
    a whole."""


@dataclass(config=STRICT, kw_only=True)
class Data:
    """Sources, in order, and how a question becomes a prompt."""

    sources: list[Source] = Field(min_length=1)
    """Where the rows come from."""
    template: TemplateName = "chat"
    """`chat`: the tokenizer's chat template. `r1_zero`: the report's plain-text template for base models.
    `r1_zero_chat`: the chat template with the report's instruction as the system prompt."""
    stopping_strategy: Literal["first_exhausted", "all_exhausted"] | None = None
    """With weights, where the mixture ends, as in `datasets.interleave_datasets`. `first_exhausted`, the default: with
    the first source that has no further row; what others have left is not used. `all_exhausted`: once every row was
    used; sources that are at their end begin again."""
    decontaminate: Decontaminate | None = None
    """Drop the rows that share words with test problems."""
    eval: MayChange[Annotated[list[Benchmark], BeforeValidator(entries)]] = Field(default_factory=list)
    """What the policy is measured on during training, with `eval_strategy`: as `benchmarks` of an evaluation. Without
    `samples` each problem is answered once, greedily."""
