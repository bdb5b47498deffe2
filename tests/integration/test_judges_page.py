"""docs/judges.md: its example runs as it stands against a server, survives an outage, and asks nothing twice."""

import json
import re

from conftest import ROOT, launch
from judge_stub import JudgeStub

PAGE = (ROOT / "docs" / "judges.md").read_text(encoding="utf-8")
KEY = "a-key-that-is-secret"


def traces(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "traces/rank0.jsonl").read_text().splitlines()]


def test_the_pages_example_runs_stops_at_an_outage_and_goes_on_with_the_same_scores(tmp_path, monkeypatch):
    config = tmp_path / "judges.yaml"
    config.write_text(re.search(r"`judges.yaml`:\n\n```yaml\n(.*?)```", PAGE, re.DOTALL)[1])
    words = ["--config", config, "--resume", "auto"]
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)
    refused = launch("grpo.py", *words, "--dry_run")
    assert refused.returncode == 2 and "the environment has no variable JUDGE_API_KEY" in refused.stderr
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    refused = launch("grpo.py", *words, "--dry_run", "--rewards.judge.rubric", "Look at {completion} and {anwser}.")
    assert refused.returncode == 2 and "`{anwser}`, which rows do not have; did you mean `answer`?" in refused.stderr

    with JudgeStub() as stub:
        at = [word for name in ("judge", "judge_tone") for word in (f"--rewards.{name}.url", stub.url)]
        whole = launch("grpo.py", *words, *at, "--output_dir", tmp_path / "whole")
        assert whole.returncode == 0, whole.stderr
        assert stub.keys.keys() == {f"Bearer {KEY}"}
        questions = stub.questions
        assert len(set(questions)) == len(questions) > 32
    with JudgeStub(most=len(questions) * 3 // 4) as stub:
        at[1::2] = [stub.url] * 2
        words += ["--output_dir", tmp_path / "run"]
        words += ["--rewards.judge.retries", "0", "--rewards.judge_tone.retries", "0"]
        stopped = launch("grpo.py", *words, *at)
        assert stopped.returncode == 3, stopped.stderr
        assert re.search(r"stopped: rewards\.judge\w*, row of prompt_id \d+: .*status 503", stopped.stderr)
        assert "Step 1 is saved" in stopped.stderr
        assert json.loads((tmp_path / "run/ended.json").read_text())["code"] == 3
        before = {*stub.questions[: stub.most]}
    with JudgeStub() as stub:
        at[1::2] = [stub.url] * 2
        resumed = launch("grpo.py", *words, *at)
        assert resumed.returncode == 0, resumed.stderr
        assert stub.questions and not before & set(stub.questions)
    assert traces(tmp_path / "run") == traces(tmp_path / "whole")
    for file in (tmp_path / "run").rglob("*"):
        assert file.is_dir() or KEY.encode() not in file.read_bytes(), file
    assert KEY not in whole.stderr + whole.stdout + stopped.stderr + resumed.stderr
