"""Scores and their intervals, and the launcher that prints them."""

import json
import subprocess
import time

import pytest
from conftest import ROOT, kill_launched, launch, python, write_yaml

from r1dist.files import samples_folder


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
    assert result["sampled"]["pass_at_k"].keys() == {"1", "2"}
    assert result["sampled"]["pass_at_k"]["1"] == pytest.approx(result["sampled"]["accuracy"])
    assert result["greedy"]["cons_at_n"] is None


def test_answers_that_no_verifier_can_read_are_refused(tmp_path):
    rows = tmp_path / "rows.jsonl"
    answer = "see the appendix of the second volume"
    for readable, refusal in (0, "no gold answer parses"), (1, "67% of the answers cannot be scored"):
        answers = ["7"] * readable + [answer] * (3 - readable)
        rows.write_text("".join(json.dumps({"q": f"{n}?", "a": a}) + "\n" for n, a in enumerate(answers)))
        source = f"[{{path: {rows}, problem: q, answer: a}}]"
        done = launch("evaluate.py", "--data.sources", source, "--output", tmp_path / "scores.json")
        assert done.returncode == 2 and refusal in done.stderr
        assert "Traceback" not in done.stderr and not (tmp_path / "scores.json").exists()


def test_a_dry_run_loads_no_weights(tmp_path):
    config = ROOT / "configs/recipes/qwen2.5-0.5b/evaluate.yaml"
    done = launch("evaluate.py", "--config", config, "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "494,032,768 parameters" in done.stdout


def test_killed_at_any_moment_it_loses_and_repeats_nothing(tmp_path):
    """Two benchmarks from local copies, a program that is judged by its tests, and samples of which each is kept."""
    for name, problem, answer in (("gsm8k", "question", "answer"), ("math500", "problem", "answer")):
        rows = [{problem: f"What is {n} + {n}?", answer: f"so #### {2 * n}" if name == "gsm8k" else str(2 * n)}
                for n in range(1, 25)]  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    program = {"q": "Print 1.", "tests": [{"stdin": "", "stdout": "1"}], "language": "python"}
    (tmp_path / "programs.jsonl").write_text(json.dumps(program) + "\n")
    source = {"path": str(tmp_path / "programs.jsonl"), "problem": "q", "tests": "tests", "language": "language"}
    tree = {
        "model": {"path": "tiny"},
        "benchmarks": [
            *({"name": name, "path": str(tmp_path / f"{name}.jsonl")} for name in ("gsm8k", "math500")),
            {"name": "programs", "sources": [{**source, "kind": "code"}]},
        ],
        "sampling": {"samples": 2, "max_tokens": 24},
        "rollout": {"engine": "transformers", "batch_size": 8},
    }
    config = write_yaml(tmp_path / "evaluate.yaml", tree)

    def samples(output):
        return {path.name: path.read_text() for path in samples_folder(output).glob("*.jsonl")}

    undisturbed, killed = tmp_path / "undisturbed.json", tmp_path / "killed.json"
    done = launch("evaluate.py", "--config", config, "--output", undisturbed)
    assert done.returncode == 0, done.stderr
    for lines in (3, 40):
        process = subprocess.Popen([python(), "launch/evaluate.py", "--config", config, "--output", killed], cwd=ROOT)
        while sum(text.count("\n") for text in samples(killed).values()) < lines and process.poll() is None:
            time.sleep(0.01)
        kill_launched()
        process.wait()
        assert not killed.exists()
    done = launch("evaluate.py", "--config", config, "--output", killed)
    assert done.returncode == 0, done.stderr
    assert samples(killed) == samples(undisturbed) and len(samples(killed)) == 6
    assert json.loads(killed.read_text()) == json.loads(undisturbed.read_text())
    assert json.loads(done.stdout)["benchmarks"]["programs"]["sampled"]["cons_at_n"] is None
    other = launch("evaluate.py", "--config", config, "--output", killed, "--sampling.temperature", "0.5")
    assert other.returncode == 2 and "sampling.temperature was 1.0, is 0.5" in other.stderr
