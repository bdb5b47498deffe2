"""Rewards pay for what they say, and for nothing that only looks like it."""

import pytest

from r1dist.config import Reward
from r1dist.data.formats import gold_answer, last_boxed, rewrite_hashes, rewrite_stratos, turns
from r1dist.errors import UserError
from r1dist.rewards import Rewards
from r1dist.rewards.format import format_reward
from r1dist.rewards.language import language_share
from r1dist.rewards.math.accuracy import accuracy

RIGHT = [
    ("<think>x</think><answer>72</answer>", "72"),
    ("<think>x</think>\n<answer>The answer is 72.</answer>", "72"),
    ("<think>x</think><answer>$\\frac{1}{2}$</answer>", "0.5"),
    ("<think>x</think><answer>\\boxed{\\frac{1}{2}}</answer>", "\\frac{1}{2}"),
    ("<think>x</think><answer>1,000</answer>", "1000"),
    ("The answer is 8.", "8"),
    ("<think>first 3, then</think> 8", "8"),
    ("<think>x</think><answer>3</answer> no: <answer>4</answer>", "4"),
    ("<think>x</think><answer>$x^2+2x+1$</answer>", "(x+1)^2"),
]
WRONG = [
    ("<think>x</think><answer>71</answer>", "72"),
    ("<think>72</think><answer>71</answer>", "72"),
    ("<think>it is 72", "73"),
    ("<think>The answer is 72</think>", "72"),
    ("<think>x</think><answer></answer>", "72"),
    ("", "72"),
    ("<think>x</think><answer>4</answer> no: <answer>3</answer>", "4"),
    ("<answer>7</answer><think>x</think>", "7"),
]


@pytest.mark.parametrize(("completion", "gold"), RIGHT)
def test_right(completion, gold):
    assert accuracy(completion, {"answer": gold}) == 1.0


@pytest.mark.parametrize(("completion", "gold"), WRONG)
def test_wrong(completion, gold):
    assert accuracy(completion, {"answer": gold}) == 0.0


def test_a_gold_answer_that_does_not_parse_cannot_be_scored():
    assert accuracy("<think>x</think><answer>7</answer>", {"answer": "proof left to the reader"}) is None


@pytest.mark.parametrize(
    "completion",
    [
        "<think>a</think><answer>b</answer>",
        "<think>a\nb</think>\n<answer>c</answer>\n",
        "  <think>a < b</think> <answer>c</answer>",
    ],
)
def test_format_kept(completion):
    assert format_reward(completion, {}) == 1.0


@pytest.mark.parametrize(
    "completion",
    [
        "",
        "7",
        "<answer>b</answer>",
        "<think>a</think>",
        "<think>a<answer>b</answer>",
        "<think>a</think><answer>b</answer> and more",
        "<think>a</think><answer>b</answer>\nand more",
        "well: <think>a</think><answer>b</answer>",
        "<think></think><answer>b</answer>",
        "<think>a</think><answer> </answer>",
        "<think>a</think><think>a</think><answer>b</answer>",
        "<think>a</think><answer>b</answer><answer>c</answer>",
        "<think>a</think>between<answer>b</answer>",
        "<THINK>a</THINK><ANSWER>b</ANSWER>",
    ],
)
def test_format_broken(completion):
    assert format_reward(completion, {}) == 0.0


def test_tags_that_repeat_take_no_quadratic_time():
    assert format_reward("<think></think><answer>" * 200_000, {}) == 0.0  # minutes, if they did


def test_language_share():
    assert language_share("<think>3*4 ends in 2.</think>\n<answer>2</answer>", "en") == 1.0
    assert language_share("3*4末位是2。", "en") == 0.0
    assert language_share("3*4末位是2。", "zh") == 1.0
    assert language_share("ends in 末位", "en") == 0.5
    assert language_share("末位 $ends$ `in` ```words``` \\frac 12", "zh") == 1.0
    assert language_share("<think>1+1=2</think>", "en") is None


def test_selection_names_what_there_is(pool):
    assert list(Rewards({"format": Reward(weight=0.5), "accuracy": Reward()}, pool).scorers) == ["format", "accuracy"]
    with pytest.raises(UserError, match="`acuracy` is not a reward; there are accuracy, format, helpfulness"):
        Rewards({"acuracy": Reward()}, pool)
    with pytest.raises(UserError, match=r"rewards.safety: it needs `model`"):
        Rewards({"safety": Reward()}, pool)
    with pytest.raises(UserError, match=r"rewards.format: it takes no `model`"):
        Rewards({"format": Reward(parameters={"model": "somewhere"})}, pool)
    with pytest.raises(UserError, match="nowhere holds no reward model"):
        Rewards({"safety": Reward(parameters={"model": "nowhere"})}, pool)


