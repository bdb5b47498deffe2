"""Benchmarks as prompts that a model is asked."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from datasets import Dataset

from ..config import Data, Prompting, Source
from ..config.benchmarks import Benchmark
from ..data.prompts import prompt_dataset
from ..data.templates import Template
from ..errors import UserError
from ..rewards.golds import check_answers
from ..rewards.pool import Pool

UNSCORABLE = 0.5
"""Share of the problems without a readable answer: with more, a source is taken to be read wrongly."""


@dataclass(frozen=True)
class Problems:
    """Rows that are asked and scored together."""

    name: str
    rows: Dataset
    samples: int


class ProblemReader:
    """Makes prompts of sources, as they are asked with `template` and `prompting`.

    Args:
        name: `data.template` of the configuration.
        context: Tokens that the model holds.
        max_tokens: Of a completion.
    """

    def __init__(
        self, name: str, template: Template, prompting: Prompting, context: int, max_tokens: int, pool: Pool
    ):  # fmt: skip
        self.name, self.template, self.prompting = name, template, prompting
        self.context, self.max_tokens, self.pool = context, max_tokens, pool

    def read(self, sources: list[Source], field: str, instruction: str | None = None) -> Dataset:
        """Rows of `prompt_dataset`. `instruction` holds where `prompting` has none.

        Raises `UserError`, which names `field`, where most cannot be scored.
        """
        data = Data(sources=sources, template=self.name)
        prompting = replace(self.prompting, instruction=self.prompting.instruction or instruction)
        rows = prompt_dataset(data, self.template, self.context, self.max_tokens, prompting)
        if (share := check_answers(rows, self.pool, field)) > UNSCORABLE:
            raise UserError(f"{field}: {share:.0%} of the answers cannot be scored; set `answer` or `answer_format`.")
        return rows

    def benchmarks(self, benchmarks: Sequence[Benchmark], field: str) -> list[Problems]:
        """The problems of each; with one sample where `samples` is None. Raises `UserError` as `read`."""
        found = []
        for number, benchmark in enumerate(benchmarks):
            try:
                rows = self.read(benchmark.sources, f"{field}.{number}.sources", benchmark.instruction)
            except UserError as error:
                raise UserError(f"benchmark {benchmark.name}: {error}") from error
            found.append(Problems(benchmark.name, rows, benchmark.samples or 1))
        return found
