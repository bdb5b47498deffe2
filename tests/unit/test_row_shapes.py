"""The shapes of rows that public data sets have, and rows that cannot be used: left out by name, never a traceback."""

import json
import logging

import pytest
from conftest import GSM8K
from datasets import Dataset, DatasetDict, load_dataset

from r1dist.config import Data, GRPORun, Model, Source
from r1dist.config.loader import parse
from r1dist.data.formats import gold_answer
from r1dist.data.prompts import completion_dataset, prompt_dataset
from r1dist.data.sources import load_conversations, load_labels, load_pairs, load_problems
from r1dist.data.templates import load_template
from r1dist.errors import UserError
from r1dist.rewards.math.accuracy import accuracy


def turn(role: str, content) -> dict:
    return {"role": role, "content": content}


SYSTEM = r"\left\{\begin{array}{c} 1 \\ 2 \end{array}\right."
USER, REPLY = turn("user", "1+1?"), turn("assistant", "2")
ASKED = [USER]
LONGER = [turn("system", "Be short."), turn("user", "1+0?"), turn("assistant", "1"), USER]


def jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def problems(tmp_path):
    """The problems of rows, read as a source with those fields."""

    def load(rows, **fields):
        return load_problems([Source(path=jsonl(tmp_path / "rows.jsonl", rows), **fields)])

    return load


@pytest.fixture
def conversations(tmp_path):
    def load(rows, **fields):
        return load_conversations([Source(path=jsonl(tmp_path / "rows.jsonl", rows), **fields)])

    return load


def test_a_prompt_may_be_a_conversation(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"prompt": ASKED, "answer": "2"}, {"prompt": LONGER, "answer": 2}])

    def prompts(template):
        data = Data(sources=[Source(path=path, problem="prompt", answer="answer")], template=template)
        return prompt_dataset(data, load_template(Model(path="tiny"), template), 4096, 8)

    chat = prompts("chat")
    assert chat["prompt"] == [ASKED, LONGER]
    assert chat["answer"] == ["2", "2"] and chat["problem"] == ["1+1?", "1+1?"]
    assert chat["prompt_length"][1] > chat["prompt_length"][0]
    instructed = prompts("r1_zero_chat")[1]["prompt"]
    assert instructed[0]["content"] != "Be short." and instructed[1:] == LONGER[1:]
    assert prompts("r1_zero")[1]["prompt"].endswith(" User: 1+0?. Assistant: 1 User: 1+1?. Assistant:")


def test_a_dot_leads_to_an_inner_column(problems, conversations, tmp_path):
    rows = [
        {
            "prompt": ASKED,
            "reward_model": {"style": "rule", "ground_truth": str(n)},
            "extra": {"system": "s", "a.b": n},
        }
        for n in range(3)
    ]
    found = problems(rows, problem="prompt", answer="reward_model.ground_truth", system="extra.system")
    assert found["answer"] == ["0", "1", "2"] and found["system"] == ["s"] * 3
    assert problems(rows, problem="prompt", answer="extra.a.b")["answer"] == ["0", "1", "2"]
    deep = [{"q": "?", "r": {"in": {"gold": n, **({"more": n} if n else {})}}} for n in range(3)]
    assert problems(deep, problem="q", answer="r.in.gold")["answer"] == ["0", "1", "2"]
    listed = [{"q": "?", "r": {"golds": ["1", "2"], "tests": [{"stdin": "1"}], "language": "cpp"}}]
    found = problems(listed, problem="q", answer="r.golds", tests="r.tests", language="r.language", kind="code")[0]
    assert found["answer"] == ["1", "2"] and found["tests"] == '[{"stdin": "1"}]' and found["language"] == "cpp"
    talk = [{"d": {"turns": [USER, REPLY], "q": "1+1?", "r": "2"}}]
    inner = conversations(talk, problem="d.q", completion="d.r")
    assert inner[0] == conversations(talk, conversation="d.turns")[0]
    pairs = [{"d": {"q": "?", "good": "yes", "bad": "no", "ok": 1}}]
    path = jsonl(tmp_path / "pairs.jsonl", pairs)
    assert load_pairs([Source(path=path, problem="d.q", chosen="d.good", rejected="d.bad")])[0]["chosen"] == "yes"
    assert load_labels([Source(path=path, problem="d.q", completion="d.good", label="d.ok")])["label"] == [1]


