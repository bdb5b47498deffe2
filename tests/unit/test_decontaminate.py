"""Training rows that share words with test problems are dropped, counted and listed; others are kept."""

import json
import logging
import random
import re
from contextlib import contextmanager

import pytest
from conftest import GSM8K, SMALL_GRPO

from r1dist.config import Data, Decontaminate, GRPORun, SampleRun, SFTRun, Source
from r1dist.config.loader import as_tree, build
from r1dist.data.decontaminate import ProblemIndex, decontaminate, words
from r1dist.data.prompts import completion_dataset, prompt_dataset
from r1dist.data.sources import load_problems
from r1dist.errors import UserError
from r1dist.files import DECONTAMINATED
from r1dist.rl import train as rl
from r1dist.run.resume import data_digests
from r1dist.run.setup import run_folder
from r1dist.sampling import run as sampling
from r1dist.sft import train as sft

needs_data = pytest.mark.skipif(
    not GSM8K.is_dir(), reason="the real data sets do not lie beside this checkout, in ../shared/data"
)
MATH500 = GSM8K.parent / "math500" / "test.jsonl"
TEST = "A farmer has 12 cows, and each of them gives 7 litres of milk a day. How much milk is that?"
SHORT = "Simplify $\\sqrt{242}$."
CLEAN = "A baker sells 15 loaves every morning. How many loaves are that in a week of 7 days?"


def jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def against(tmp_path, *problems: str) -> dict:
    return {"against": [{"path": jsonl(tmp_path / "tests.jsonl", [{"q": p} for p in problems]), "problem": "q"}]}


def settings(tmp_path, *problems: str) -> Decontaminate:
    return Decontaminate(against=[Source(**source) for source in against(tmp_path, *problems)["against"]])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"Find $\frac{1}{2}x^2 + 3.5$!", "find frac 1 2 x 2 3 5"),
        ("x² − ½, 2x, x_1", "x 2 1 2 2 x x 1"),
        ("ＦＩＮＤ the １２th Straße ﬁrst", "find the 12 th strasse first"),
        ("小明有3个苹果。カタ・カナ", "小 明 有 3 个 苹 果 カ タ カ ナ"),
        ("Сколько 사과가 ثلاثة", "сколько 사과가 ثلاثة"),
        ("+ - = ?! \\[ \\] 🙂", ""),
    ],
)
def test_words_are_letters_and_digits_without_case_and_signs(text, found):
    assert words(text) == found.split()


def holds(row: list[str], run: list[str]) -> bool:
    return any(row[begin : begin + len(run)] == run for begin in range(len(row) - len(run) + 1))


def contaminated(row: list[str], problem: list[str], length: int) -> bool:
    if len(problem) >= length:
        return any(holds(row, problem[begin : begin + length]) for begin in range(len(problem) - length + 1))
    return holds(row, problem) if len(problem) >= 3 else bool(problem) and row == problem


def test_the_same_rows_are_found_as_by_comparing_all_with_all():
    rng = random.Random(0)

    def drawn(most: int) -> list[str]:
        return rng.choices(["a", "bc", "17"], k=rng.randint(0, most))

    def text(row: list[str]) -> str:
        signs = [" ", ", ", "-", "\n", " $", "} {"]
        return "".join(rng.choice([word, word.upper()]) + rng.choice(signs) for word in row)

    counts = {True: 0, False: 0}
    for _ in range(150):
        length, problems = rng.randint(3, 9), [drawn(12) for _ in range(rng.randint(1, 4))]
        index = ProblemIndex(map(text, problems), length)
        assert index.without_words == problems.count([])
        for row in (drawn(25) for _ in range(10)):
            expected = [contaminated(row, problem, length) for problem in problems]
            shared = index.shared(text(row))
            assert (shared is not None) == any(expected)
            counts[any(expected)] += 1
            if shared is not None:
                assert expected[shared.problem] and holds(row, shared.words.split())
    assert min(counts.values()) > 300


def disguised(problem: str, rng: random.Random) -> str:
    """Other signs, spaces, case and forms of digits; the words are the same."""
    text = re.sub(r"[\W_]+", lambda _: rng.choice([" ", "  ", "\n", ", ", "; ", "*", " $"]), problem)
    text = "".join(rng.choice([character, character.upper()]) for character in text)
    return text.translate({ord(str(digit)): chr(0xFF10 + digit) for digit in range(5)})


