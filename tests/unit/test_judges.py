"""Judges: what they are asked, how often, what their replies are worth, and what becomes of a server's failures."""

import json
import time
from email.utils import formatdate

import pytest
from conftest import write_yaml
from datasets import Dataset
from judge_stub import JudgeStub

from r1dist.config import GRPORun, Reward
from r1dist.config.loader import build, parse
from r1dist.config.tree import may_change
from r1dist.errors import RewardFailed, UserError, VerifiersBroken
from r1dist.files import JUDGEMENTS, RUN_FILE
from r1dist.rewards import Rewards, calls, server
from r1dist.rewards.judge import Judge
from r1dist.rewards.registry import check_rewards, source_digests
from r1dist.run.resume import check_same

RUBRIC = "Question: {prompt}\nReference: {answer}\nReply: {completion}\nSays at last: {final_answer}"
PROMPT = [{"role": "user", "content": "What is 3 + 4?"}]
ROWS = [
    {"prompt_id": n, "kind": "math", "prompt": [{**PROMPT[0], "content": f"What is 3 + {n}?"}], "answer": str(3 + n),
     "problem": f"What is 3 + {n}?", "tokens": 3, "group_tokens": [3, 3], "columns": json.dumps({"level": n})}
    for n in (4, 4, 5, 6)
]  # fmt: skip
TEXTS = ["<think>a</think>7", "<think>a</think>7", "<think>a</think>7", "eight"]
IDS = [(0, n, 0) for n in range(4)]


