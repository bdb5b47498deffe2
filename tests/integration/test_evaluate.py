"""Scores and their intervals, and the launcher that prints them."""

import json

from conftest import ROOT, launch


def test_launcher(tmp_path):
    output = tmp_path / "scores.json"
    small = ("--data.sources.0.limit", "40", "--sampling.samples", "2", "--output", output)
    done = launch("evaluate.py", *small)
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert json.loads(done.stdout) == result
    for mode, samples in (("greedy", 1), ("sampled", 2)):
        scores = result[mode]
        assert scores["problems"] == 40 and scores["samples"] == samples
        low, high = scores["ci95"]
        assert 0 <= low <= scores["accuracy"] <= high <= 1
    again = launch("evaluate.py", *small)
    assert json.loads(again.stdout) == result


def test_answers_that_no_verifier_can_read_are_refused(tmp_path):
    rows = tmp_path / "rows.jsonl"
    answer = "see the appendix of the second volume"
    rows.write_text("".join(json.dumps({"q": f"{n}?", "a": answer}) + "\n" for n in range(3)))
    source = f"[{{path: {rows}, problem: q, answer: a}}]"
    done = launch("evaluate.py", "--data.sources", source, "--output", tmp_path / "scores.json")
    assert done.returncode == 2 and "no gold answer parses" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "scores.json").exists()


def test_a_dry_run_loads_no_weights(tmp_path):
    config = ROOT / "configs/recipes/qwen2.5-0.5b/evaluate.yaml"
    done = launch("evaluate.py", "--config", config, "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "494,032,768 parameters" in done.stdout
