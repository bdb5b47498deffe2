"""Rows of sources, in one shape whatever the source.

A row leaves here with the same columns: `problem`, `answer` (for rewards), `earlier` (the exchanges before the
problem), `messages` (for SFT: the turns before the completion), `completion`, `system`, `source` and `kind`; a
program's `tests` (JSON) and `language`; a task's `entry` (`gym.rows`); `columns`, further ones (JSON). Rows that
cannot be used are counted and left out.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from datasets import Dataset, Features, List, Value, concatenate_datasets

from ..config import Source
from ..config.gym import PATH as GYM
from ..errors import UserError
from .choices import CHOICES, choice_question, right_choice
from .formats import UnusableRow, as_text, as_turns, gold_answer, question, rewrite_hashes, rewrite_stratos, turns
from .gym import checked_entry
from .mapping import mapped
from .mixture import combined
from .programs import FURTHER_COLUMNS, program_tests
from .reading import GENERATED, holds_lists, read, require_columns, value_of

logger = logging.getLogger(__name__)

TEXT = Value("string")
ABOUT = {"source": TEXT, "kind": TEXT}
PROBLEM = {
    "problem": TEXT, "earlier": List({"question": TEXT, "reply": TEXT}), "answer": TEXT, "system": TEXT,
    "tests": TEXT, "language": TEXT, "entry": TEXT, "columns": TEXT, **ABOUT,
}  # fmt: skip
TAKEN = {*PROBLEM, "prompt", "prompt_id", "prompt_ids", "prompt_length", "tokens", "group_tokens", "completion_ids"}
"""Columns of the rows that rewards are given."""
LISTED = {**PROBLEM, "answer": List(TEXT)}
CONVERSATION = {"messages": List({"role": TEXT, "content": TEXT}), "completion": TEXT, **ABOUT}
PAIR = {"problem": TEXT, "chosen": TEXT, "rejected": TEXT}
LABELLED = {"problem": TEXT, "completion": TEXT, "label": Value("int64")}
REWRITE = {"hashes": rewrite_hashes, "stratos": rewrite_stratos}
"""`completion_format` -> the completion in its tags, or None."""
REASONS = 5
"""At most so many are named of why rows were left out."""


def load_problems(
    sources: list[Source],
    seed: int = 0,
    stopping_strategy: str | None = None,
    clean: Callable[[list[Dataset]], list[Dataset]] | None = None,
) -> Dataset:
    """All rows with the columns of `PROBLEM`.

    Rows without an answer are counted and left out; a source where they are the majority is refused. Where a
    source holds lists of equally right answers, `answer` is a list in all rows. With weights, `combined` takes `seed`
    and `stopping_strategy`. `clean` is given the rows of each source, and drops some, before they are combined.
    """
    parts = [_problems(_with_columns(source)) for source in sources]
    if any(part.features["answer"] == List(TEXT) for part in parts):
        parts = [mapped(part, _listed, features=Features(LISTED)) for part in parts]
    return combined(sources, clean(parts) if clean else parts, seed, stopping_strategy)


def _listed(row: dict) -> dict:
    return {"answer": [row["answer"]] if isinstance(row["answer"], str) else row["answer"]}


def load_conversations(
    sources: list[Source],
    seed: int = 0,
    stopping_strategy: str | None = None,
    clean: Callable[[list[Dataset]], list[Dataset]] | None = None,
) -> Dataset:
    """All rows with `messages` (the turns before the completion), `completion`, `source` and `kind`.

    `seed`, `stopping_strategy` and `clean` as in `load_problems`.
    """
    parts = [_conversations(_with_columns(source)) for source in sources]
    return combined(sources, clean(parts) if clean else parts, seed, stopping_strategy)


def load_questions(source: Source) -> list[str]:
    """The problems of a source, of which no other column is needed."""
    source = _with_columns(source)
    raw = read(source)
    require_columns(source, raw, {"problem": source.problem})
    rows = _usable(
        source, raw, lambda row: {"problem": _asked(source, row)[-1]}, {"problem": TEXT}, "Set its `problem`."
    )
    return list(rows["problem"])


def load_pairs(sources: list[Source]) -> Dataset:
    """All rows with `problem`, `chosen` and `rejected`."""

    def convert(source: Source, row: dict) -> dict:
        chosen = _reply(value_of(row, source.chosen), "chosen")
        if not chosen:
            raise UnusableRow("no `chosen`")
        rejected = _reply(value_of(row, source.rejected), "rejected")
        return {"problem": _asked(source, row)[-1], "chosen": chosen, "rejected": rejected}

    return _for_reward_models(sources, convert, PAIR)


def load_labels(sources: list[Source]) -> Dataset:
    """All rows with `problem`, `completion` and `label`, 1 or 0. Raises `UserError` for any other label."""

    def convert(source: Source, row: dict) -> dict:
        label = value_of(row, source.label)
        if label is None:
            raise UnusableRow("no `label`")
        if label not in (0, 1):
            raise UserError(f"sources: column `{source.label}` must hold 0 or 1; there is also {label!r}.")
        completion = _reply(value_of(row, source.completion), "completion")
        return {"problem": _asked(source, row)[-1], "completion": completion, "label": int(label)}

    return _for_reward_models(sources, convert, LABELLED)


def _for_reward_models(
    sources: list[Source], convert: Callable[[Source, dict], dict], features: dict[str, Any]
) -> Dataset:
    parts = []
    for source in map(_with_columns, sources):
        raw = read(source)
        require_columns(source, raw, {field: getattr(source, field) for field in features})
        mend = "Set " + ", ".join(f"`{field}`" for field in features) + " of this source."
        parts.append(_usable(source, raw, lambda row, source=source: convert(source, row), features, mend))
    return concatenate_datasets(parts)


def _reply(value: Any, field: str) -> str:
    """A reply's text. Preference data often holds a whole conversation where its last turn is meant."""
    if isinstance(value, list):
        last = turns(value)[-1]
        if last["role"] != "assistant":
            raise UnusableRow(f"a `{field}` that does not end with the assistant's turn")
        return last["content"]
    text = as_text(value)
    if text is None:
        raise UnusableRow(f"no `{field}`")
    return text


