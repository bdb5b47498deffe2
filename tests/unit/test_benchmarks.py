"""Benchmarks by name, protocols, and questions with choices."""

import base64
import json
import pickle
import zlib
from collections import Counter

import pytest
from conftest import write_yaml

from r1dist.config import EvaluateRun, GRPORun, Source
from r1dist.config.benchmarks import table
from r1dist.config.loader import as_tree, build, parse
from r1dist.data.choices import choice_question, right_choice
from r1dist.data.formats import UnusableRow
from r1dist.data.programs import humaneval, livecodebench
from r1dist.data.sources import load_problems
from r1dist.data.templates import load_template
from r1dist.errors import UserError
from r1dist.evaluation.problems import ProblemReader
from r1dist.rewards.code.reward import code


def evaluation(*arguments: str) -> EvaluateRun:
    return parse(EvaluateRun, ["--model.path", "tiny", *arguments])


def test_every_entry_of_the_table_can_be_named():
    run = evaluation("--benchmarks", ",".join(table()), "--protocol", "r1")
    assert [benchmark.name for benchmark in run.benchmarks] == list(table())
    assert all(benchmark.samples and benchmark.instruction for benchmark in run.benchmarks)


def test_a_name_becomes_its_sources():
    (gsm8k,) = evaluation("--benchmarks", "gsm8k").benchmarks
    assert gsm8k.sources == [
        Source(path="openai/gsm8k", subset="main", split="test", problem="question", answer="answer",
               answer_format="hashes")
    ]  # fmt: skip
    assert gsm8k.samples == 4 and gsm8k.instruction is None


def test_a_local_copy_takes_the_place_of_the_hub(tmp_path):
    tree = {"model": {"path": "tiny"}, "benchmarks": ["svamp", {"name": "gsm8k", "path": "rows.jsonl", "limit": 3}]}
    run = parse(EvaluateRun, ["--config", str(write_yaml(tmp_path / "e.yaml", tree))])
    source = run.benchmarks[1].sources[0]
    assert (source.path, source.subset, source.limit, source.answer_format) == ("rows.jsonl", None, 3, "hashes")
    assert table()["gsm8k"]["sources"][0]["path"] == "openai/gsm8k"
    again = parse(EvaluateRun, ["--config", str(write_yaml(tmp_path / "e.yaml", as_tree(run)))])
    assert as_tree(again) == as_tree(run)  # what --dry_run prints is a configuration


@pytest.mark.parametrize(
    ("given", "refusal"),
    [
        ("gsm8", r"`gsm8` is not a benchmark; did you mean `gsm8k`\?"),
        ("[gsm8k, gsm8k]", "two of them have the same `name`"),
        ("[{name: data, sources: [{path: x}]}]", "`data` is the name of other scores"),
        ("[{name: mine}]", "`mine` is not a benchmark"),
        ("[{name: gsm8k, paths: x}]", "`benchmarks.0.paths` is not a field"),
        ("[{sources: [{path: x}]}]", r"`benchmarks\.0\.name` is missing"),
    ],
)
def test_what_is_no_benchmark_is_refused(given, refusal):
    with pytest.raises(UserError, match=refusal):
        evaluation("--benchmarks", given)


def test_without_anything_to_ask_it_is_refused():
    with pytest.raises(UserError, match=r"nothing to evaluate: set `data\.sources`, `benchmarks` or `requests`"):
        evaluation()


def test_a_protocol_sets_what_is_left_open():
    run = evaluation("--benchmarks", "aime24,gsm8k", "--protocol", "r1")
    assert run.modes == ["sampled"] and (run.sampling.temperature, run.sampling.top_p) == (0.6, 0.95)
    assert run.sampling.max_tokens == 32768
    assert [benchmark.samples for benchmark in run.benchmarks] == [64, 4]
    assert "boxed" in run.benchmarks[0].instruction
    named = ("--benchmarks", "[aime24, {name: gsm8k, samples: 3}]", "--protocol", "r1")
    run = evaluation(*named, "--sampling.samples", "2", "--sampling.max_tokens", "64")
    assert run.sampling.max_tokens == 64 and run.sampling.temperature == 0.6
    assert [benchmark.samples for benchmark in run.benchmarks] == [2, 3]
    assert evaluation("--benchmarks", "gsm8k", "--protocol", "greedy").modes == ["greedy"]


