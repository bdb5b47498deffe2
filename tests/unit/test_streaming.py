"""Streamed sources: the first rows of files, folders and saved datasets, and nothing read beyond them."""

import json

import pytest
from datasets import Dataset, DatasetDict

from r1dist.config import GRPORun, Source
from r1dist.config.loader import build
from r1dist.config.tree import may_change
from r1dist.data.reading import read
from r1dist.errors import UserError

ROWS = [{"q": f"{n}?", "a": n, "turns": [{"role": "user", "content": str(n)}]} for n in range(50)]


def jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def stored(tmp_path, how: str) -> str:
    rows = Dataset.from_list(ROWS)
    match how:
        case "jsonl":
            return jsonl(tmp_path / "rows.jsonl", ROWS)
        case "json":
            (tmp_path / "rows.json").write_text(json.dumps(ROWS))
            return str(tmp_path / "rows.json")
        case "parquet":
            rows.to_parquet(tmp_path / "rows.parquet")
            return str(tmp_path / "rows.parquet")
        case "folder":
            jsonl(tmp_path / "train-0.jsonl", ROWS[:4])
            jsonl(tmp_path / "train-1.jsonl", ROWS[4:])
        case "saved":
            rows.save_to_disk(tmp_path)
        case "splits":
            DatasetDict({"train": rows}).save_to_disk(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize("how", ["jsonl", "json", "parquet", "folder", "saved", "splits"])
def test_the_first_rows_are_those_that_would_be_read_otherwise(tmp_path, how):
    path = stored(tmp_path, how)
    streamed, whole = read(Source(path=path, limit=6, stream=True)), read(Source(path=path, limit=6))
    assert list(streamed) == list(whole) == ROWS[:6] and streamed.features == whole.features
    assert len(read(Source(path=path, limit=999, stream=True))) == 50


@pytest.mark.parametrize("how", ["jsonl", "folder"])
def test_data_that_changed_are_read_again(tmp_path, how):
    source = Source(path=stored(tmp_path, how), limit=1, stream=True)
    assert read(source)["q"] == ["0?"]
    jsonl(tmp_path / ("rows.jsonl" if how == "jsonl" else "train-0.jsonl"), [{**ROWS[0], "q": "new?"}] * 4)
    assert read(source)["q"] == ["new?"]


def test_what_follows_is_not_read(tmp_path):
    row = json.dumps({**ROWS[0], "q": "?" * 2**20}) + "\n"
    path = tmp_path / "rows.jsonl"
    path.write_text(row * 40 + "broken\n")
    assert len(read(Source(path=str(path), limit=2, stream=True))) == 2
    with pytest.raises(UserError, match="no readable jsonl file"):
        read(Source(path=str(path), limit=2))


def test_what_cannot_be_streamed_is_refused_in_the_words_of_other_sources(tmp_path, small_grpo):
    def refused(message, **fields):
        with pytest.raises(UserError, match=message) as error:
            read(Source(limit=2, stream=True, **fields))
        assert len(str(error.value).splitlines()) <= 2

    refused("`stream` is of what is stored; tiny is generated", path="tiny")
    refused("the hub does not give it", path="nobody/nothing")
    refused("there is no file", path=str(tmp_path / "rows.jsonl"))
    (tmp_path / "rows.jsonl").write_text("no json\n")
    refused("is no readable jsonl file", path=str(tmp_path / "rows.jsonl"))
    (tmp_path / "empty.json").write_text("[]")
    refused("empty.json", path=str(tmp_path / "empty.json"))
    refused("nope", path=stored(tmp_path / "more", "splits"), split="nope")
    (tmp_path / "folder").mkdir()
    refused("`split` nope: .*train", path=stored(tmp_path / "folder", "folder"), split="nope")
    with pytest.raises(UserError, match=r"run.yaml: `data.sources.0.stream` needs `limit`"):
        build(GRPORun, {**small_grpo, "data": {"sources": [{"path": "x/y", "stream": True}]}}, "run.yaml")


def test_how_rows_are_read_may_change():
    assert may_change(GRPORun, "data.sources.0.stream") and not may_change(GRPORun, "data.sources.0.limit")
