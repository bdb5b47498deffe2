"""Tests of programs as public benchmarks write them, in the form that the reward `code` reads."""

import base64
import binascii
import io
import json
import pickle
import zlib
from typing import Any

from .formats import UnusableRow

FURTHER_COLUMNS = {"humaneval": ["entry_point"], "livecodebench": ["public_test_cases", "private_test_cases"]}
"""`tests_format` -> the columns that it reads beside `tests`."""


def program_tests(tests: Any, tests_format: str, row: dict) -> Any:
    """The tests in the column `tests` of `row`, as `rewards.code.reward.read_tests` takes them.

    Raises `UnusableRow` for what is not in the form that `tests_format` names.
    """
    if tests_format == "plain":
        return tests
    refusal = UnusableRow(f"no tests of the form `{tests_format}`")
    if not all(isinstance(text, str) for text in (tests, *(row[column] for column in FURTHER_COLUMNS[tests_format]))):
        raise refusal
    if tests_format == "humaneval":
        return humaneval(tests, row["entry_point"])
    try:
        return livecodebench(row)
    except (json.JSONDecodeError, binascii.Error, zlib.error, pickle.UnpicklingError, KeyError, TypeError) as error:
        raise refusal from error


def humaneval(test: str, entry_point: str) -> list[dict]:
    """HumanEval's `check`, which raises where `entry_point` is wrong, as one test (arXiv 2107.03374)."""
    statements = f"{test}\ncheck({entry_point})\n"
    return [{"call": f"exec({statements!r}, globals()) is None", "returns": True}]


def livecodebench(row: dict) -> list[dict]:
    """LiveCodeBench's public and private tests (arXiv 2403.07974): of stdin, or of a method of `Solution`.

    Raises `UnusableRow` for tests of another kind.
    """
    name = (json.loads(row["metadata"]) if row.get("metadata") else {}).get("func_name")
    cases = [*json.loads(row["public_test_cases"]), *_private(row["private_test_cases"])]
    return [_case(case, name) for case in cases]


def _case(case: dict, name: str | None) -> dict:
    if case["testtype"] == "stdin":
        return {"stdin": case["input"], "stdout": case["output"]}
    if case["testtype"] != "functional" or name is None:
        raise UnusableRow(f"a test of the kind `{case['testtype']}`")
    arguments = [json.loads(line) for line in case["input"].splitlines() if line.strip()]
    return {"call": f"Solution().{name}(*{arguments!r})", "returns": json.loads(case["output"])}


def _private(packed: str) -> list[dict]:
    """JSON, or JSON that was pickled, compressed and written in base64."""
    if packed.lstrip().startswith("["):
        return json.loads(packed)
    return json.loads(_TextUnpickler(io.BytesIO(zlib.decompress(base64.b64decode(packed)))).load())


class _TextUnpickler(pickle.Unpickler):
    """Reads no objects, which could run code."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise UnusableRow(f"tests that hold an object, {module_name}.{global_name}")
