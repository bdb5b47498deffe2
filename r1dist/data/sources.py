"""Rows from a hub id, a local folder, a file, or the tiny problem generator.

Whatever the source, a row leaves here with the same columns: `problem`, `answer` (for rewards), `messages`
(for SFT: the turns before the completion), `completion`, `system`, `source` and `kind`; a program's `tests` (JSON) and
`language`.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from ..config import Source
from ..errors import UserError
from ..tiny import talk, worked
from .formats import gold_answer, rewrite_stratos, turns

logger = logging.getLogger(__name__)

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
TINY_DEFAULT_ROWS = 4096
PROBLEM_COLUMNS = ("problem", "answer", "system", "source", "kind", "tests", "language")
PROBLEM_FEATURES = Features({name: Value("string") for name in PROBLEM_COLUMNS})
LISTED_FEATURES = Features({**PROBLEM_FEATURES, "answer": List(Value("string"))})
GENERATED: dict[str, Callable[[Source], list[dict]]] = {
    "tiny": lambda source: worked.rows(source.limit or TINY_DEFAULT_ROWS, source.seed, source.split),
    "tiny_talk": lambda source: talk.rows(source.seed, source.split, unsafe=False),
    "tiny_unsafe": lambda source: talk.rows(source.seed, source.split, unsafe=True),
    "tiny_pairs": lambda source: talk.pairs(source.seed, source.split),
    "tiny_judged": lambda source: talk.judged(source.seed, source.split),
}


def load_problems(sources: list[Source]) -> Dataset:
    """All rows with `problem`, `answer`, `system`, `source`, `kind`, `tests` and `language`.

    Rows without an answer are counted and left out; a source where they are the majority is refused. Where a
    source holds lists of equally right answers, `answer` is a list in all rows.
    """
    parts = [_problems(_with_columns(source)) for source in sources]
    if any(part.features["answer"] == List(Value("string")) for part in parts):
        parts = [part.map(_listed, features=LISTED_FEATURES, desc=None) for part in parts]
    return concatenate_datasets(parts)


def _listed(row: dict) -> dict:
    return {"answer": [row["answer"]] if isinstance(row["answer"], str) else row["answer"]}


def load_conversations(sources: list[Source]) -> Dataset:
    """All rows with `messages` (the turns before the completion), `completion`, `source` and `kind`."""
    return concatenate_datasets([_conversations(_with_columns(source)) for source in sources])


def load_pairs(sources: list[Source]) -> Dataset:
    """All rows with `problem`, `chosen` and `rejected`."""
    return _columns(sources, ("problem", "chosen", "rejected"))


def load_labels(sources: list[Source]) -> Dataset:
    """All rows with `problem`, `completion` and `label`, 1 or 0. Raises `UserError` for any other label."""
    rows = _columns(sources, ("problem", "completion", "label"))
    strange = set(rows["label"]) - {0, 1}
    if strange:
        raise UserError(f"sources: column `label` must hold 0 or 1; there is also {strange.pop()!r}.")
    return rows


def _columns(sources: list[Source], fields: tuple[str, ...]) -> Dataset:
    """Those columns of all sources, under their fields' names."""
    parts = []
    for source in map(_with_columns, sources):
        named = {field: getattr(source, field) for field in fields}
        raw = _read(source)
        _require(source, raw, named)
        columns = {field: [_last(value) for value in raw[column]] for field, column in named.items()}
        parts.append(Dataset.from_dict(columns))
    return concatenate_datasets(parts)


def _last(value: Any) -> Any:
    """Preference data often holds a whole conversation where its last turn is meant."""
    return turns(value)[-1]["content"] if isinstance(value, list) else value


def _with_columns(source: Source) -> Source:
    """The generated sources' columns need not be named: they are ours."""
    if source.path not in GENERATED:
        return source
    ours = ("problem", "answer", "completion", "chosen", "rejected", "label")
    return replace(source, **{name: name for name in ours})


