"""The examples of docs/own_data.md and docs/own_model.md, typed in an empty folder."""

import json

from conftest import metrics
from pages import typed, write_files


def test_own_data(tmp_path):
    write_files("own_data.md", tmp_path)
    _, planned, _, scored = (done for done in typed("own_data.md", tmp_path) if not done.check_returncode())
    assert "max_completion_length: 48" in planned.stdout
    dropped = json.loads((tmp_path / "runs/own_grpo/decontaminated.json").read_text())["dropped"]
    assert [row["problem"] for row in dropped] == ["Compute 3 + 4."]
    assert len(metrics(tmp_path / "runs/own_sft")) == 2 and len(metrics(tmp_path / "runs/own_grpo")) == 2
    traces = [json.loads(line) for line in (tmp_path / "runs/own_grpo/traces/rank0.jsonl").read_text().splitlines()]
    assert len({row["prompt_id"] for row in traces}) == 3  # of four, one is in unseen.jsonl
    assert all(row["rewards"]["accuracy"] is not None for row in traces)
    scores = json.loads((tmp_path / "runs/own_scores.json").read_text())
    assert scores["greedy"]["problems"] == 2 and json.loads(scored.stdout) == scores


def test_own_model(tmp_path):
    write_files("own_model.md", tmp_path)
    _, planned, _, chat = (done for done in typed("own_model.md", tmp_path) if not done.check_returncode())
    assert "lora" in planned.stdout
    assert len(metrics(tmp_path / "runs/my_model_sft")) == 2
    assert chat.stdout.strip()
