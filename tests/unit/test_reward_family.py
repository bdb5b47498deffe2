"""Each reward against its formula written down a second time, and against what others' got wrong."""

import math
import random
import re
import subprocess
import sys
from concurrent.futures import Future

import pytest
from conftest import ROOT

from r1dist.config import GRPORun, Reward
from r1dist.config.loader import build
from r1dist.config.rewards import reward_fields
from r1dist.errors import UserError
from r1dist.rewards import ONE_BY_ONE, VERIFIERS, Rewards
from r1dist.rewards.format import format_reward, soft_format, tag_count
from r1dist.rewards.registry import BUILT_IN, check_rewards
from r1dist.rewards.repetition import repetition
from r1dist.rewards.steps import reasoning_steps

RIGHT, WRONG = "<think>x</think><answer>7</answer>", "<think>x</think><answer>8</answer>"


def rows(tokens: list[int], answer: str | None = "7") -> list[dict]:
    return [{"answer": answer, "kind": "math", "tokens": n, "group_tokens": tokens} for n in tokens]


@pytest.fixture(scope="module")
def scored(pool):
    """Scores by a reward's name and fields."""

    def scores(name: str, texts: list[str], given: list[dict], **fields) -> list[float | None]:
        return Rewards({name: Reward(**reward_fields(fields))}, pool).scorers[name](texts, given)

    return scores


@pytest.mark.parametrize("tokens", [0, 1, 37, 50, 99, 100])
def test_cosine_follows_the_paper(tokens, scored):
    """eta_min + (eta_max - eta_min) (1 + cos(t pi / T)) / 2, the two of them swapped for wrong answers."""

    def paper(eta_min: float, eta_max: float) -> float:
        return eta_min + 0.5 * (eta_max - eta_min) * (1 + math.cos(tokens * math.pi / 100))

    given = rows([tokens, tokens])
    assert scored("cosine", [RIGHT, WRONG], given, max_tokens=100) == pytest.approx([paper(0.5, 1), paper(-0.5, -1)])
    own = scored("cosine", [RIGHT, WRONG], given, max_tokens=100, correct=(2, 1), wrong=(-10, 0))
    assert own == pytest.approx([paper(1, 2), paper(0, -10)])


def test_cosine_stays_where_it_is_beyond_its_length(scored):
    lengths = [100, 101, 150, 200, 1000]
    assert scored("cosine", [RIGHT] * 5, rows(lengths), max_tokens=100) == pytest.approx([0.5] * 5)
    assert scored("cosine", [WRONG] * 5, rows(lengths), max_tokens=100) == pytest.approx([-0.5] * 5)


@pytest.mark.parametrize(("name", "fields"), [("cosine", {"max_tokens": 9}), ("length", {})])
def test_without_a_gold_answer_that_parses_nothing_is_paid_for_length(name, fields, scored):
    assert scored(name, [RIGHT, RIGHT], rows([3, 8], "left to the reader"), **fields) == [None, None]


def test_length_follows_kimi(scored):
    lengths = [10, 25, 30, 40, 40]
    merit = [0.5 - (n - 10) / 30 for n in lengths]
    assert merit == pytest.approx([0.5, 0, -1 / 6, -0.5, -0.5])
    assert scored("length", [RIGHT] * 5, rows(lengths)) == pytest.approx(merit)
    assert scored("length", [WRONG] * 5, rows(lengths)) == pytest.approx([min(0, m) for m in merit])
    assert scored("length", [RIGHT, WRONG], rows([12, 12])) == [0.0, 0.0]


def test_length_counts_the_group_also_where_kinds_leave_rows_out(scored):
    given = [{"answer": "7", "kind": "math", "tokens": 20, "group_tokens": [10, 20, 30, 50]}]
    assert scored("length", [RIGHT], given, kinds=["math"]) == pytest.approx([0.5 - 10 / 40])


@pytest.mark.parametrize(
    ("tokens", "paid"), [(0, 0), (80, 0), (81, -0.05), (90, -0.5), (100, -1), (101, -1), (999, -1)]
)
def test_overlong_follows_dapo(tokens, paid, scored):
    assert scored("overlong", ["any"], rows([tokens]), max_tokens=100, cache_tokens=20) == pytest.approx([paid])


def test_repetition_is_the_share_of_trigrams_seen_before(scored):
    assert scored("repetition", ["a b c a b c"], rows([6])) == pytest.approx([-(1 - 3 / 4)])
    assert repetition("a b c d e f", {}, 3) == 0
    assert repetition("a b", {}, 3) == 0
    assert repetition("so " * 100, {}, 3) == pytest.approx(-(1 - 1 / 98))
    assert repetition("a a a a", {}, 1) == pytest.approx(-3 / 4)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", 0),
        ("It is 3.14 and no more.", 0),
        ("3.14 at the head of a line\n2.5 at another", 0),
        ("the first of them, and next to it the second, is finally here", 0),
        ("Step 1: add", 1),
        ("<think>1. add\n2. carry</think>", 2),
        ("- add\n* carry\n  • write", 3),
        ("First, add. Next carry. Finally, write.", 3),
        ("- Step 1: First, add", 1),
        ("- \n- \n- \n- ", 1),
        ("Step 1: a Step 2: b Step 3: c Step 4: d", 4),
        ("7-3 and 2*4\nso x = 1.", 0),
    ],
)
def test_reasoning_steps_are_counted_by_their_marks(text, steps):
    assert reasoning_steps(text, {}) == pytest.approx(min(1, steps / 3))