@pytest.mark.parametrize(
    ("answer", "place"),
    [
        (2, 2),
        (4, None),
        ("blue", 1),
        (" blue ", 1),
        ("B", 1),
        ("(c)", 2),
        ("green", None),
        ("same", None),
        ("2", None),
    ],
)
def test_the_right_choice_is_named_by_place_text_or_letter(answer, place):
    assert right_choice(["red", "blue", "same", "same"], answer) == place


def test_a_number_is_a_place_even_where_choices_are_numbers():
    assert right_choice(["1", "2", "3"], 2) == 2 and right_choice(["1", "2", "3"], "2") == 1


def test_choices_are_shuffled_by_the_seed_and_the_question():
    texts = ["yes", "no", "never", "always"]
    letters = Counter()
    for number in range(400):
        problem, letter = choice_question(f"{number}?", texts, 1, seed=0)
        assert f"\n{letter}. no\n" in problem and problem.startswith(f"{number}?\n\nA. ")
        letters[letter] += 1
    assert set(letters) == set("ABCD") and min(letters.values()) > 60
    assert choice_question("1?", texts, 1, seed=0) == choice_question("1?", texts, 1, seed=0)
    assert len({choice_question("1?", texts, 1, seed=seed) for seed in range(20)}) > 5


def test_columns_of_choices_become_a_question_and_a_letter(tmp_path):
    gpqa = {"Question": "Why?", "Correct Answer": "so", "Wrong 1": "thus", "Wrong 2": "hence\n"}
    mmlu = {"question": "2 + 2", "choices": ["1", "2", "3", "4"], "answer": 3}
    for name, rows in (
        ("gpqa", [gpqa, gpqa | {"Wrong 1": None}, gpqa | {"Wrong 1": "so"}, gpqa, gpqa, gpqa]),
        ("mmlu", [mmlu]),
    ):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ["Correct Answer", "Wrong 1", "Wrong 2"]
    rows = load_problems(
        [
            Source(path=str(tmp_path / "gpqa.jsonl"), problem="Question", answer="Correct Answer", choices=columns),
            Source(path=str(tmp_path / "mmlu.jsonl"), problem="question", answer="answer", choices="choices"),
        ]
    )
    assert len(rows) == 5  # without the row that lacks a choice, and the one where the right one stands twice
    assert f"{rows[0]['answer']}. so" in rows[0]["problem"] and rows[0]["problem"].count("\n") == 6
    assert f"{rows[4]['answer']}. 4" in rows[4]["problem"]


def passed(completion: str, tests: list[dict]) -> float | None:
    return code(completion, {"tests": json.dumps(tests), "language": None})


def fenced(program: str) -> str:
    return f"<answer>\n```python\n{program}\n```\n</answer>"


def test_humanevals_check_is_a_test():
    tests = humaneval(
        "def check(candidate):\n    assert candidate(2) == 3\n    assert candidate(0) == 1\n", "plus_one"
    )
    assert passed(fenced("def plus_one(n):\n    return n + 1"), tests) == 1
    assert passed(fenced("def plus_one(n):\n    return 3"), tests) == 0
    assert passed(fenced("def other(n):\n    return n + 1"), tests) == 0


def test_livecodebenchs_tests_of_methods_and_of_stdin():
    method = {"input": '[1, 2]\n"x"', "output": "[2, 1]", "testtype": "functional"}
    packed = base64.b64encode(zlib.compress(pickle.dumps(json.dumps([method])))).decode()
    row = {
        "metadata": '{"func_name": "turn"}',
        "public_test_cases": json.dumps([method]),
        "private_test_cases": packed,
    }
    tests = livecodebench(row)
    assert len(tests) == 2
    assert passed(fenced("class Solution:\n    def turn(self, a, b):\n        return a[::-1]"), tests) == 1
    assert passed(fenced("class Solution:\n    def turn(self, a, b):\n        return a"), tests) == 0
    stdin = [{"input": "2\n", "output": "4\n", "testtype": "stdin"}]
    row = {"metadata": "{}", "public_test_cases": json.dumps(stdin), "private_test_cases": "[]"}
    assert passed(fenced("print(2 * int(input()))"), livecodebench(row)) == 1


