"""Prompts that are always or never solved give way, from the second epoch on, to those in between."""

from collections import Counter
from itertools import chain

import pytest
from trl.trainer.utils import RepeatSampler

from r1dist.config import GRPORun
from r1dist.config.loader import build
from r1dist.data.curriculum import PassRateFilter, filter_by_pass_rate, pass_rates
from r1dist.data.order import PromptOrder
from r1dist.errors import UserError

PROMPTS, GENERATION, GROUP, REPEATS = 12, 4, 2, 3


def row(prompt: int, step: int, score: float | None) -> dict:
    return {"prompt_id": prompt, "step": step, "rewards": {"accuracy": score, "format": 1.0}}


def test_a_pass_rate_is_of_the_last_time_before_the_epoch():
    rows = [row(7, 2, 1.0), row(7, 2, 0.0), row(7, 0, 0.0), row(7, 4, 0.0), row(8, 1, None), row(9, 0, 1.0)]
    for order in (rows, rows[::-1]):
        assert pass_rates(order, before=4) == {7: 0.5, 9: 1.0}
    assert pass_rates(rows, before=5) == {7: 0.0, 9: 1.0}
    assert pass_rates([{"prompt_id": 1, "step": 0, "rewards": {"code": 1.0}}], before=5) == {}
    marks = [{"prompt_id": 1, "step": 0, "rewards": {"task": mark}} for mark in (1.0, 0.5, None)]
    assert pass_rates(marks, before=5) == {1: 0.5}


def test_prompts_of_unknown_rate_are_neither_kept_nor_dropped():
    rates = {100: 0.0, 101: 0.2, 102: 0.8, 103: 1.0}
    kept = filter_by_pass_rate(rates, [104, 103, 102, 101, 100], 0.2, 0.8)
    assert kept == PassRateFilter((2, 3), frozenset({1, 4}))


def order_of(epoch: int, kept: PassRateFilter) -> list[list[int]]:
    """The prompts of each generation of an epoch."""
    order = PromptOrder(RepeatSampler(range(PROMPTS), GROUP, GENERATION, REPEATS, seed=5))
    order.set_epoch(epoch)
    order.pass_rate_filter = kept
    places = list(order)
    assert len(places) == len(order) == PROMPTS * GROUP * REPEATS and order.generations == PROMPTS // GENERATION
    each = GENERATION * GROUP * REPEATS
    generations = [places[start : start + each] for start in range(0, len(places), each)]
    for generation in generations:
        assert set(Counter(generation).values()) == {GROUP * REPEATS}
        assert generation == generation[: GENERATION * GROUP] * REPEATS
    return [list(dict.fromkeys(generation)) for generation in generations]


def test_dropped_prompts_are_replaced_and_none_is_asked_twice_in_a_generation():
    kept = PassRateFilter(tuple(range(5)), frozenset({5, 6, 7, 8, 9}))
    plain, found = order_of(1, PassRateFilter()), order_of(1, kept)
    assert found == order_of(1, kept) != order_of(2, kept)
    flat, before = list(chain(*found)), list(chain(*plain))
    assert sorted(before) == list(range(PROMPTS))
    assert not set(flat) & kept.drop and {10, 11} <= set(flat)
    assert all(new == old for new, old in zip(flat, before, strict=True) if old not in kept.drop)
    assert max(Counter(flat).values()) <= 3  # shared out evenly: 5 places for 5 prompts, unless one is there already


def test_none_is_asked_twice_in_an_optimizer_step_of_several_generations():
    """In both, it would draw the same samples."""
    order = PromptOrder(RepeatSampler(range(PROMPTS), GROUP, GENERATION, 1, seed=5), per_step=2)
    order.pass_rate_filter = PassRateFilter(tuple(range(10)), frozenset({10, 11}))
    for epoch in range(20):
        asked = [set(order.generation(epoch * order.generations + number)) for number in range(2)]
        assert not asked[0] & asked[1] and len(asked[0] | asked[1]) == 2 * GENERATION


def test_where_too_few_are_kept_the_dropped_stay():
    kept = PassRateFilter((0,), frozenset(range(1, PROMPTS)))
    assert [generation.count(0) for generation in order_of(1, kept)] == [1, 1, 1]
    assert order_of(1, PassRateFilter((), frozenset(range(PROMPTS)))) == order_of(1, PassRateFilter())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"pass_rate": [0.9, 0.1]}}, r"`train.pass_rate` is \[0.9, 0.1\]; it is \[least, most\]"),
        ({"train": {"pass_rate": [0.1]}}, "train.pass_rate"),
        ({"train": {"pass_rate": [0, 0.9]}, "rewards": {"format": 1}}, "`rewards` has no `accuracy`"),
        (
            {"train": {"pass_rate": [0, 0.9]}, "rollout": {"engine": "vllm", "max_staleness": 1}},
            "an epoch begins before the one before has been scored",
        ),
    ],
)
def test_a_range_that_cannot_be_is_refused(small_grpo, change, message):
    with pytest.raises(UserError, match=message):
        build(GRPORun, {**small_grpo, **change}, "test")