@pytest.mark.parametrize("rest", [{}, {"more": 1}], ids=["a struct", "values of several shapes"])
@pytest.mark.parametrize("column", ["reward_model.gold", "reward_model.ground_truth.x", "answer"])
def test_a_missing_inner_column_lists_those_that_are_there(problems, rest, column):
    rows = [{"prompt": "?", "reward_model": {"ground_truth": "1", "style": "rule"}}, {"prompt": "?"} | {
        "reward_model": {"ground_truth": "2", "style": "rule", **rest}}]  # fmt: skip
    there = "prompt, reward_model.ground_truth, reward_model.style"
    with pytest.raises(UserError, match=rf"no column `{column}` \(`answer`\)[.;].*\nIt has {there}"):
        problems(rows, problem="prompt", answer=column)


@pytest.mark.parametrize("field", ["system", "tests", "language"])
def test_columns_of_further_fields_must_be_there_too(problems, field):
    with pytest.raises(UserError, match=rf"no column `nowhere` \(`{field}`\)\.\nIt has q, a"):
        problems([{"q": "?", "a": "1"}], problem="q", answer="a", **{field: "nowhere"})


def test_a_problem_may_be_several_columns(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"Body": "Two.", "Question": "Twice?", "Answer": 4.0},
                                           {"Body": "", "Question": "Half of 2?", "Answer": 1.0}])  # fmt: skip
    words = ["--output_dir", str(tmp_path), "--model.path", "tiny", "--data.sources"]
    given = f"[{{path: {path}, problem: [Body, Question], answer: Answer}}]"
    run = parse(GRPORun, [*words, given])
    rows = load_problems(run.data.sources)
    assert rows["problem"] == ["Two.\nTwice?", "Half of 2?"] and rows["answer"] == ["4", "1"]
    run = parse(GRPORun, [*words, given, "--data.sources.0.problem", "[Body, Nowhere]"])
    with pytest.raises(UserError, match=r"no column `Nowhere` \(`problem`\)"):
        load_problems(run.data.sources)
    assert parse(GRPORun, [*words, given, "--data.sources.0.problem", "Body"]).data.sources[0].problem == "Body"


@pytest.mark.parametrize("golds", [[14.0, 7.5, -0.0], [14, 7, 0], [True, False, True], [10**15, 2.5, 1e-7]])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_answers_may_be_numbers(tmp_path, golds, kind):
    rows = [{"q": "?", "a": gold} for gold in golds]
    path = str(tmp_path / "rows.parquet")
    if kind == "parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        path = jsonl(tmp_path / "rows.jsonl", rows)
    answers = load_problems([Source(path=path, problem="q", answer="a")])["answer"]
    for gold, answer in zip(golds, answers, strict=True):
        said = str(gold) if isinstance(gold, bool) else f"{gold:.7f}".rstrip("0").rstrip(".")
        assert accuracy(said, {"answer": answer}) == 1, (gold, answer, said)
    assert answers[0] in ("14", "True", str(10**15))


def test_mixed_and_missing_numbers(problems, caplog):
    rows = [{"q": "?", "a": "1/2"}, {"q": "?", "a": 14}, {"q": "?", "a": 2.0}, {"q": "?", "a": None}]
    assert problems(rows, problem="q", answer="a")["answer"] == ["1/2", "14", "2"]
    assert "left out 1 of 4 rows: 1 with no answer in column `a` read as `plain`" in caplog.text


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        (r"\boxed {72}", "72"),
        (r"so $\boxed 5$.", "5"),
        (r"so \boxed 5.", "5"),
        (r"\boxed5", "5"),
        (r"\boxed\frac{1}{2}", r"\frac{1}{2}"),
        (r"\fbox{7}", "7"),
        ("\\boxed\n{8}", "8"),
        (rf"\boxed{{{SYSTEM}}}", SYSTEM),
        (r"\boxed{x \in \{1, 2\}} done", r"x \in \{1, 2\}"),
        (r"\boxed{1}, or rather \boxed{2}", "2"),
        (r"\boxed{1} or \boxed{\frac{1}", None),
        (r"\boxed{}", None),
        (r"\boxed", None),
    ],
)  # fmt: skip
def test_boxes_are_found_however_they_are_written(text, gold):
    assert gold_answer(text, "boxed") == gold
    if gold is not None and "begin" not in gold and "rather" not in text:
        assert accuracy(text, {"answer": gold}) == 1


