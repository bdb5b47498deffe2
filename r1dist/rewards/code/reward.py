"""Does the program in the answer pass its tests? Run in the sandbox, compared outside of it."""

import json
import math
import re
import secrets
from dataclasses import dataclass
from typing import Any

from ..math.accuracy import final_answer
from ..thinking import after_thinking
from .sandbox import Limits, compiler, python, run

FENCE = re.compile(r"[ \t]*```[ \t]*([\w+]*)")
LANGUAGES = {"python": "python", "python3": "python", "py": "python", "cpp": "cpp", "c++": "cpp"}
COMPILING = Limits(seconds=30, cpu_seconds=30, memory_mib=2048, output_bytes=64 << 20, folder_bytes=256 << 20)

# Runs a function test. The mark separates the value from what the program itself prints; a program that finds the mark
# can say a value in the function's place, but which value is right is known only outside.
HARNESS = """\
import json
with open("solution.py", encoding="utf-8") as file:
    names = {{"__name__": "solution"}}
    exec(compile(file.read(), "solution.py", "exec"), names)
print("\\n" + {mark!r} + json.dumps(eval({call!r}, names)))
"""


@dataclass(frozen=True)
class Test:
    """One test of a row: what goes into the sandbox, and what is expected of it outside.

    With `call`, an expression, `expected` is its value as JSON has it; else `expected` is the whole stdout.
    """

    stdin: str
    call: str | None
    expected: Any


def code(completion: str, row: dict) -> float | None:
    """The share of the row's tests that the answer's program passes: passed / all.

    Range [0, 1]; 0 if there is no program in `row["language"]` ("python" or "cpp"; either, if the row names none),
    or it does not compile. None if the row's `tests`, `language` or `tolerance` mean nothing (see `read_tests`).
    A test is passed if the program ends by itself with exit code 0 and its whole output has the expected words;
    with `row["tolerance"]`, numbers may differ by that much, absolutely or relatively.
    Raises `VerifiersBroken` and `UserError` as `sandbox.run` does: a fault of the machine is no score.
    Source: DeepSeek-R1 (arXiv 2501.12948), section 2.2.2: feedback on predefined test cases. The report does not say
    what passing some of them pays; the share is open-r1's choice.
    """
    tests, languages, tolerance = read_tests(row), _languages(row), row.get("tolerance") or 0.0
    if tests is None or not languages or not isinstance(tolerance, int | float):
        return None
    found = program(completion, {"python"} if any(test.call for test in tests) else languages)
    if found is None:
        return 0.0
    language, source = found
    if language == "python":
        files = {"solution.py": source.encode(errors="replace")}
    elif (binary := _compile(source)) is not None:
        files = {"program": binary}
    else:
        return 0.0
    return sum(_passes(test, files, tolerance) for test in tests) / len(tests)


def code_format(completion: str, row: dict) -> float:
    """1 if the answer holds exactly one fenced block in `row["language"]`, else 0.

    Range {0, 1}. What is around the block is left to `format`. The idea is open-r1's.
    """
    return float(len(_blocks(final_answer(completion), _languages(row))) == 1)


def program(completion: str, languages: set[str]) -> tuple[str, str] | None:
    """The language and the text of the last fenced block in one of `languages` in the graded part.

    Where the `<answer>` element holds none, the block may stand outside of it, but never in the thinking.
    """
    blocks = _blocks(final_answer(completion), languages) or _blocks(after_thinking(completion), languages)
    return blocks[-1] if blocks else None


def read_tests(row: dict) -> list[Test] | None:
    """The tests of `row["tests"]`, a list or its JSON; None if there are none, or one of them is no test.

    A test is {"stdin": text, "stdout": text} or {"call": a Python expression, "returns": a JSON value}. A stdout
    without a word is no test: any program that prints nothing would pass it. Calls are Python's only.
    """
    tests = row.get("tests")
    try:
        tests = json.loads(tests) if isinstance(tests, str) else tests
    except json.JSONDecodeError:
        return None
    read = [_read_test(test) for test in tests] if isinstance(tests, list) else []
    if not read or None in read or (_languages(row) == {"cpp"} and any(test.call for test in read)):
        return None
    return read


