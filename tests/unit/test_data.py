"""Real files become rows; what cannot be used is counted, and refused when it is too much."""

import json
import logging

import pytest
from conftest import GSM8K, ROOT
from datasets import Dataset

from r1dist.config import Data, GRPORun, Model, SFTRun, Source
from r1dist.config.loader import parse
from r1dist.data.prompts import completion_dataset, prompt_dataset
from r1dist.data.sources import load_conversations, load_problems
from r1dist.data.templates import INSTRUCTION, load_template
from r1dist.errors import UserError

ROWS = [{"q": f"What is {n}+1?", "a": f"#### {n + 1}"} for n in range(10)]
GSM8K_SOURCE = {"problem": "question", "answer": "answer", "answer_format": "hashes"}


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K does not lie beside this checkout, in ../shared/data")
@pytest.mark.parametrize(("split", "count"), [("train", 7473), ("test", 1319)])
def test_gsm8k_whole(split, count):
    rows = load_problems([Source(path=str(GSM8K / f"{split}.jsonl"), **GSM8K_SOURCE)])
    assert len(rows) == count
    assert all("####" not in answer for answer in rows["answer"])
    if split == "train":
        assert rows[0]["answer"] == "72" and rows[0]["problem"].startswith("Natalia sold clips")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "folder"])
def test_local_sources(tmp_path, kind):
    if kind == "parquet":
        path = str(tmp_path / "rows.parquet")
        Dataset.from_list(ROWS).to_parquet(path)
    else:
        path = jsonl(tmp_path / "train.jsonl", ROWS)
    source = Source(path=str(tmp_path) if kind == "folder" else path, problem="q", answer="a", answer_format="hashes")
    assert load_problems([source])["answer"] == [str(n + 1) for n in range(10)]
    source.limit = 3
    assert len(load_problems([source, source])) == 6


def test_a_missing_column_lists_those_that_are_there(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(UserError, match=r"no column `question` \(`problem`\)\.\nIt has q, a"):
        load_problems([Source(path=path, problem="question", answer="a")])
    with pytest.raises(UserError, match="needs `answer`; its columns are q, a"):
        load_problems([Source(path=path, problem="q")])


def test_an_empty_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no rows"):
        load_problems([Source(path=jsonl(tmp_path / "rows.jsonl", []), problem="q", answer="a")])


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"q": "1", "a": "1"}\n{"q": "2", "a"\n')
    with pytest.raises(UserError, match=r"rows.jsonl is no readable jsonl file: "):
        load_problems([Source(path=str(tmp_path / "rows.jsonl"), problem="q", answer="a")])


def test_rows_without_an_answer_are_counted_and_refused_as_a_majority(tmp_path, caplog):
    rows = [*ROWS[:6], *({"q": "?", "a": "no answer here"} for _ in range(4))]
    source = Source(path=jsonl(tmp_path / "rows.jsonl", rows), problem="q", answer="a", answer_format="hashes")
    with caplog.at_level(logging.WARNING):
        assert len(load_problems([source])) == 6
    assert "left out 4 of 10 rows" in caplog.text
    source.path = jsonl(tmp_path / "worse.jsonl", rows[3:])
    with pytest.raises(UserError, match="4 of 7 rows cannot be used: 4 with no answer in column `a` read as `hashes`"):
        load_problems([source])


def test_a_row_may_have_several_right_answers(tmp_path):
    listed = [{"q": "?", "a": ["1/2", " 0.5 "]}, {"q": "?", "a": [None, "3"]}, {"q": "?", "a": []}]
    sources = [
        Source(path=jsonl(tmp_path / "listed.jsonl", listed), problem="q", answer="a"),
        Source(path=jsonl(tmp_path / "plain.jsonl", ROWS[:1]), problem="q", answer="a", answer_format="hashes"),
    ]
    assert load_problems(sources)["answer"] == [["1/2", "0.5"], ["3"], ["1"]]
    assert load_problems(sources[1:])["answer"] == ["1"]


def test_prompts_that_do_not_fit_are_dropped_and_counted(tmp_path, template, caplog):
    rows = [*ROWS, {"q": "long " * 200, "a": "#### 1"}]
    source = Source(path=jsonl(tmp_path / "rows.jsonl", rows), problem="q", answer="a", answer_format="hashes")
    data = Data(sources=[source])
    with caplog.at_level(logging.WARNING):
        prompts = prompt_dataset(data, template, context=160, completion=60)
    assert len(prompts) == 10 and prompts["prompt_id"] == list(range(10))
    assert "dropped 1 of 11 prompts" in caplog.text
    with pytest.raises(UserError, match="none of the 11 prompts fits"):
        prompt_dataset(data, template, context=160, completion=159)


def test_conversations_of_stratos_shape(tmp_path, caplog):
    thought = "<|begin_of_thought|>{}<|end_of_thought|>\n\n<|begin_of_solution|>2<|end_of_solution|>"
    rows = [
        {"system": "s", "conversations": [{"from": "user", "value": "1+1"}, {"from": "assistant", "value": text}]}
        for text in (thought.format("t"), thought.format("long " * 300), thought.format("u"), "no marks")
    ]
    run = parse(SFTRun, ["--config", str(ROOT / "configs/recipes/qwen2.5-0.5b/sft.yaml")])
    run.data.sources[0].path = jsonl(tmp_path / "rows.jsonl", rows)
    template = load_template(Model(path="tiny"), run.data.template)
    with caplog.at_level(logging.WARNING):
        dataset = completion_dataset(run.data, template, max_length=400)
    assert "left out 1 of 4 rows" in caplog.text and "dropped 1 of 3 rows" in caplog.text
    row = dataset[1]
    prompt = row["completion_mask"].index(1)
    decode = template.tokenizer.decode
    assert decode(row["input_ids"][prompt:]) == "<think>u</think>\n<answer>2</answer><|im_end|>\n"
    assert (
        f"system\n{INSTRUCTION}<|im_end|>" in decode(row["input_ids"][:prompt])
        and min(row["completion_mask"][prompt:]) == 1
    )
    assert load_conversations([Source(path="tiny", limit=5)])["completion"][0].startswith("<think>")


def test_numina_shape(tmp_path):
    run = parse(GRPORun, ["--config", str(ROOT / "configs/recipes/qwen2.5-0.5b/r1_zero.yaml")])
    rows = [{"problem": "p", "solution": rf"so \boxed{{{n}}}", "messages": []} for n in range(4)]
    run.data.sources[0].path = jsonl(tmp_path / "rows.jsonl", rows)
    assert load_problems(run.data.sources)["answer"] == ["0", "1", "2", "3"]