def saved(tmp_path, kind):
    rows = Dataset.from_list([{"q": "1+1", "a": 2.0}, {"q": "2+2", "a": 4.0}])
    folder = tmp_path / "saved"
    (rows if kind == "Dataset" else DatasetDict(easy=rows, hard=rows.select([1]))).save_to_disk(folder)
    return folder


def test_a_folder_of_save_to_disk(tmp_path):
    folder = saved(tmp_path, "Dataset")
    files = sorted(folder.rglob("*"))
    assert load_problems([Source(path=str(folder), problem="q", answer="a")])["answer"] == ["2", "4"]
    assert sorted(folder.rglob("*")) == files  # nothing is left there


def test_a_folder_of_save_to_disk_with_splits(tmp_path):
    folder = str(saved(tmp_path, "DatasetDict"))
    assert load_problems([Source(path=folder, problem="q", answer="a", split="hard")])["answer"] == ["4"]
    with pytest.raises(UserError, match="has no split `train`; it has easy, hard"):
        load_problems([Source(path=folder, problem="q", answer="a")])


def test_a_split_that_was_cut_out_of_another_is_what_it_is_called(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"q": "?", "a": n} for n in range(8)])
    rows = load_dataset("json", data_files=path, split="train[:6]")
    rows.train_test_split(test_size=2, shuffle=False).save_to_disk(tmp_path / "both")
    rows.save_to_disk(tmp_path / "one")
    source = Source(path=str(tmp_path / "both"), problem="q", answer="a", split="test")
    assert load_problems([source])["answer"] == ["4", "5"]
    assert len(load_problems([Source(path=str(tmp_path / "one"), problem="q", answer="a")])) == 6


def test_the_split_of_a_saved_dataset_is_not_taken_for_another(tmp_path):
    path = jsonl(tmp_path / "test.jsonl", [{"q": "?", "a": "1"}])
    load_dataset("json", data_files={"test": path}, split="test").save_to_disk(tmp_path / "saved")
    source = Source(path=str(tmp_path / "saved"), problem="q", answer="a", split="test")
    assert len(load_problems([source])) == 1
    source.split = "train"
    with pytest.raises(UserError, match="has no split `train`; it has test"):
        load_problems([source])


def test_a_missing_split_or_subset_names_those_that_are_there(tmp_path):
    jsonl(tmp_path / "test.jsonl", [{"q": "?", "a": "1"}])
    for fields, named in (({}, r"'test'"), ({"split": "test", "subset": "main"}, "'default'")):
        with pytest.raises(UserError, match=named):
            load_problems([Source(path=str(tmp_path), problem="q", answer="a", **fields)])
    with pytest.raises(UserError, match="tiny has no split `validation`; it has train, test"):
        load_problems([Source(path="tiny", split="validation")])


def test_what_cannot_be_read_is_refused(tmp_path):
    def refused(path, why):
        with pytest.raises(UserError, match=why):
            load_problems([Source(path=str(path), problem="q", answer="a")])

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no rows")
    (tmp_path / "rows.txt").write_text("a")
    refused(tmp_path / "rows.txt", "is no .jsonl, .json, .parquet file")
    (tmp_path / "rows.parquet").write_text("none")
    refused(tmp_path / "rows.parquet", "is no readable parquet file")
    refused(tmp_path / "nowhere" / "rows", "is no local file or folder")
    (tmp_path / "rows.jsonl").write_bytes(b'{"q": "\xff", "a": 1}\n')
    refused(tmp_path / "rows.jsonl", "1 with text that is not UTF-8")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "train.jsonl").write_text('{"q": ')
    refused(tmp_path / "damaged", "is not readable")


BAD_TURNS = {
    "a turn of the role `tool`": [USER, turn("tool", "x"), REPLY],
    "a turn of the role `function`": [USER, turn("function", "x"), REPLY],
    "a turn of the role `developer`": [turn("developer", "x"), USER, REPLY],
    "a turn of the role `model`": [USER, turn("model", "2")],
    "a turn of the role `bot`": [USER, turn("bot", "2")],
    "no turns": [],
    "an empty turn": [USER, turn("assistant", "")],
    "no reply of the assistant at the end": [USER, REPLY, USER],
    "no turn of the user before the completion": [REPLY],
    "a turn that is no text": [USER, turn("assistant", [{"type": "image", "text": None}])],
}