def test_a_reward_may_be_for_some_kinds_only_and_in_one_language(pool):
    rows = [{"answer": "9", "kind": kind} for kind in ("math", "talk", "math")]
    texts = ["<answer>9</answer>", "<answer>9</answer>", "<answer>8</answer>"]
    assert Rewards({"accuracy": Reward(kinds=["math"])}, pool).scorers["accuracy"](texts, rows) == [1.0, None, 0.0]
    assert Rewards({"accuracy": Reward(kinds=["code"])}, pool).scorers["accuracy"](texts, rows) == [None] * 3
    mixed = [f"<think>{thought}</think>" for thought in ("ends in 末位", "ends", "1+1")]
    chinese = Reward(parameters={"target": "zh"})
    assert Rewards({"language": chinese}, pool).scorers["language"](mixed, rows) == [0.5, 0.0, None]
    assert Rewards({"language": Reward()}, pool).scorers["language"](mixed, rows) == [0.5, 1.0, None]


def test_gold_answers():
    assert gold_answer("so 5.\n#### 1,234", "hashes") == "1,234"
    assert gold_answer("no marks", "hashes") is None
    assert gold_answer(r"first \boxed{1}, then \boxed{\frac{1}{2}}.", "boxed") == r"\frac{1}{2}"
    assert gold_answer(r"never closed \boxed{\frac{1}{2}", "boxed") is None
    assert gold_answer(" 7 ", "plain") == "7"
    assert gold_answer("  ", "plain") is None and gold_answer(None, "plain") is None
    assert last_boxed("none") is None


def test_conversations():
    assert turns([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]) == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a"},
    ]
    marks = "<|begin_of_thought|> t <|end_of_thought|>\n\n<|begin_of_solution|> s <|end_of_solution|>"
    assert rewrite_stratos(marks) == "<think>t</think>\n<answer>s</answer>"
    assert rewrite_stratos("no marks") is None


def test_worked_solutions_become_completions():
    solution = "Half: 48/2 = <<48/2=24>>24 clips.\nAltogether 48+24 = <<48+24=72>>72 clips.\n#### 72"
    thought = "Half: 48/2 = 24 clips.\nAltogether 48+24 = 72 clips."
    assert rewrite_hashes(solution) == f"<think>{thought}</think>\n<answer>72</answer>"
    assert format_reward(rewrite_hashes(solution), {}) == 1
    for unusable in ("no marks", "a thought\n#### ", "#### 72"):
        assert rewrite_hashes(unusable) is None


def test_a_reward_may_begin_in_the_last_part_of_a_run(pool):
    rewards = Rewards(
        {"format": Reward(from_step=3), "overlong": Reward(parameters={"max_tokens": 2, "cache_tokens": 1})}, pool
    )
    ids = [(0, 0, 0), (0, 0, 1)]
    rows = [{"kind": "math", "tokens": n} for n in (1, 2)]
    texts = ["<think>a</think><answer>b</answer>", "b"]
    assert rewards.score(ids, 2, texts, rows)["format"] == [None, None]
    after = rewards.score(ids, 3, texts, rows)
    assert after["format"] == [1.0, 0.0] and after["overlong"] == [0.0, -1.0]


def test_scores_belong_to_their_rollout_and_each_answer_is_verified_once(pool, monkeypatch):
    """By its id: the same text may be right for one prompt and wrong for another, and arrive in any order."""
    asked = []
    submit = pool.submit
    monkeypatch.setattr(pool, "submit", lambda *item: asked.append(item) or submit(*item))
    rewards = Rewards(
        {"accuracy": Reward(), "cosine": Reward(parameters={"max_tokens": 10}), "length": Reward()}, pool
    )
    text = "<think>x</think><answer>7</answer>"
    rows = [{"kind": "math", "answer": str(n), "prompt_id": n, "tokens": 10, "group_tokens": [10]} for n in (6, 7, 8)]
    ids = [(5, row["prompt_id"], 0) for row in rows]
    for place in (2, 0, 1):
        rewards.begin(ids[place], 0, text, rows[place])
    beats = []
    assert rewards.wait(ids, lambda: beats.append(1)) is None and len(beats) == 3
    scores = rewards.score(ids, 0, [text] * 3, rows)
    assert scores["accuracy"] == [0.0, 1.0, 0.0] and scores["cosine"] == [-0.5, 0.5, -0.5]
    assert len(asked) == 3