@needs_data
def test_all_planted_problems_are_found_and_hardly_any_other_row(tmp_path):
    rng = random.Random(0)
    train = [json.loads(line)["question"] for line in (GSM8K / "train.jsonl").read_text().splitlines()]
    tests = [json.loads(line)["problem"] for line in MATH500.read_text().splitlines()]
    ways = (
        lambda problem: problem,
        lambda problem: disguised(problem, rng),
        lambda problem: f"{rng.choice(train)} {problem} {rng.choice(train)}",
        lambda problem: f"{rng.choice(train)}\n{disguised(problem, rng)}\n{rng.choice(train)}",
    )
    shortest = sorted(tests, key=lambda problem: len(words(problem)))[:40]
    chosen = [*shortest, *rng.sample([problem for problem in tests if problem not in shortest], 160)]
    planted = {ways[place % len(ways)](problem): problem for place, problem in enumerate(chosen)}
    assert len(planted) == 200
    rows = [*train, *planted]
    rng.shuffle(rows)
    path = jsonl(tmp_path / "rows.jsonl", [{"q": row, "a": "1"} for row in rows])
    (left,), dropped = decontaminate(
        [load_problems([Source(path=path, problem="q", answer="a")])],
        Decontaminate(against=[Source(path=str(MATH500), problem="problem")]),
    )
    found = {row["problem"] for row in dropped}
    assert found >= planted.keys()
    assert len(found - planted.keys()) <= 0.001 * len(train)
    assert list(left["problem"]) == [row for row in rows if row not in found]
    verbatim = [row for row in dropped if row["problem"] in tests]
    assert len(verbatim) == 50 and {row["test_source"] for row in dropped} == {str(MATH500)}


def test_questions_of_all_turns_are_looked_at_and_replies_are_not(tmp_path, template, caplog):
    def talk(*texts: str) -> list[dict]:
        return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]

    talks = [talk(CLEAN, "105"), talk(f"Hello! {SHORT}", "11", CLEAN, "105"), talk(CLEAN, f"As for {TEST}")]
    talks.append(talk("Well then.", TEST, f"So: {TEST.upper()}", "84"))
    rows = jsonl(tmp_path / "rows.jsonl", [{"talk": talk, "asked": talk[:-1], "a": "1"} for talk in talks])
    chosen = settings(tmp_path, TEST, SHORT, "?!")
    sft_data = Data(sources=[Source(path=rows, conversation="talk")], decontaminate=chosen)
    rl_data = Data(sources=[Source(path=rows, problem="asked", answer="a")], decontaminate=chosen)
    taught: list[dict] = []
    asked: list[dict] = []
    with caplog.at_level(logging.INFO):
        assert len(completion_dataset(sft_data, template, None, contaminated=taught)) == 2
    assert prompt_dataset(rl_data, template, 4096, 8, contaminated=asked)["prompt_id"] == [0, 1]
    source = chosen.against[0].path
    assert taught == asked == [
        {"source": rows, "problem": f"Hello! {SHORT}", "test_source": source, "test_problem": SHORT,
         "shared": "simplify sqrt 242"},
        {"source": rows, "problem": f"So: {TEST.upper()}", "test_source": source, "test_problem": TEST,
         "shared": "a farmer has 12 cows and each of them gives 7 litres of"},
    ]  # fmt: skip
    assert f"dropped 2 of 4 rows, which share words with test problems: 2 of {rows} with {source}" in caplog.text
    assert f"dropped because of {source}: Hello! Simplify" in caplog.text
    assert "1 of 3 test problems have no words" in caplog.text


def test_longer_runs_may_be_asked_for(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"q": text, "a": "1"} for text in (TEST[:60], CLEAN)])
    parts, chosen = [load_problems([Source(path=path, problem="q", answer="a")])], settings(tmp_path, TEST)
    assert [len(rows) for rows in decontaminate(parts, chosen)[0]] == [1]
    chosen.ngram = 14
    assert decontaminate(parts, chosen) == (parts, [])


def test_sources_of_tests_are_named_with_their_splits(caplog):
    chosen = Decontaminate(against=[Source(path="tiny", split="train", limit=3)])
    with caplog.at_level(logging.WARNING):
        (rows,), _ = decontaminate([load_problems([Source(path="tiny", limit=6)])], chosen)
    assert len(rows) == 3 and "3 of tiny with tiny train" in caplog.text


