"""Goals of a recipe against what was measured."""

import pytest

from r1dist.config.pipeline import Goal
from r1dist.pipeline.goals import judge


def scores(value, low, high):
    return {"eval": {"accuracy": value, "ci95": [low, high], "format": value}, "requests": {"safety": value}}


STAGES = {
    "low": scores(0.5, 0.45, 0.55),
    "middle": scores(0.58, 0.54, 0.62),
    "high": scores(0.7, 0.66, 0.74),
    "silent": {"eval": {"accuracy": None, "ci95": None, "format": 0.1}},
}


@pytest.mark.parametrize(
    ("stage", "bound", "met"),
    [
        ("high", {"above": "low"}, True),
        ("middle", {"above": "low"}, False),  # above, but the intervals touch
        ("high", {"above": "low", "by": 0.19}, True),
        ("high", {"above": "low", "by": 0.21}, False),
        ("middle", {"above": "low", "by": 0.05}, False),
        ("low", {"above": "high"}, False),
        ("low", {"below": "high"}, True),
        ("middle", {"below": "high"}, True),
        ("low", {"below": "middle"}, False),
        ("middle", {"not_below": "high"}, False),
        ("middle", {"not_below": "high", "within": 0.13}, True),
        ("low", {"not_below": "middle"}, False),
        ("high", {"not_below": "high"}, True),
        ("high", {"at_least": 0.7}, True),
        ("high", {"at_least": 0.71}, False),
    ],
)
def test_goals_of_scores_with_intervals(stage, bound, met):
    judged = judge(Goal(stage=stage, score="eval.accuracy", **bound), STAGES)
    assert judged["met"] is met and judged["stage"] == stage


def test_what_a_goal_says_holds_both_numbers():
    judged = judge(Goal(stage="high", score="eval.accuracy", above="low", note="So."), STAGES)
    assert judged["text"] == "high: accuracy 70.0 % [66.0 %, 74.0 %], above low's 50.0 % [45.0 %, 55.0 %]"
    assert judged["note"] == "So."
    judged = judge(Goal(stage="middle", score="requests.safety", above="low"), STAGES)
    assert judged == {"stage": "middle", "text": "middle: requests safety 0.58, above low's 0.5", "met": True}


def test_a_goal_may_be_of_a_benchmark():
    part = {"cons_at_n": 0.75, "cons_at_n_ci95": [0.7, 0.8]}
    stages = {"high": {"benchmarks": {"math500": {"sampled": part}}}}
    judged = judge(Goal(stage="high", score="benchmarks.math500.sampled.cons_at_n", at_least=0.7), stages)
    assert judged["met"] and judged["text"].endswith("sampled cons at n 75.0 % [70.0 %, 80.0 %], at least 70.0 %")
    assert judge(Goal(stage="high", score="benchmarks.gsm8k.sampled.cons_at_n", at_least=0.7), stages) is None


@pytest.mark.parametrize(
    "goal",
    [
        Goal(stage="silent", score="eval.accuracy", at_least=0.1),
        Goal(stage="high", score="eval.accuracy", above="silent"),
        Goal(stage="nowhere", score="eval.accuracy", at_least=0.1),
        Goal(stage="high", score="sampled.accuracy", at_least=0.1),
    ],
)
def test_what_is_not_measured_is_not_judged(goal):
    assert judge(goal, STAGES) is None