def _with_columns(source: Source) -> Source:
    """The generated sources' columns need not be named: they are ours."""
    if source.path not in GENERATED:
        return source
    ours = ["problem", "answer", "completion", "chosen", "rejected", "label"]
    ours += ["entry"] if source.path == GYM else []
    return replace(source, **{name: name for name in ours})


def _asked(source: Source, row: dict) -> tuple[str | None, list[dict], str]:
    """(system prompt, earlier exchanges, problem) of a row."""
    named = [source.problem] if isinstance(source.problem, str) else source.problem or []
    values = [value_of(row, column) for column in named]
    given = as_text(value_of(row, source.system)) if source.system else None
    if len(values) == 1 and isinstance(values[0], list):
        system, earlier, problem = question(turns(values[0]))
        return given or system, earlier, problem
    problem = "\n".join(text for text in map(as_text, values) if text and not text.isspace())
    if not problem:
        raise UnusableRow("no `problem`")
    return given, [], problem


def _problems(source: Source) -> Dataset:
    raw = read(source)
    columns = {"problem": source.problem, "answer": source.answer}
    if source.answer is None and source.kind != "math":
        del columns["answer"]
    further = ("tests", "language", "system", "choices", "entry")
    columns |= {field: named for field in further if (named := getattr(source, field)) is not None}
    if source.tests is not None and source.tests_format in FURTHER_COLUMNS:
        columns["tests_format"] = FURTHER_COLUMNS[source.tests_format]
    columns |= {"columns": source.columns} if source.columns else {}
    kept_as = {column.rpartition(".")[2]: column for column in source.columns}
    if taken := TAKEN & kept_as.keys():
        raise UserError(f"data.sources: `columns`: rows have a `{taken.pop()}` already; rename that of {source.path}.")
    require_columns(source, raw, columns)
    listed = source.answer is not None and holds_lists(raw, source.answer)

    def answer(row: dict) -> str | list[str] | None:
        value = value_of(row, source.answer) if source.answer else None
        if not listed:
            return gold_answer(value, source.answer_format)
        values = value if isinstance(value, list) else [value]
        return [found for one in values if (found := gold_answer(one, source.answer_format)) is not None] or None

    def convert(row: dict) -> dict:
        system, earlier, problem = _asked(source, row)
        gold = answer(row)
        if source.choices is not None:
            problem, gold = _with_choices(source, row, problem)
        entry = value_of(row, source.entry) if source.entry else None
        entry = entry if source.path == GYM else checked_entry(entry)
        if gold is None and source.kind == "math" and entry is None:
            raise UnusableRow(f"no answer in column `{source.answer}` read as `{source.answer_format}`")
        tests = program_tests(value_of(row, source.tests), source.tests_format, row) if source.tests else None
        return {
            "problem": problem,
            "earlier": earlier,
            "answer": gold,
            "system": system,
            "tests": tests if tests is None or isinstance(tests, str) else json.dumps(tests),
            "language": as_text(value_of(row, source.language)) if source.language else None,
            "entry": entry,
            "columns": json.dumps({name: value_of(row, column) for name, column in kept_as.items()}, default=str),
            "source": source.path,
            "kind": source.kind,
        }

    mend = "Set `problem`, `answer` or `answer_format` of this source."
    return _usable(source, raw, convert, LISTED if listed else PROBLEM, mend)


