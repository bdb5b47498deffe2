"""Rows of reasoning-gym's procedural tasks: questions that no two splits share, with what their scorers need."""

import ast
import functools
import hashlib
import itertools
import logging
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import numpy as np

from ..config import Source
from ..config.gym import CHUNK, PATH, create
from ..errors import UserError
from ..tiny.problems import split_of
from .formats import UnusableRow

logger = logging.getLogger(__name__)

DEFAULT_ROWS = 500
TEST_SHARE = 10  # one question in ten belongs to the test split
MISSES = 1000
"""Items in a row without a new question of the split, after which a task is taken to have no more."""
HASH_ORDER = {"isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder"}
"""Tasks whose items follow the order of sets of texts, which is another one in each process, unless its hash seed is
fixed. Found by making the first items of every task in several processes."""


def rows(source: Source) -> list[dict]:
    """`limit` rows with `problem`, `answer` (None where the task has no single one) and `entry`.

    `entry` is what `rewards.task` scores an answer by: a Python literal of `task`, `config` and the task's own item.
    Questions are distinct, and a hash of the question decides its split, so that no seed can mix the two. The same
    fields give the same rows.

    Raises `UserError` for a task with fewer questions, one that cannot make them, and one whose rows would be others
    in each process.
    """
    task, config, wanted = source.task, source.config or {}, source.limit or DEFAULT_ROWS
    where = f"data.sources: {PATH}, task `{task}`"
    if task in HASH_ORDER and os.environ.get("PYTHONHASHSEED") != "0":
        raise UserError(
            f"{where}: its items depend on Python's hash seed, which is another one in each process.\n"
            "Start the command with `PYTHONHASHSEED=0`, or choose another task."
        )
    logger.info("%s: generating %d rows", where, wanted)
    found: dict[str, dict] = {}
    drawn = missed = 0
    for chunk in itertools.count():
        for item in _items(task, config, _chunk_seed(source.seed, chunk), where):
            drawn, missed = drawn + 1, missed + 1
            question = item["question"]
            if question not in found and split_of(question, TEST_SHARE) == source.split:
                found[question], missed = _row(task, config, item), 0
            if len(found) == wanted:
                return list(found.values())
            if missed == MISSES:
                raise UserError(
                    f"{where}: `limit` is {wanted}, but {drawn} items had {len(found)} distinct questions of the "
                    f"split `{source.split}`.\nLower `limit`, or set `config` so that there are more."
                )


def checked_entry(text: str | None) -> str | None:
    """The `entry` of a row that was written to a file; None for a row of no task.

    Raises `UnusableRow` for what is no such entry, and for a task that cannot be used.
    """
    if text is None:
        return None
    try:
        entry = ast.literal_eval(text)
        task, config, _ = str(entry["task"]), dict(entry["config"]), entry["item"]
    except (ValueError, SyntaxError, TypeError, KeyError) as error:
        raise UnusableRow("an `entry` that is none") from error
    if (refusal := _refusal(task, repr(config))) is not None:
        raise UnusableRow(f"an `entry` that cannot be used: {refusal}")
    return text


@functools.cache
def _refusal(task: str, config: str) -> str | None:
    """Why rows of that task cannot be scored, None if they can be."""
    try:
        create(task, ast.literal_eval(config))
    except UserError as error:
        return str(error).splitlines()[0]
    return None


def _chunk_seed(seed: int, chunk: int) -> int:
    """Below 2**31. The package seeds item i with seed + i, so that neighbouring seeds would share their items."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{chunk}".encode()).digest()[:4]) // 2


def _items(task: str, config: dict, seed: int, where: str) -> Iterator[dict]:
    items = create(task, config, seed)
    for index in range(CHUNK):
        with _seeded(seed + index), redirect_stdout(sys.stderr):  # some tasks print
            try:
                item = items[index]
            except Exception as error:  # whatever it is: some values of `config` are refused here only
                raise UserError(f"{where}: no item can be made with this `config`: {error!r}.") from error
        yield item


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The process's generators, which some tasks draw from or seed, are seeded, and afterwards as before."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _row(task: str, config: dict, item: dict) -> dict:
    # Not as JSON, which would make lists of the tuples that some scorers compare with.
    entry = repr({"task": task, "config": config, "item": _plain(item)})
    ast.literal_eval(entry)  # raises here, rather than in a worker, for what could not be read there
    return {"problem": item["question"], "answer": item["answer"], "entry": entry}


def _plain(value: Any) -> Any:
    """Of Python's own types alone: of NumPy's, which are derived from them, those; of others, their text."""
    if isinstance(value, dict):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return type(value)(map(_plain, value))
    kind = next((kind for kind in (bool, int, float, complex, str) if isinstance(value, kind)), str)
    return None if value is None else kind(value)