@pytest.fixture
def stub():
    with JudgeStub() as stub:
        yield stub


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Waits between two tries are short, unless the server asks for more."""
    monkeypatch.setattr(calls, "BACK_OFF", 0.01)


def judge(stub: JudgeStub, rubric: str | None = RUBRIC, fields: dict | None = None, **further) -> Reward:
    given = {"url": stub.url, "model": "referee", **({} if rubric is None else {"rubric": rubric}), **further}
    return Reward(parameters=given, **(fields or {}))


def scored(reward: Reward, texts=TEXTS, rows=ROWS, folder=None, rank=0, name="judge") -> list[float | None]:
    rewards = Rewards({name: reward}, None)
    if folder is not None:
        rewards.remember_in(folder, rank)
    return rewards.score(IDS[: len(texts)], 0, texts, rows[: len(texts)])[name]


def test_a_judge_is_shown_the_rubric_and_asked_once_for_each_question(stub, monkeypatch):
    monkeypatch.setenv("REFEREE_KEY", "secret")
    rewards = Rewards({"judge": judge(stub, api_key_env="REFEREE_KEY", lowest=0, highest=20, seed=5)}, None)
    texts = [*TEXTS[:3], "is it {answer}?"]
    scores = rewards.score(IDS, 0, texts, ROWS)["judge"]
    assert len(stub.asked) == 3 and scores[0] == scores[1]
    by_question = {question: len(question) % 21 / 20 for question in stub.questions}
    assert sorted(set(by_question)) == sorted(
        f"Question: What is 3 + {n}?\nReference: {3 + n}\nReply: {text}\nSays at last: {last}\n\n"
        "End your reply with the line `Score: N`, where N is a number from 0 to 20."
        for n, text, last in ((4, texts[0], "7"), (5, texts[0], "7"), (6, "is it {answer}?", "is it {answer}?"))
    )
    assert sorted(scores[1:]) == sorted(by_question.values())
    assert all({"model": "referee", "temperature": 0, "seed": 5, "max_tokens": 512}.items() <= body.items()
               for body in stub.asked)  # fmt: skip
    assert stub.keys == {"Bearer secret": 3}
    assert rewards.score(IDS, 1, texts, ROWS)["judge"] == scores and len(stub.asked) == 3


def test_a_run_that_is_resumed_asks_nothing_twice_and_gets_the_same_scores(stub, tmp_path):
    stub.reply = lambda question: "no idea" if "eight" in question else f"Score: {len(stub.asked) % 10}"
    scores = scored(judge(stub), folder=tmp_path)
    asked = len(stub.asked)
    assert scores[3] is None and asked == 2 + 3
    lines = (tmp_path / JUDGEMENTS / "judge.rank0.jsonl").read_text().splitlines(keepends=True)
    said = [json.loads(line) for line in lines]
    assert sorted((line["prompt_id"], line["score"], line["reply"]) for line in said[:2]) == [
        (4, scores[0], f"Score: {round(10 * scores[0])}"), (5, scores[2], f"Score: {round(10 * scores[2])}")
    ]  # fmt: skip
    # Killed while it wrote, and resumed by two ranks, on another machine.
    (tmp_path / JUDGEMENTS / "judge.rank0.jsonl").write_text("".join(lines) + lines[0][:30])
    with JudgeStub() as other:
        assert scored(judge(other), folder=tmp_path, rank=1) == scores and not other.asked
        assert scored(judge(other), texts=["new"], folder=tmp_path, rank=1) and len(other.asked) == 1
        assert scored(judge(other), texts=["new"], folder=tmp_path) and len(other.asked) == 1
        for differs in ({"rubric": "{completion}"}, {"model": "other"}, {"seed": 1}, {"highest": 9}):
            reward = judge(other)
            reward.parameters |= differs
            before = len(other.asked)
            scored(reward, texts=["new"], folder=tmp_path)
            assert len(other.asked) == before + 1, differs
        assert scored(judge(other), texts=["new"], folder=tmp_path, name="judge_2") and len(other.asked) == before + 2


def test_requests_are_bounded_at_a_time_and_in_a_minute(stub, monkeypatch):
    stub.delay = 0.05
    texts, rows = [f"reply {n}" for n in range(6)], ROWS[:1] * 6
    rewards = Rewards({"judge": judge(stub, fields={"concurrency": 2})}, None)
    rewards.score([(0, 0, n) for n in range(6)], 0, texts, rows)
    assert stub.most_busy == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    rewards = Rewards({"judge": judge(stub, fields={"requests_per_minute": 1200})}, None)
    stub.times.clear()
    rewards.score([(0, 0, n) for n in range(6)], 0, texts, rows)
    assert len(stub.times) == 6 and 5 * 0.1 - 0.03 <= stub.times[-1] - stub.times[0] < 5


def test_a_server_that_cannot_now_is_asked_again_when_it_says(stub):
    stub.script = [(429, "slow down", {"Retry-After": "1"}), (503, "loading", {}), "hang up", (200, "<html>", {})]
    assert scored(judge(stub), texts=["x"])[0] is not None
    assert len(stub.asked) == 5
    gaps = [after - before for before, after in zip(stub.times, stub.times[1:], strict=False)]
    assert gaps[0] >= 1 and max(gaps[1:]) < 1
    assert server._seconds(formatdate(time.time() + 20, usegmt=True)) == pytest.approx(20, abs=2)
    assert server._seconds("soon") == server._seconds(None) == 0


@pytest.mark.parametrize(
    ("always", "says"),
    [
        ((503, "loading the model", {}), r"/v1/chat/completions answers with status 503: loading the model\."),
        ((200, "<html>bad gateway", {}), r"answers what is no JSON: <html>bad gateway\."),
        ((200, '{"detail": 1}', {}), r'no chat completion in the answer: {"detail": 1}\.'),
        ("hang", r"no answer within `deadline`, 0.2 s\."),
        ("hang up", r"does not answer: "),
    ],
)
def test_an_outage_stops_the_run_which_can_go_on_afterwards(stub, tmp_path, always, says):
    reward = judge(stub, fields={"retries": 1, "deadline": 0.2, "concurrency": 1})
    first = scored(reward, texts=TEXTS[:1], folder=tmp_path)
    stub.always = always
    with pytest.raises(VerifiersBroken, match=r"^rewards.judge, row of prompt_id 5: .*" + says):
        scored(reward, texts=TEXTS[:3], folder=tmp_path)
    assert len(stub.asked) == 1 + 2
    stub.always = None
    assert scored(reward, texts=TEXTS[:3], folder=tmp_path)[:2] == first * 2
    assert len(stub.asked) == 1 + 2 + 1


def test_no_server_at_all_is_an_outage_and_a_long_wait_is_not_waited(stub):
    stub.always = (429, "come back tomorrow", {"Retry-After": "86400"})
    with pytest.raises(VerifiersBroken, match="status 429: come back tomorrow"):
        scored(judge(stub), texts=["x"])
    assert len(stub.asked) == 1
    with JudgeStub() as gone:
        reward = judge(gone, fields={"retries": 2})
    with pytest.raises(VerifiersBroken, match=r"row of prompt_id 4: .* does not answer: "):
        scored(reward, texts=["x"])


def test_a_request_that_is_refused_is_not_made_again_and_the_key_is_not_shown(stub, monkeypatch):
    monkeypatch.setenv("REFEREE_KEY", "secret")
    stub.always = (401, "wrong key: secret", {})
    with pytest.raises(
        RewardFailed, match=r"judge, row of prompt_id 4: .* answers with status 401: wrong key: \*\*\*\."
    ):
        scored(judge(stub, api_key_env="REFEREE_KEY"), texts=["x"])
    assert len(stub.asked) == 1
    stub.always = (307, "", {"Location": "http://127.0.0.1:9/"})
    with pytest.raises(RewardFailed, match="status 307"):
        scored(judge(stub), texts=["x"])


def test_a_reply_without_a_score_leaves_its_completion_unscored_and_one_after_another_stops_the_run(stub, caplog):
    stub.reply = lambda question: "Well said!" if "eight" in question else "Score: 10"
    assert scored(judge(stub)) == [1.0, 1.0, 1.0, None]
    assert "rewards.judge: 1 of 3 calls were answered without a score (prompt_id 6: no `Score: N` from 0 to 10 in " \
           "the reply: 'Well said!'); their completions are unscored" in caplog.text  # fmt: skip
    assert sum("eight" in question for question in stub.questions) == 3
    rewards = Rewards({"judge": judge(stub)}, None)
    for step, texts in enumerate((["eight"] * 3, ["eighty"])):
        if step == 1:
            with pytest.raises(RewardFailed, match=r"rewards.judge: 1 of 1 calls .*prompt_id 4: .*'Well said!'"):
                rewards.score(IDS[:1], 0, texts, ROWS[:1])
        else:
            rows = [{**ROWS[0], "prompt_id": n, "answer": str(n)} for n in range(3)]
            assert rewards.score(IDS[:3], 0, texts, rows)["judge"] == [None] * 3
    stub.reply = lambda question: None
    assert scored(judge(stub), texts=["x"]) == [None]


def test_a_row_that_lacks_what_the_rubric_shows_is_not_asked_about(stub):
    rows = [ROWS[0], {**ROWS[0], "answer": None}]
    assert [score is None for score in scored(judge(stub), texts=["x", "x"], rows=rows)] == [False, True]
    assert len(stub.asked) == 1
    scored(judge(stub, "{completion} {level} {{so}}"), texts=["x"])
    assert stub.questions[-1].startswith("x 4 {so}\n\n")


def test_several_judges_have_names_and_kinds_of_their_own(stub):
    rows = [{**ROWS[0], "kind": kind} for kind in ("math", "talk")]
    rewards = Rewards(
        {"judge": judge(stub), "judge_tone": judge(stub, "Polite? {completion}", {"kinds": ["talk"], "weight": 0.5})},
        None,
    )
    scores = rewards.score(IDS[:2], 0, ["x", "y"], rows)
    assert None not in scores["judge"] and [score is None for score in scores["judge_tone"]] == [True, False]


REPLIES = [
    ("Score: 7", 0.7), ("Good.\n**Score:** 7/10", 0.7), ("**Score**: `7.5`", 0.75), ("score: 2\nno, Score: 4.", 0.4),
    ("Score:\n0", 0.0), ("Score: 10", 1.0), ("Score: 11", None), ("Score: -1", None), ("Score: 7,5", None),
    ("Score: 1e1", None), ("Score: 7.5.1", None), ("I give it a 7.", None), ("underscore: 7", None), ("", None),
    ("Score: 3, then Score: none", 0.3), ("Score: 3\nScore: 12", None),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "score"), REPLIES)
def test_the_score_is_the_last_number_after_score_within_its_bounds(reply, score, stub):
    stub.reply = lambda question: reply
    assert scored(judge(stub), texts=["x"]) == [score]


BASE = {"url": "http://127.0.0.1:9/v1", "model": "m", "rubric": "{completion}"}
REFUSED = [
    ({"rubric": "{completion} {anwser}"}, "names `{anwser}`, which rows do not have; did you mean `answer`?"),
    ({"rubric": "{completin}"}, "shows neither `{completion}` nor `{final_answer}`"),
    ({"rubric": 'reply as {"a": 1}: {completion}'}, "is a name alone, without `!` or `:`"),
    ({"rubric": "{completion} {"}, "Braces of the text itself are doubled"),
    ({"rubric": None}, "needs `rubric`, the text that the judge is given, or `rubric_file`"),
    ({"rubric_file": "x"}, "needs `rubric`, the text that the judge is given, or `rubric_file`"),
    ({"rubric": None, "rubric_file": "absent.txt"}, "`rubric_file` absent.txt cannot be read"),
    ({"model": None}, "it needs `model`, the model's name at the server."),
    ({"url": None}, "it needs `url`, the address of a server."),
    ({"url": "127.0.0.1:8000/v1"}, "`url` 127.0.0.1:8000/v1 is not the address of a server"),
    ({"url": "http://me:secret@host/v1"}, "`url` holds a password"),
    ({"lowest": 5, "highest": 5}, "`lowest` 5 is not below `highest` 5"),
    ({"api_key_env": "NO_SUCH_KEY"}, "the environment has no variable NO_SUCH_KEY, which `api_key_env` names"),
    ({"api_key_env": "sk-secret"}, "`api_key_env` must be the name of a variable"),
    ({"rubrik": "x"}, "it takes no `rubrik`; did you mean `rubric`?"),
    ({"isolated": False}, "`isolated` is for functions of your own"),
    ({"deterministic": True}, "`deterministic` is for functions of your own"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_what_cannot_be_asked_is_refused_before_anything_is_loaded(fields, message, small_grpo):
    fields = {name: value for name, value in {**BASE, **fields}.items() if value is not None}
    with pytest.raises(UserError) as error:
        check_rewards(build(GRPORun, {**small_grpo, "rewards": {"judge_a": fields}}, "run.yaml"))
    assert message in str(error.value) and "rewards.judge_a" in str(error.value)
    assert len(str(error.value).splitlines()) <= 2 and "secret" not in str(error.value)


def test_other_rewards_take_no_fields_of_a_server(small_grpo):
    for name, fields, message in (
        ("format", {"retries": 1}, "`retries` is for functions of your own"),
        ("safety", {"model": "x", "api_key_env": "HOME"}, "`api_key_env` is for a server; set `url`, too"),
        ("judgement", BASE, "`judgement` is not a reward; there are"),
    ):
        with pytest.raises(UserError, match=message):
            check_rewards(build(GRPORun, {**small_grpo, "rewards": {name: fields}}, "run.yaml"))


def test_columns_of_the_data_may_be_shown(small_grpo, tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    source = {"path": str(tmp_path / "rows.jsonl"), "problem": "p", "answer": "a", "columns": ["about.level"]}
    tree = {
        **small_grpo,
        "data": {"sources": [source]},
        "rewards": {"judge": {**BASE, "rubric": "{completion}{level}"}},
    }
    check_rewards(build(GRPORun, tree, "run.yaml"))


def test_rows_of_each_source_must_have_the_columns_that_the_rubric_shows(stub):
    rows = [{**ROWS[0], "source": "with.jsonl"}, {**ROWS[0], "source": "without.jsonl", "columns": None}]
    reward = judge(stub, "{completion} {level}")
    Rewards({"judge": reward}, None, Dataset.from_list(rows[:1]))
    with pytest.raises(UserError, match=r"rewards.judge: it takes `level`, which rows of without.jsonl do not have"):
        Rewards({"judge": reward}, None, Dataset.from_list(rows))


def test_a_resume_may_have_another_address_and_no_other_rubric(small_grpo, tmp_path):
    rubric = tmp_path / "rubric.txt"
    rubric.write_text("Is it polite?\n{completion}\n")
    fields = {**BASE, "rubric_file": str(rubric)}
    del fields["rubric"]
    file = write_yaml(tmp_path / "run.yaml", {**small_grpo, "rewards": {"judge": fields}})
    run = parse(GRPORun, ["--config", str(file), "--rewards.judge.highest", "5"])
    check_rewards(run)
    assert Judge("judge", **run.rewards["judge"].parameters).messages("x", ROWS[0])[0]["content"] == (
        "Is it polite?\nx\n\nEnd your reply with the line `Score: N`, where N is a number from 0 to 5."
    )
    for field in ("url", "api_key_env", "requests_per_minute", "deadline"):
        assert may_change(GRPORun, f"rewards.judge.{field}")
    for name in ("judge.rubric", "judge.model", "judge.seed", "judge.weight", "own.py:f.url"):
        assert not may_change(GRPORun, f"rewards.{name}")
    recorded = {"config": {}, "data": source_digests(run.rewards)}
    (tmp_path / RUN_FILE).write_text(json.dumps(recorded))
    check_same(tmp_path, GRPORun, {}, source_digests(run.rewards))
    rubric.write_text("Is it rude?\n{completion}\n")
    with pytest.raises(UserError, match=r"rewards.judge.rubric_file` has changed since it began"):
        check_same(tmp_path, GRPORun, {}, source_digests(run.rewards))
