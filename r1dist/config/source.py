"""Where rows come from."""

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass

from .resumable import MayChange
from .rewards import STRICT
from .values import PathText, Seed


@dataclass(config=STRICT, kw_only=True)
class Source:
    """One place that rows come from, and the names of its columns; a dot leads to an inner one (`reward.answer`)."""

    path: PathText
    """A hub id, a local folder (data files, or what `save_to_disk` left), a `.jsonl`, `.json` or `.parquet` file, or
    one of the generated sources: `tiny`
    (problems), `tiny_talk`, `tiny_unsafe` (requests), `tiny_pairs`, `tiny_judged` (for reward models),
    `reasoning_gym` (one of its tasks)."""
    task: str | None = None
    """`reasoning_gym`: the name of the task (`chain_sum`)."""
    config: dict[str, Any] | None = None
    """`reasoning_gym`: fields of the task's own configuration, such as `{max_terms: 3}`. Unset: its defaults."""
    subset: str | None = None
    """The configuration of a hub dataset (GSM8K's `main`)."""
    split: str = "train"
    """The split of a hub dataset or folder; of generated sources, `train` or `test`. A file has none."""
    problem: str | Annotated[list[str], Field(min_length=1)] | None = None
    """Column with the question, as text or as a list of turns that ends with it; or columns of text (`[Body,
    Question]`), joined with a line break."""
    answer: str | None = None
    """Column with the gold answer, in the form that `answer_format` names. Rows of another kind than `math` may
    go without."""
    answer_format: Literal["plain", "hashes", "boxed"] = "plain"
    """`plain`: the column is the answer. `hashes`: it follows `####` (GSM8K). `boxed`: the last `\\boxed{}`."""
    choices: str | Annotated[list[str], Field(min_length=2)] | None = None
    """Column with a list of choices, or a column for each. They follow the question as `A. ...`, in an order of
    their own for each row, drawn by `seed`; `answer` is then the text of the right one, its letter or its place (from
    0), and the gold answer its letter in that order."""
    conversation: str | None = None
    """Column with a list of turns, `role`/`content` or `from`/`value`; the last turn is the completion."""
    completion: str | None = None
    """Column with the completion, as text or as turns (SFT), if there is no `conversation`."""
    completion_format: Literal["plain", "hashes", "stratos"] = "plain"
    """`hashes`: a worked solution with `####` before its answer (GSM8K) becomes `<think>` and `<answer>`. `stratos`:
    Bespoke-Stratos' thought and solution marks do."""
    chosen: str | None = None
    """Column with the better reply (pairwise reward models)."""
    rejected: str | None = None
    """Column with the worse reply."""
    label: str | None = None
    """Column with 1 for a good response and 0 for a bad one (pointwise reward models), which `completion` holds."""
    tests: str | None = None
    """Column with a program's tests (reward `code`), a list or its JSON: `{stdin, stdout}` or `{call, returns}`."""
    tests_format: Literal["plain", "humaneval", "livecodebench"] = "plain"
    """`humaneval`, `livecodebench`: the columns of these benchmarks. `humaneval` is for evaluation only: its tests run
    beside the program, which could learn to pass them otherwise."""
    language: str | None = None
    """Column with the language of the program, `python` or `cpp`."""
    entry: str | None = None
    """Column with the task's own item, in a file that `launch/sample.py` made of `reasoning_gym`'s prompts. Scorers
    may run a part of it as code: never name a column of a file from elsewhere."""
    columns: list[str] = Field(default_factory=list)
    """Further columns that the rows keep, for a reward function of your own (RL). Dates become text."""
    system: str | None = None
    """Column with a system prompt. Ignored for the templates that bring their own."""
    kind: str = "math"
    """What the row is about; rewards may look at it."""
    weight: float | None = Field(default=None, gt=0)
    """Share of the mixture, relative to the other sources' weights; all of a list have one or none has. Unset: one
    source after another, with all of its rows."""
    limit: PositiveInt | None = None
    """Take only the first rows. For `tiny` and `reasoning_gym`, the number of problems to generate."""
    stream: MayChange[bool] = False
    """Read no more than the first `limit` rows, instead of all of a hub dataset, folder or file."""
    seed: Seed = 0
    """Seed of generated rows."""


def sources_in(section: Any, name: str = "") -> Iterator[tuple[str, Source]]:
    """(dotted name, source) of each source in a section."""
    if isinstance(section, Source):
        yield name, section
    elif dataclasses.is_dataclass(section):
        for field in dataclasses.fields(section):
            yield from sources_in(getattr(section, field.name), f"{name}.{field.name}".lstrip("."))
    elif isinstance(section, list):
        for index, item in enumerate(section):
            yield from sources_in(item, f"{name}.{index}")
