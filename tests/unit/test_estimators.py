"""pass@k, cons@n and their intervals, against independent references."""

import itertools
import random
from collections import Counter
from statistics import fmean

import pytest

from r1dist.evaluation.consensus import consensus
from r1dist.evaluation.estimators import clustered_interval, pass_at_k, wilson_interval


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


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(samples):
    for right, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        marks = [True] * right + [False] * (samples - right)
        subsets = list(itertools.combinations(marks, k))
        assert pass_at_k(samples, right, k) == pytest.approx(fmean(map(any, subsets)))


@pytest.mark.parametrize(("samples", "k"), [(4, 1), (4, 4), (16, 4)])
@pytest.mark.parametrize("shape", [(1, 2), (0.3, 0.3)])  # problems of all difficulties; mostly solved always or never
def test_the_interval_covers_what_it_says(samples, k, shape):
    rng = random.Random(0)
    truth = 1 - fmean((1 - rng.betavariate(*shape)) ** k for _ in range(200_000))
    covered = 0
    for _ in range(2000):
        rates = []
        for _ in range(60):
            difficulty = rng.betavariate(*shape)
            right = sum(rng.random() < difficulty for _ in range(samples))
            rates.append(pass_at_k(samples, right, k))
        low, high = clustered_interval(rates)
        covered += low <= truth <= high
    assert 0.93 <= covered / 2000 <= 0.97


def sampled(text: str, right: bool, finished: bool = True) -> dict:
    return {"text": text, "accuracy": float(right), "finished": finished}


def test_the_majority_is_by_equal_answers_not_by_equal_texts(pool):
    half = [sampled(f"<think>so</think>\n<answer>{text}</answer>", True) for text in ("1/2", "0.5", r"\frac{1}{2}")]
    third = [sampled(f"It is <answer>{text}</answer>", False) for text in ("1/3", "1/3")]
    problems = [third + half, half[:1] + third, half[:2] + third, third[:1] + half[:1]]
    assert consensus(problems, pool) == [1, 0, 0.5, 0.5]


def test_what_gives_no_answer_has_no_vote(pool):
    cut_off = [sampled("<think>on and on", False, finished=False)] * 3
    silent = [sampled("<think>I do not know.</think>", False)] * 3
    assert consensus([cut_off + silent + [sampled("7", True)], cut_off], pool) == [1, 0]


def test_words_that_are_no_gold_answer_are_compared_as_texts(pool):
    said = "see the appendix of the second volume"
    assert consensus([[sampled(said, True)] * 2 + [sampled("7", False)]], pool) == [1]


def test_the_majority_agrees_with_a_count_of_texts_on_random_numbers(pool):
    rng = random.Random(0)
    problems = [[rng.choice("1234") for _ in range(rng.randint(1, 9))] for _ in range(40)]

    def reference(answers: list[str]) -> float:
        counts = Counter(answers)
        first = [answer for answer, count in counts.items() if count == max(counts.values())]
        return first.count("3") / len(first)

    given = [[sampled(f"<answer>{answer}</answer>", answer == "3") for answer in answers] for answers in problems]
    assert consensus(given, pool) == pytest.approx([reference(answers) for answers in problems])