def _languages(row: dict) -> set[str]:
    """The languages that the row's program may be in; none where the row names one that cannot be run."""
    named = row.get("language")
    return {language for name, language in LANGUAGES.items() if named is None or name == str(named).lower()}


def _read_test(test: Any) -> Test | None:
    match test:
        case {"stdin": str(stdin), "stdout": str(stdout)} if stdout.split():
            return Test(stdin, None, stdout)
        case {"call": str(call), "returns": returns} if call.strip():
            return Test("", call, returns)
    return None


def _blocks(text: str, languages: set[str]) -> list[tuple[str, str]]:
    """The closed blocks in a language that can be run, in time linear in the text, whatever a model repeats in it."""
    blocks, name, lines = [], None, []
    for line in text.split("\n"):
        fence = FENCE.match(line)
        if fence and (fence[1] or name is None):
            name, lines = LANGUAGES.get(fence[1].lower(), ""), []
        elif fence:
            blocks.append((name, "\n".join(lines)))
            name = None
        else:
            lines.append(line)
    return [(name, source) for name, source in blocks if name in languages]


def _compile(source: str) -> bytes | None:
    """The program, by way of the compiler's stdout: nothing that the sandbox writes reaches a disk."""
    build = f"{compiler()} -O2 -std=c++17 -o program solution.cpp && cat program"
    outcome = run(["/bin/sh", "-c", build], {"solution.cpp": source.encode(errors="replace")}, limits=COMPILING)
    return outcome.stdout if outcome.succeeded else None


def _passes(test: Test, files: dict[str, bytes], tolerance: float) -> bool:
    if test.call is None:
        command = ["./program"] if "program" in files else [python(), "solution.py"]
        outcome = run(command, files, test.stdin.encode(errors="replace"))
        words = outcome.stdout.decode(errors="replace").split()
        return outcome.succeeded and _same_words(words, test.expected.split(), tolerance)
    mark = secrets.token_hex(16)
    harness = HARNESS.format(mark=mark, call=test.call).encode()
    outcome = run([python(), "harness.py"], {**files, "harness.py": harness})
    marked = [line for line in outcome.stdout.decode(errors="replace").split("\n") if line.startswith(mark)]
    if not outcome.succeeded or len(marked) != 1:
        return False
    try:
        value = json.loads(marked[0].removeprefix(mark))
    except (ValueError, RecursionError):  # not JSON, or lists nested by the thousand
        return False
    return _same_value(value, test.expected, tolerance)


def _same_words(words: list[str], expected: list[str], tolerance: float) -> bool:
    return len(words) == len(expected) and all(
        word == meant or _close(_number(word), _number(meant), tolerance)
        for word, meant in zip(words, expected, strict=True)
    )


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return math.nan


def _close(value: float, expected: float, tolerance: float) -> bool:
    return tolerance > 0 and math.isclose(value, expected, rel_tol=tolerance, abs_tol=tolerance)


def _same_value(value: Any, expected: Any, tolerance: float) -> bool:
    """Equal as in Python, but for a bool, which equals no number."""
    match value, expected:
        case (list(), list()):
            return len(value) == len(expected) and all(
                _same_value(one, meant, tolerance) for one, meant in zip(value, expected, strict=True)
            )
        case (dict(), dict()):
            return value.keys() == expected.keys() and all(
                _same_value(one, expected[key], tolerance) for key, one in value.items()
            )
        case (bool(), _) | (_, bool()):
            return value is expected
        case (int() | float(), int() | float()):
            return value == expected or _close(value, expected, tolerance)
    return value == expected