def _problems(source: Source) -> Dataset:
    raw = _read(source)
    columns = {"problem": source.problem, "answer": source.answer}
    if source.answer is None and source.kind != "math":
        del columns["answer"]
    columns |= {field: named for field in ("tests", "language") if (named := getattr(source, field)) is not None}
    _require(source, raw, columns)
    listed = source.answer is not None and isinstance(raw.features[source.answer], List)

    def answer(row: dict) -> str | list[str] | None:
        if not listed:
            return gold_answer(row[source.answer], source.answer_format) if source.answer else None
        answers = [gold_answer(one, source.answer_format) for one in row[source.answer] or []]
        return [one for one in answers if one is not None] or None

    def convert(row: dict) -> dict:
        return {
            "problem": row[source.problem],
            "answer": answer(row),
            "system": row[source.system] if source.system else None,
            "source": source.path,
            "kind": source.kind,
            "tests": _as_json(row[source.tests]) if source.tests else None,
            "language": row[source.language] if source.language else None,
        }

    rows = raw.map(
        convert, remove_columns=raw.column_names, features=LISTED_FEATURES if listed else PROBLEM_FEATURES, desc=None
    )
    answered = rows.filter(lambda row: bool(row["problem"]) and (source.kind != "math" or row["answer"] is not None))
    missing = len(rows) - len(answered)
    if missing * 2 > len(rows):
        raise UserError(
            f"{source.path}: {missing} of {len(rows)} rows have no answer in column `{source.answer}` "
            f"read as `{source.answer_format}`. Set `answer_format` or `answer` of this source."
        )
    if missing:
        logger.warning("%s: left out %d of %d rows, which have no answer", source.path, missing, len(rows))
    return answered


def _as_json(tests: Any) -> str | None:
    return tests if tests is None or isinstance(tests, str) else json.dumps(tests)


def _conversations(source: Source) -> Dataset:
    raw = _read(source)
    if source.conversation is not None:
        _require(source, raw, {"conversation": source.conversation})
    else:
        _require(source, raw, {"problem": source.problem, "completion": source.completion})

    def convert(row: dict) -> dict:
        if source.conversation is not None:
            *messages, last = turns(row[source.conversation])
            completion = last["content"] if last["role"] == "assistant" else None
        else:
            messages = [{"role": "user", "content": row[source.problem]}]
            completion = row[source.completion]
        if source.system and row[source.system]:
            messages = [{"role": "system", "content": row[source.system]}, *messages]
        if completion and source.completion_format == "stratos":
            completion = rewrite_stratos(completion)
        return {"messages": messages, "completion": completion, "source": source.path, "kind": source.kind}

    rows = raw.map(convert, remove_columns=raw.column_names, desc=None)
    complete = rows.filter(lambda row: bool(row["messages"]) and bool(row["completion"]))
    missing = len(rows) - len(complete)
    if missing * 2 > len(rows):
        raise UserError(
            f"{source.path}: {missing} of {len(rows)} rows have no completion by an assistant. "
            "Set `conversation`, or `problem` and `completion`, of this source."
        )
    if missing:
        logger.warning("%s: left out %d of %d rows, which have no completion", source.path, missing, len(rows))
    return complete


def _read(source: Source) -> Dataset:
    if source.path in GENERATED:
        return Dataset.from_list(GENERATED[source.path](source)[: source.limit])
    path = Path(source.path)
    if path.suffix in READERS:
        if not path.is_file():
            raise UserError(f"data.sources: there is no file {path}.")
        raw = _from_file(path)
    elif path.is_dir():
        raw = load_dataset(str(path), name=source.subset, split=source.split)
    else:
        raw = _from_hub(source)
    if len(raw) == 0:
        raise UserError(f"data.sources: {source.path} holds no rows.")
    return raw.select(range(min(source.limit, len(raw)))) if source.limit else raw


def _from_file(path: Path) -> Dataset:
    if path.stat().st_size == 0:
        raise UserError(f"data.sources: {path} holds no rows.")
    try:
        return load_dataset(READERS[path.suffix], data_files=str(path), split="train")
    except DatasetGenerationError as error:
        cause = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"data.sources: {path} is no readable {path.suffix[1:]} file: {cause}") from error


def _from_hub(source: Source) -> Dataset:
    try:
        return load_dataset(source.path, name=source.subset, split=source.split)
    except (ConnectionError, OfflineModeIsEnabled, DatasetNotFoundError, HfHubHTTPError) as error:
        raise UserError(
            f"data.sources: {source.path} is no local file or folder, and the hub does not give it "
            f"({type(error).__name__}).\nCheck the name and the network, or set `path` to a local copy."
        ) from error


def _require(source: Source, raw: Dataset, columns: dict[str, str | None]) -> None:
    there = ", ".join(raw.column_names)
    for field, column in columns.items():
        if column is None:
            raise UserError(f"data.sources: {source.path} needs `{field}`; its columns are {there}.")
        if column not in raw.column_names:
            raise UserError(f"data.sources: {source.path} has no column `{column}` (`{field}`); it has {there}.")