@pytest.mark.parametrize(
    ("text", "strict", "soft", "tags"),
    [
        (RIGHT, 1, 1, 1),
        (f"{RIGHT}\nand more", 0, 1, 1),
        (f"well: {RIGHT}", 0, 1, 1),
        ("<think>a</think> so <answer>b</answer><answer>c</answer>", 0, 1, 0.5),
        ("<think>a</think><answer> </answer>", 0, 0, 1),
        ("<think> </think><answer>b</answer>", 0, 0, 1),
        ("<answer>b</answer><think>a</think>", 0, 0, 1),
        ("<think>a<answer>b</answer>", 0, 0, 0.75),
        ("<think>a</think><answer>b", 0, 0, 0.75),
        ("<think><think></think></think>", 0, 0, 0),
        ("<think>" * 50_000, 0, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_three_ways_to_pay_for_the_form(text, strict, soft, tags):
    assert (format_reward(text, {}), soft_format(text, {}), tag_count(text, {})) == (strict, soft, tags)


def test_the_format_is_what_its_expression_matches():
    form = re.compile(r"\A\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*\Z", re.DOTALL)
    pieces = ["<think>", "</think>", "<answer>", "</answer>"]
    rng = random.Random(0)
    kept = 0
    for _ in range(20_000):
        text = "".join(
            piece + rng.choice(["", "", "a", "\n ", " b\n"])
            for piece in (pieces if rng.random() < 0.5 else rng.choices(pieces, k=4))
        )
        found = form.match(text)
        expected = (
            all(text.count(tag) == 1 for tag in pieces) and found and all(part.strip() for part in found.groups())
        )
        assert format_reward(text, {}) == float(bool(expected)), text
        kept += bool(expected)
    assert kept > 500


class Elsewhere:
    """A pool whose workers score at once, whatever they are given."""

    def submit(self, name: str, completion: str, row: dict, **parameters) -> Future:
        done: Future = Future()
        done.set_result(1.0)
        return done


def test_no_reward_costs_the_trainers_thread_much_whatever_the_text(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    from thread_cost import NAMES, hostile_texts, thread_seconds

    for name in NAMES:
        for text in hostile_texts():
            assert thread_seconds(name, text, Elsewhere()) < 0.1, (name, text[:40])  # 10 ms are meant


def test_every_name_has_its_function_and_no_trainer_is_imported():
    assert BUILT_IN.keys() == {*ONE_BY_ONE, *VERIFIERS, "helpfulness", "safety", "judge"}
    code = "import sys, r1dist.rewards; print([m for m in sys.modules if m.startswith('trl.trainer')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


REFUSED = [
    ({"cosine": {}}, "rewards.cosine: it needs `max_tokens`"),
    ({"overlong": {"max_tokens": 9}}, "rewards.overlong: it needs `cache_tokens`"),
    ({"overlong": {"max_tokens": 9, "cache_tokens": 10}}, "`cache_tokens` 10 is more than `max_tokens` 9"),
    ({"overlong": {"max_tokens": 0, "cache_tokens": 1}}, "`rewards.overlong.max_tokens`"),
    ({"length": {"max_tokens": 9}}, "rewards.length: it takes no `max_tokens`."),
    ({"accuracy": {"target": "en"}}, "rewards.accuracy: it takes no `target`."),
    ({"language": {"target": "tlh"}}, "`rewards.language.target`: Input should be 'prompt', 'en'"),
    ({"repetition": {"ngram": 0}}, "`rewards.repetition.ngram`: Input should be greater than 0"),
    ({"cosine": {"max_tokens": 9, "correct": [1]}}, "`rewards.cosine.correct"),
    ({"cosine": {"max_tokens": 9, "wrong": [0, float("nan")]}}, "`rewards.cosine.wrong"),
    ({"cosin": 1}, "rewards: `cosin` is not a reward; there are accuracy,"),
]


@pytest.mark.parametrize(("rewards", "message"), REFUSED)
def test_a_parameter_is_refused_before_anything_is_loaded(small_grpo, rewards, message):
    with pytest.raises(UserError) as error:
        check_rewards(build(GRPORun, {**small_grpo, "rewards": rewards}, "run.yaml"))
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) <= 2


def test_parameters_come_from_the_yaml(small_grpo, pool):
    fields = {"weight": 0.5, "max_tokens": 100, "correct": [2, 1]}
    run = build(GRPORun, {**small_grpo, "rewards": {"cosine": fields, "repetition": -1}}, "run.yaml")
    assert run.rewards["repetition"].weight == -1
    assert Rewards(run.rewards, pool).scorers["cosine"]([RIGHT], rows([100])) == pytest.approx([1.0])