@pytest.mark.parametrize("reason", BAD_TURNS)
@pytest.mark.parametrize("template", ["chat", "r1_zero"])
def test_one_bad_conversation_among_40_is_left_out_by_name(tmp_path, caplog, reason, template):
    rows = [*({"messages": [USER, REPLY]} for _ in range(39)), {"messages": BAD_TURNS[reason]}]
    source = Source(path=jsonl(tmp_path / "rows.jsonl", rows), conversation="messages")
    loaded = load_template(Model(path="tiny"), template)
    with caplog.at_level(logging.WARNING):
        assert len(completion_dataset(Data(sources=[source], template=template), loaded, 400)) == 39
    assert f"left out 1 of 40 rows: 1 with {reason}" in caplog.text
    source.path = jsonl(tmp_path / "worse.jsonl", rows[-1:])
    with pytest.raises(UserError, match=f"1 of 1 rows cannot be used: 1 with {reason}"):
        load_conversations([source])


@pytest.mark.parametrize("bad", [None, [None], ["text"], [{"content": "x"}], [turn("user", None), REPLY]], ids=str)
def test_what_is_no_conversation_is_left_out(conversations, bad):
    rows = [*({"messages": [USER, REPLY]} for _ in range(3)), {"messages": bad}]
    assert len(conversations(rows, conversation="messages")) == 3


def test_an_empty_system_turn_is_none(conversations):
    (row,) = conversations([{"messages": [turn("system", ""), USER, REPLY]}], conversation="messages")
    assert row["messages"] == ASKED and row["completion"] == "2"


def test_prompt_and_completion_may_be_turns(conversations):
    (row,) = conversations([{"p": LONGER, "c": [REPLY]}], problem="p", completion="c")
    assert row["messages"] == LONGER and row["completion"] == "2"


@pytest.mark.parametrize("bad", ["", None, [], [USER, REPLY], [REPLY, USER], [turn("tool", "x")]], ids=str)
def test_prompts_that_cannot_be_asked_are_left_out(problems, bad, caplog):
    rows = [*({"p": ASKED, "a": 1} for _ in range(3)), {"p": bad, "a": 1}]
    assert len(problems(rows, problem="p", answer="a")) == 3 and "left out 1 of 4 rows" in caplog.text


@pytest.mark.parametrize(
    "bad",
    [{"chosen": []}, {"chosen": None}, {"chosen": [turn("tool", "x")]}, {"rejected": [USER]}, {"problem": ""},
     {"rejected": [turn("assistant", "")]}],
    ids=str,
)  # fmt: skip
def test_pairs_and_labels_that_cannot_be_used_are_left_out(tmp_path, bad):
    good = {"problem": ASKED, "chosen": [USER, REPLY], "rejected": [turn("assistant", "3")], "label": 1}
    path = jsonl(tmp_path / "rows.jsonl", [*[good] * 39, {**good, **bad}])
    rows = load_pairs([Source(path=path, problem="problem", chosen="chosen", rejected="rejected")])
    assert len(rows) == 39 and rows[0] == {"problem": "1+1?", "chosen": "2", "rejected": "3"}
    judged = "rejected" if "rejected" in bad else "chosen"
    assert len(load_labels([Source(path=path, problem="problem", completion=judged, label="label")])) == 39


@pytest.mark.skipif(not GSM8K.is_dir(), reason="the real data sets do not lie beside this checkout, in ../shared/data")
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("gsm8k/train", {"problem": "question", "answer": "answer", "answer_format": "hashes"}),
        ("gsm8k/test", {"problem": "question", "answer": "answer", "answer_format": "hashes"}),
        ("math500/test", {"problem": "problem", "answer": "answer"}),
        ("math500/test", {"problem": "problem", "answer": "solution", "answer_format": "boxed"}),
        ("mawps/singleop", {"problem": "input", "answer": "target"}),
        ("mawps/addsub", {"problem": "input", "answer": "target"}),
        ("mawps/multiarith", {"problem": "input", "answer": "target"}),
        ("svamp/test", {"problem": ["Body", "Question"], "answer": "Answer"}),
    ],
)
def test_real_data_sets_load_whole(name, fields):
    path = GSM8K.parent / f"{name}.jsonl"
    rows = load_problems([Source(path=str(path), **fields)])
    assert len(rows) == len(path.read_text().splitlines()) > 300 and all(rows["problem"]) and all(rows["answer"])
    if fields["answer"] not in ("solution", "answer"):
        assert not any(answer.endswith(".0") for answer in rows["answer"])
