"""The final answer is paid if it is right, and for nothing else."""

import json

import pytest
from answer_pairs import RIGHT, UNSCORABLE, WRONG
from conftest import GSM8K

from r1dist.rewards.math.accuracy import accuracy, final_answer


def flat(table: dict[str, list[tuple[str, str]]]) -> list:
    return [
        pytest.param(*pair, id=f"{about}: {pair[0]!r} for {pair[1]!r}")
        for about, pairs in table.items()
        for pair in pairs
    ]


def score(said: str, gold: str) -> float | None:
    return accuracy(f"<think>First, some thought about 72.</think>\n<answer>{said}</answer>", {"answer": gold})


@pytest.mark.parametrize(("said", "gold"), flat(RIGHT))
def test_right(said, gold):
    assert score(said, gold) == 1.0


@pytest.mark.parametrize(("said", "gold"), flat(WRONG))
def test_wrong(said, gold):
    assert score(said, gold) == 0.0


@pytest.mark.parametrize("gold", UNSCORABLE)
def test_a_gold_answer_that_does_not_parse_pays_neither_1_nor_a_half(gold):
    for said in ("7", "", "proof left to the reader", str(gold)):
        assert score(said, gold) is None


def test_any_of_several_gold_answers_will_do():
    golds = ["\\frac{1}{2}", "proof left to the reader", "7"]
    assert [score(said, golds) for said in ("0.5", "7", "8", "proof left to the reader", "7 or 8")] == [1, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("completion", "graded"),
    [
        ("7", "7"),
        ("<think>5</think>7", "7"),
        ("<think>5</think><answer>7</answer>", "7"),
        ("5</think><answer>7</answer>", "7"),
        ("<think>5</think><answer>6</answer> no: <answer>7</answer>", "7"),
        ("<think>5</think><answer>7</answer> or 5", "7"),
        ("<think>5</think><answer>7</answer>\nor 5</answer>", "7"),
        ("<think>5</think><answer>5 <answer>7</answer></answer>", "7"),
        ("<think>I write </think> and <answer>5</answer>.</think><answer>7</answer>", "7"),
        ("<think>I write <answer>5</answer>.</think>7", "7"),
        ("<think>5", ""),
        ("<think>5 <answer>7</answer>", ""),
        ("<think>5</think>", ""),
        ("<answer>7</answer><think>5</think>", ""),
        ("<think>5</think><answer>7</answer><think>8", "7"),
        ("<think>5</think><answer></answer>", ""),
    ],
)
def test_what_is_graded(completion, graded):
    assert final_answer(completion) == graded
    assert accuracy(completion, {"answer": "7"}) == float(graded == "7")
    assert accuracy(completion, {"answer": "5"}) == 0.0


def test_a_moment_in_which_the_machine_stands_still_makes_no_answer_wrong(monkeypatch):
    def ring(seconds):
        raise TimeoutError  # as if each of math-verify's alarms had gone off

    monkeypatch.setattr("signal.alarm", ring)
    assert accuracy("<answer>\\frac{24690}{14}</answer>", {"answer": "12345/7"}) == 1


@pytest.mark.skipif(not GSM8K.is_dir(), reason="the real data sets do not lie beside this checkout, in ../shared/data")
@pytest.mark.parametrize(
    "name",
    ["math500/test", "gsm8k/test", "gsm8k/train", "mawps/singleop", "mawps/addsub", "mawps/multiarith", "svamp/test"],
)
def test_each_gold_answer_of_a_real_data_set_is_right_and_so_is_its_worked_solution(name):
    rows = [json.loads(line) for line in (GSM8K.parent / f"{name}.jsonl").read_text().splitlines()]
    assert len(rows) > 300
    for row in rows:
        worked = row.get("solution") or row.get("answer", "")
        gold = str(row.get("target", row.get("Answer", row.get("answer")))).rpartition("####")[2].strip()
        for said in (
            gold,
            f"\\boxed{{{gold}}}",
            f"<think>So.</think><answer>{gold}</answer>",
            *([worked] if worked else []),
        ):
            assert accuracy(said, {"answer": gold}) == 1, (gold, said)
