"""Reward functions of the user's: what their signatures say, and what becomes of one that misbehaves."""

import json
import threading
import time

import pytest
from conftest import write_yaml

from r1dist.config import GRPORun, Reward, Source, Verify
from r1dist.config.loader import as_tree, build, parse
from r1dist.config.tree import may_change
from r1dist.data.sources import load_problems
from r1dist.errors import RewardFailed, UserError
from r1dist.files import RUN_FILE
from r1dist.rewards import Rewards
from r1dist.rewards.pool import Pool
from r1dist.rewards.registry import check_rewards, isolated, source_digests
from r1dist.run.resume import check_same

OWN = """
import asyncio, os, threading, time

def short(completion: str, row: dict, *, most: int = 10) -> float:
    return float(row["tokens"] <= most)

def rank(completions: list[str], rows: list[dict], scale: float = 1.0) -> list[float]:
    assert len({row["prompt_id"] for row in rows}) == 1
    order = sorted(row["tokens"] for row in rows)
    return [scale * order.index(row["tokens"]) for row in rows]

def like_trl(completions, answer, level, **columns):
    assert len(columns["prompts"]) == len(completions) and "prompt" not in columns
    return [float(c[0]["content"] == a) + l for c, a, l in zip(completions, answer, level)]

async def later(completion, row):
    await asyncio.sleep(0.01)
    return None if completion == "8" else 0.5

def obey(completion: str, row: dict):
    if completion == "hang":
        time.sleep(60)
    if completion == "die":
        os._exit(1)
    return {"raise": lambda: 1 / 0, "nan": lambda: float("nan"), "text": lambda: "1"}.get(completion, lambda: 1)()

def too_few(completions, rows):
    return [1.0]

failed = []
def flaky(completion, row):
    failed.append(completion)
    if len(failed) < 3:
        raise ConnectionError("no answer")
    return 1.0

busy, most = [], []
async def served(completion, row):
    busy.append(1)
    most.append(len(busy))
    await asyncio.sleep(60 if completion == "hang" else 0.05)
    busy.pop()
    return 1.0

def hangs(completion, row):
    time.sleep(60)

counted = []
def counts(completion, row, *, places: int = 0):
    counted.append(1)
    return round(len(counted) + os.getpid() / 2**30, places) if completion == "moody" else 0.5

def moody_group(completions, rows):
    counted.append(1)
    return [0.0] * (len(rows) - 1) + [float(len(counted))]

def needs(completion, row, model: str):
    return 0.0

def other(text): ...
def common(completion, row, weight=1): ...
def length(completion, row): ...
def odd(completion, row, where: threading.Lock = None): ...
"""
PROMPT = [{"role": "user", "content": "?"}]
ROWS = [
    {"prompt_id": n // 2, "kind": "math", "prompt": PROMPT, "answer": "7", "tokens": tokens,
     "columns": json.dumps({"level": n // 2})}
    for n, tokens in enumerate((5, 20, 9, 3))
]  # fmt: skip
IDS = [(0, n, 0) for n in range(4)]


@pytest.fixture
def own(tmp_path):
    """The key of a function of a file of the user's."""
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return lambda name: f"{file}:{name}"


def scored(rewards: dict[str, Reward], texts: list[str], rows=None, **limits) -> dict[str, list[float | None]]:
    rows = ROWS[: len(texts)] if rows is None else rows
    with Pool(isolated(rewards), Verify(workers=2, **limits)) as pool:
        return Rewards(rewards, pool).score(IDS[: len(texts)], 0, texts, rows)


@pytest.mark.parametrize("isolated", [True, False])
def test_each_form_is_given_what_its_parameters_name(own, isolated):
    rewards = {
        own("short"): Reward(parameters={"most": "9"}, isolated=isolated),
        own("rank"): Reward(parameters={"scale": 2}, isolated=isolated),
        own("like_trl"): Reward(isolated=isolated),
        own("later"): Reward(isolated=isolated, kinds=["math"]),
    }
    assert scored(rewards, ["7", "8", "7", "8"]) == {
        "short": [1.0, 0.0, 1.0, 1.0],
        "rank": [0.0, 2.0, 2.0, 0.0],
        "like_trl": [1.0, 0.0, 2.0, 1.0],
        "later": [0.5, None, 0.5, None],
    }


REFUSED = [
    ("short", {"mots": 3}, "it takes no `mots`; did you mean `most`?"),
    ("short", {"wieght": 3}, "it takes no `wieght`; did you mean `weight`?"),
    ("short", {"most": "many"}, "short.most`: Input should be a valid integer"),
    ("needs", {}, "it needs `model`."),
    ("short", {"retries": 1}, "`retries` is of `isolated: false`"),
    ("shrot", {}, "has no function `shrot`; did you mean `short`?"),
    ("other", {}, "it takes (text).\nA reward takes `completion, row`"),
    ("common", {}, "its parameter `weight` is a field of every reward"),
    ("length", {}, "there is another reward `length`; rename the function."),
    ("odd", {}, "a parameter's type is none that a YAML can give"),
]


@pytest.mark.parametrize(("name", "fields", "message"), REFUSED)
def test_what_a_signature_does_not_take_is_refused(own, small_grpo, name, fields, message):
    run = build(GRPORun, {**small_grpo, "rewards": {own(name): fields}}, "run.yaml")
    with pytest.raises(UserError) as error:
        check_rewards(run)
    assert message in str(error.value) and f"rewards.{own(name)}" in str(error.value)
    assert len(str(error.value).splitlines()) <= 2


def test_what_cannot_be_imported_is_refused(tmp_path, small_grpo):
    (tmp_path / "bug.py").write_text("x = 1\ny = x / 0\n")
    for key, message in {
        f"{tmp_path}/absent.py:f": "there is no file",
        f"{tmp_path}/bug.py:f": "cannot be imported: ZeroDivisionError: division by zero (bug.py, line 2)",
        "no_such_module.at.all:f": "there is no module `no_such_module`",
        "a/b:f": "is neither `module:function` nor",
        "math:sqrt": "it takes (x)",
    }.items():
        with pytest.raises(UserError) as error:
            check_rewards(build(GRPORun, {**small_grpo, "rewards": {key: 1}}, "run.yaml"))
        assert message in str(error.value), key
    with pytest.raises(UserError, match="`isolated` is for functions of your own"):
        check_rewards(build(GRPORun, {**small_grpo, "rewards": {"format": {"isolated": False}}}, "run.yaml"))


def test_a_reward_that_looks_at_groups_needs_them_whole(own, small_grpo):
    tree = {**small_grpo, "rewards": {own("rank"): 1}, "per_device_train_batch_size": 4, "num_generations": 8}
    check_rewards(build(GRPORun, {**tree, "per_device_train_batch_size": 8}, "run.yaml", 2), 2)
    with pytest.raises(UserError, match="looks at all completions of a prompt, but num_generations 8 does not divide"):
        check_rewards(build(GRPORun, tree, "run.yaml", 2), 2)


@pytest.mark.parametrize("isolated", [True, False])
def test_a_failure_names_the_reward_and_the_row(own, isolated):
    given = {"isolated": isolated} | ({} if isolated else {"retries": 0})
    for name, text, message in (
        ("obey", "raise", r"obey, row of prompt_id 1: ZeroDivisionError: division by zero \(own.py, line \d+\)\."),
        ("obey", "nan", r"row of prompt_id 1: it returned nan \(float\), neither a finite number nor None\."),
        ("obey", "text", r"row of prompt_id 1: it returned '1' \(str\)"),
        ("too_few", "fine", "it returned 1 scores for 2 completions"),
    ):
        with pytest.raises(RewardFailed, match=message):
            scored({own(name): Reward(**given)}, ["fine", "fine", text, "fine"])
    without = [{**row, "columns": None} for row in ROWS]
    with pytest.raises(RewardFailed, match="there is no column `level`"):
        scored({own("like_trl"): Reward(**given)}, ["7"] * 4, without)


def test_what_hangs_or_dies_is_unscored_and_a_function_that_always_does_fails(own, caplog):
    rewards = {own("obey"): Reward()}
    assert scored(rewards, ["fine", "hang", "die", "fine"], seconds=2)["obey"] == [1.0, None, None, 1.0]
    assert "2 of 4 calls went beyond `verify.seconds`" in caplog.text
    with Pool(isolated(rewards), Verify(workers=2, seconds=1)) as pool:
        ours = Rewards(rewards, pool)
        assert ours.score(IDS[:2], 0, ["hang"] * 2, ROWS[:2])["obey"] == [None, None]
        with pytest.raises(RewardFailed, match=r"obey: 2 of 2 calls went beyond"):
            ours.score(IDS[:2], 0, ["hang"] * 2, ROWS[:2])


@pytest.mark.parametrize("isolated", [True, False])
def test_a_function_that_is_not_deterministic_though_it_says_so_is_refused(own, isolated):
    given = {"isolated": isolated, "deterministic": True}
    assert scored({own("counts"): Reward(**given)}, ["fine"] * 4)["counts"] == [0.5] * 4
    assert scored({own("obey"): Reward(**given)}, ["fine"] * 4)["obey"] == [1.0] * 4
    exactly = Reward(**given, parameters={"places": 12})
    said = r"`deterministic: true`, and gave the same completion \d+\.\d+ and \d+\.\d+\."
    with pytest.raises(RewardFailed, match="counts, row of prompt_id 1: it says " + said):
        scored({own("counts"): exactly}, ["fine", "fine", "moody", "fine"])
    with pytest.raises(RewardFailed, match=r"moody_group, row of prompt_id \d: it says " + said):
        scored({own("moody_group"): Reward(**given)}, ["fine"] * 4)
    assert scored({own("moody_group"): Reward(isolated=isolated)}, ["fine"] * 4)["moody_group"][0] == 0.0


def test_of_many_calls_some_are_made_twice(own):
    rewards = Rewards({own("served"): Reward(isolated=False, deterministic=True, concurrency=100)}, None)
    globals_ = rewards.own["served"].function.__globals__
    rows = [{**ROWS[0], "prompt_id": n} for n in range(50)]
    assert rewards.score([(0, n, 0) for n in range(50)], 0, ["x"] * 50, rows)["served"] == [1.0] * 50
    assert len(globals_["most"]) == 50 + 4


def test_in_the_trainer_calls_are_tried_again_bounded_and_abandoned_at_a_deadline(own):
    assert scored({own("flaky"): Reward(isolated=False, retries=2)}, ["x"])["flaky"] == [1.0]
    assert scored({own("served"): Reward(isolated=False, concurrency=2)}, ["x"] * 4)["served"] == [1.0] * 4
    most = Rewards({own("served"): Reward(isolated=False)}, None).own["served"].function.__globals__["most"]
    assert max(most) == 2
    for name in ("served", "hangs"):
        began = time.monotonic()
        with pytest.raises(
            RewardFailed, match=f"{name}, row of prompt_id 0: TimeoutError: no answer within `deadline`"
        ):
            scored({own(name): Reward(isolated=False, deadline=0.2, retries=0)}, ["hang"])
        assert time.monotonic() - began < 30
    assert all(thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread())


def test_a_key_with_dots_is_one_name(tmp_path, small_grpo, own):
    file = write_yaml(tmp_path / "run.yaml", {**small_grpo, "rewards": {own("short"): {"weight": 0.5}}})
    run = parse(GRPORun, ["--config", str(file), f"--rewards.{own('short')}.most", "3"])
    check_rewards(run)
    assert run.rewards == {own("short"): Reward(weight=0.5, parameters={"most": 3})}
    assert build(GRPORun, as_tree(run), "resolved") == run
    assert may_change(GRPORun, f"rewards.{own('short')}.deadline")
    assert not may_change(GRPORun, f"rewards.{own('short')}.most") and not may_change(GRPORun, "rewards.cosine.weight")
    with pytest.raises(UserError, match=r"own.py:short.weight`: Input should be a valid number"):
        parse(GRPORun, ["--config", str(file), f"--rewards.{own('short')}.weight", "much"])


def test_a_changed_function_is_noticed_on_resume(tmp_path, own, small_grpo):
    rewards = {own("short"): Reward()}
    recorded = source_digests(rewards)
    (tmp_path / RUN_FILE).write_text(json.dumps({"config": {}, "data": recorded}))
    check_same(tmp_path, GRPORun, {}, source_digests(rewards))
    (tmp_path / "own.py").write_text(OWN + "\n")
    with pytest.raises(UserError, match=r"own.py:short` has changed since it began"):
        check_same(tmp_path, GRPORun, {}, source_digests(rewards))


def test_rows_keep_the_columns_that_a_source_names(tmp_path):
    lines = [{"question": "1+1?", "gold": "2", "about": {"level": 3, "topic": "sums"}}] * 2
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    source = Source(path=str(file), problem="question", answer="gold", columns=["about.level", "question"])
    assert json.loads(load_problems([source])[0]["columns"]) == {"level": 3, "question": "1+1?"}
    for columns, message in ((["abut"], "has no column `abut`"), (["answer"], "rows have a `answer` already")):
        with pytest.raises(UserError, match=message):
            load_problems([Source(path=str(file), problem="question", answer="gold", columns=columns)])