def test_a_run_without_rows_and_bad_tests_are_refused(tmp_path):
    rows = load_problems(
        [Source(path=jsonl(tmp_path / "rows.jsonl", [{"q": TEST, "a": "1"}]), problem="q", answer="a")]
    )
    with pytest.raises(UserError, match=r"data.decontaminate: all of the 1 rows share words with problems") as error:
        decontaminate([rows], settings(tmp_path, TEST))
    assert len(str(error.value).splitlines()) == 2
    chosen = settings(tmp_path, TEST)
    chosen.against[0].problem = "text"
    with pytest.raises(UserError, match=r"^data.decontaminate.against: .*tests.jsonl has no column `text`"):
        decontaminate([rows], chosen)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"against": []}, "data.decontaminate.against"),
        ({"against": [{"path": "tiny"}], "ngram": 2}, "data.decontaminate.ngram"),
        (
            {"against": [{"path": "tiny", "task": "chain_sum"}]},
            "`data.decontaminate.against.0`: `task` and `config` are",
        ),
    ],
)
def test_bad_fields_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        build(SFTRun, {"model": {"path": "tiny"}, "output_dir": "x", "data": data(given)}, "test")


def data(given: dict) -> dict:
    return {"sources": [{"path": "tiny", "limit": 64}], "decontaminate": given}


def test_benchmarks_are_named():
    tree = {"model": {"path": "tiny"}, "output_dir": "x", "data": data({"against": ["math500", {"path": "x.jsonl"}]})}
    found = build(SFTRun, tree, "run.yaml").data.decontaminate.against
    assert [source.path for source in found] == ["HuggingFaceH4/MATH-500", "x.jsonl"]
    with pytest.raises(UserError, match="`math50` is not a benchmark; did you mean `math500`"):
        build(SFTRun, {**tree, "data": data({"against": ["math50"]})}, "run.yaml")


def test_a_resumed_run_needs_the_same_tests(tmp_path):
    tree = {"model": {"path": "tiny"}, "output_dir": str(tmp_path / "run"), "resume": "auto"}
    run = build(SFTRun, {**tree, "data": data(against(tmp_path, TEST))}, "test")
    assert list(data_digests(as_tree(run))) == ["data.decontaminate.against.0.path"]
    generators = [{"name": "one", "model": {"path": "tiny"}, "data": data(against(tmp_path, TEST))}]
    sample = build(SampleRun, {"output_dir": str(tmp_path / "samples"), "generators": generators}, "test")
    assert list(data_digests(as_tree(sample))) == ["generators.0.data.decontaminate.against.0.path"]


class Begun(Exception):
    """A launcher has come as far as its folder."""


@pytest.mark.parametrize("launcher", ["grpo", "sft"])
def test_trainers_list_what_was_dropped_in_their_folder(tmp_path, monkeypatch, launcher):
    module, run_class = {"grpo": (rl, GRPORun), "sft": (sft, SFTRun)}[launcher]
    first = load_problems([Source(path="tiny", limit=1)])["problem"][0]
    tree = {"model": {"path": "tiny"}, "per_device_train_batch_size": 4, "report_to": "none", "max_length": 512}
    tree = dict(SMALL_GRPO) if launcher == "grpo" else tree
    tree |= {"data": data(against(tmp_path, first)), "output_dir": str(tmp_path / "run")}

    @contextmanager
    def begin(*arguments):
        with run_folder(*arguments):
            raise Begun
        yield

    monkeypatch.setattr(module, "run_folder", begin)
    monkeypatch.setattr(module, "set_up_process", lambda **_: None)
    with pytest.raises(Begun):
        module.train(build(run_class, tree, "test"))
    (row,) = json.loads((tmp_path / "run" / DECONTAMINATED).read_text())["dropped"]
    assert row["problem"] == row["test_problem"] == first


def test_sampling_does_not_ask_what_is_tested_and_lists_it(tmp_path):
    problems = load_problems([Source(path="tiny", limit=2)])["problem"]
    generators = [
        {"name": f"of-{n}", "model": {"path": "tiny"}, "data": data(given), "sampling": {"max_tokens": 64}}
        for n, given in enumerate([against(tmp_path, problems[0]), {"against": [{"path": "tiny", "limit": 2}]}])
    ]
    run = build(SampleRun, {"output_dir": str(tmp_path / "run"), "generators": generators,
                            "filters": {"correct": False}}, "test")  # fmt: skip
    dropped: list[dict] = []
    asked = [job.prompts for job in sampling._jobs(run, None, dropped)]
    assert [len(prompts) for prompts in asked] == [63, 62]
    sampling._begin(run, tmp_path / "run", dropped)
    listed = json.loads((tmp_path / "run" / DECONTAMINATED).read_text())["dropped"]
    assert [row["problem"] for row in listed] == [problems[0], *problems]