def test_programs_may_be_trained_on_livecodebenchs_tests_and_not_on_humanevals(tmp_path, small_grpo):
    case = {"input": "2\n", "output": "4\n", "testtype": "stdin"}
    row = {"q": "Double it.", "public_test_cases": json.dumps([case]), "private_test_cases": "[]"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    source = {"path": str(tmp_path / "rows.jsonl"), "problem": "q", "tests": "private_test_cases", "kind": "code"}
    tree = {**small_grpo, "output_dir": "x", "rewards": {"code": 1}}
    run = build(GRPORun, {**tree, "data": {"sources": [{**source, "tests_format": "livecodebench"}]}}, "run.yaml")
    (read,) = load_problems(run.data.sources)
    assert code(fenced("print(2 * int(input()))"), read) == 1
    with pytest.raises(UserError, match=r"`data\.sources\.0\.tests_format`: humaneval is for evaluation"):
        build(GRPORun, {**tree, "data": {"sources": [{**source, "tests_format": "humaneval"}]}}, "run.yaml")


def test_pickled_objects_are_not_read():
    packed = base64.b64encode(zlib.compress(pickle.dumps(Counter))).decode()
    row = {"metadata": "{}", "public_test_cases": "[]", "private_test_cases": packed}
    with pytest.raises(UnusableRow, match=r"hold an object, collections\.Counter"):
        livecodebench(row)


def read_benchmark(tmp_path, name: str, *rows: dict) -> list:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = evaluation("--benchmarks", json.dumps([{"name": name, "path": str(path)}]))
    reader = ProblemReader("chat", load_template(run.model, "chat"), run.prompting, 4096, 8, pool=None)
    return reader.benchmarks(run.benchmarks, "benchmarks")


@pytest.mark.parametrize(
    ("name", "row", "refusal"),
    [
        ("math500", {"problem": "?", "answers": "1", "level": 2},
         r"`answer` \(`answer`\); did you mean `answers`\?\nIt has problem, answers, level\."),
        ("svamp", {"Body": "?", "question": "?", "Answer": 1},
         r"`Question` \(`problem`\); did you mean `question`\?\nIt has Body, question, Answer\."),
        ("mmlu_stem", {"question": "?", "answer": 0}, r"`choices` \(`choices`\)\.\nIt has question, answer\."),
        ("humaneval", {"prompt": "?", "test": "", "entry": "f"},
         r"`entry_point` \(`tests_format`\); did you mean `entry`\?\nIt has prompt, test, entry\."),
        ("livecodebench", {"question_content": "?", "starter_code": "", "private_test_cases": "[]"},
         r"`public_test_cases` \(`tests_format`\); did you mean `private_test_cases`\?\nIt has "),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isalnum() else "",
)  # fmt: skip
def test_a_benchmark_with_other_columns_is_refused_by_name(tmp_path, name, row, refusal):
    with pytest.raises(UserError, match=rf"^benchmark {name}: .*rows\.jsonl has no column {refusal}") as error:
        read_benchmark(tmp_path, name, row)
    assert str(error.value).count("\n") == 1


@pytest.mark.parametrize(
    "tests", ["{", "[1]", '[{"input": ""}]', "AAAA", "!"], ids=["JSON", "numbers", "fields", "zlib", "base64"]
)
def test_tests_in_another_form_are_refused(tmp_path, tests):
    row = {"question_content": "?", "starter_code": "", "private_test_cases": tests, "public_test_cases": "[]"}
    with pytest.raises(UserError, match=r"benchmark livecodebench: .*1 with no tests of the form `livecodebench`"):
        read_benchmark(tmp_path, "livecodebench", row)
