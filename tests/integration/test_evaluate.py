"""Scores and their intervals, and the launcher that prints them."""

import json
import random
from statistics import fmean

import pytest
from conftest import ROOT, launch

from r1dist.evaluation.intervals import clustered_interval, wilson_interval


def test_wilson_interval_against_known_values():
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for (successes, trials), expected in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert wilson_interval(successes / trials, trials) == pytest.approx(expected, abs=5e-5)


def test_one_sample_a_problem_is_nearly_wilson():
    scores = [1.0] * 30 + [0.0] * 70
    assert clustered_interval(scores) == pytest.approx(wilson_interval(0.3, 100), abs=2e-3)


def test_samples_of_one_problem_count_for_less_than_problems():
    alike = [1.0] * 30 + [0.0] * 70  # every sample of a problem agrees: only 100 trials
    mixed = [0.3] * 50 + [0.25, 0.35] * 25  # problems are all alike: many independent trials
    width = {name: high - low for name, (low, high) in {
        "alike": clustered_interval(alike), "mixed": clustered_interval(mixed)
    }.items()}  # fmt: skip
    assert width["mixed"] < width["alike"] / 2


def test_the_interval_covers_what_it_says():
    rng = random.Random(0)
    covered = 0
    for _ in range(2000):
        truths = [rng.betavariate(1, 2) for _ in range(60)]
        rates = [fmean(rng.random() < truth for _ in range(4)) for truth in truths]
        low, high = clustered_interval(rates)
        covered += low <= 1 / 3 <= high
    assert 0.93 <= covered / 2000 <= 0.97


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