def _with_choices(source: Source, row: dict, problem: str) -> tuple[str, str]:
    """The question with its choices in the row's own order, and the letter of the right one."""
    columns = [source.choices] if isinstance(source.choices, str) else source.choices
    values = [value_of(row, column) for column in columns]
    listed = values[0] if isinstance(values[0], list) else values
    texts = [text.strip() for text in map(as_text, listed) if text is not None]
    if len(texts) < len(listed) or not 2 <= len(texts) <= len(CHOICES):
        raise UnusableRow(f"no 2 to {len(CHOICES)} `choices`")
    right = right_choice(texts, value_of(row, source.answer) if source.answer else None)
    if right is None:
        raise UnusableRow("an `answer` that names none of its `choices`")
    return choice_question(problem, texts, right, source.seed)


def _conversations(source: Source) -> Dataset:
    raw = read(source)
    columns: dict[str, Any] = {"system": source.system} if source.system else {}
    if source.conversation is not None:
        columns |= {"conversation": source.conversation}
    else:
        columns |= {"problem": source.problem, "completion": source.completion}
    require_columns(source, raw, columns)

    def convert(row: dict) -> dict:
        system = as_text(value_of(row, source.system)) if source.system else None
        *messages, last = _turns(source, row)
        if last["role"] != "assistant":
            raise UnusableRow("no reply of the assistant at the end")
        if not any(turn["role"] == "user" for turn in messages):
            raise UnusableRow("no turn of the user before the completion")
        if system:  # rather than the conversation's own
            own = messages[0]["role"] == "system"
            messages = [{"role": "system", "content": system}, *messages[own:]]
        completion = last["content"]
        if source.completion_format in REWRITE:
            completion = REWRITE[source.completion_format](completion)
            if completion is None:
                raise UnusableRow(f"no marks of `{source.completion_format}` in the completion")
        return {"messages": messages, "completion": completion, "source": source.path, "kind": source.kind}

    mend = "Set `conversation`, or `problem` and `completion`, of this source."
    return _usable(source, raw, convert, CONVERSATION, mend)


def _turns(source: Source, row: dict) -> list[dict]:
    """A row's conversation, the completion included."""
    if source.conversation is not None:
        return turns(value_of(row, source.conversation))
    system, earlier, problem = _asked(replace(source, system=None), row)
    found = [{"role": "system", "content": system}] if system else []
    for exchange in earlier:
        found += as_turns(exchange)
    completion = value_of(row, source.completion)
    if not isinstance(completion, list):
        completion = [{"role": "assistant", "content": as_text(completion)}]
    return [*found, {"role": "user", "content": problem}, *turns(completion)]


def _usable(
    source: Source, raw: Dataset, convert: Callable[[dict], dict], features: dict[str, Any], mend: str
) -> Dataset:
    """What `convert` makes of the rows of `raw`. Those for which it raises `UnusableRow` are counted and left out.

    Raises `UserError`, which ends with `mend`, if they are the majority.
    """

    def attempt(row: dict) -> dict:
        try:
            return {**convert(row), "unusable": None}
        except UnusableRow as reason:
            return {**dict.fromkeys(features), "unusable": str(reason)}
        except UnicodeDecodeError:
            return {**dict.fromkeys(features), "unusable": "text that is not UTF-8"}

    rows = mapped(raw, attempt, remove_columns=raw.column_names, features=Features({**features, "unusable": TEXT}))
    unusable = rows["unusable"]
    rows = rows.remove_columns("unusable")
    reasons = Counter(reason for reason in unusable if reason is not None)
    left_out = reasons.total()
    if not left_out:
        return rows
    counted = ", ".join(f"{count} with {reason}" for reason, count in reasons.most_common(REASONS))
    if left_out * 2 > len(rows):
        raise UserError(
            f"data.sources: {source.path}: {left_out} of {len(rows)} rows cannot be used: {counted}.\n{mend}"
        )
    logger.warning("%s: left out %d of %d rows: %s", source.path, left_out, len(rows), counted)
    return rows.select([place for place, reason in enumerate(unusable) if reason is None])
