"""Small talk in the tiny world, and how replies to requests are counted."""

import re

import pytest

from r1dist.config import EvaluateRun, Model, Requests, Source
from r1dist.errors import UserError
from r1dist.evaluation.requests import request_dataset, score_replies
from r1dist.generation.engine import Rollout, Sampling
from r1dist.sampling.draw import SamplingJob, lines
from r1dist.tiny import talk


def test_no_test_request_is_trained_on_though_every_word_of_it_is():
    train, test = ({t.question for t in talk.questions(0, split, None)} for split in ("train", "test"))
    assert len(train) > 300 and len(test) > 80 and not train & test
    words = {word for question in train for word in re.findall(r"\w+", question)}
    assert {word for question in test for word in re.findall(r"\w+", question)} <= words


def test_what_is_unsafe_is_declined_and_a_third_of_the_rows_is_poor():
    for unsafe in (False, True):
        rows = talk.rows(0, "train", unsafe)
        assert all((row["answer"] == talk.DECLINED) == unsafe for row in rows)
        good = sum(f"<answer>{row['answer']}</answer>" in row["completion"] for row in rows)
        assert 0.55 < good / len(rows) < 0.8
    pairs = talk.pairs(0, "train")
    assert all(pair["chosen"] != pair["rejected"] for pair in pairs)
    judged = talk.judged(0, "train")
    assert all(row["label"] == 1 for row in judged if talk.DECLINED in row["completion"])
    assert 0.1 < sum(1 - row["label"] for row in judged) / len(judged) < 0.5


class Says:
    """An engine that says `replies`, one after another; a reply ending in `...` was cut off."""

    def __init__(self, tokenizer, replies):
        self.tokenizer = tokenizer
        self.replies = replies

    def stream(self, requests, sampling):
        assert sampling.temperature == 0
        for place, (request, reply) in enumerate(zip(requests, self.replies, strict=True)):
            ids = self.tokenizer(reply)["input_ids"]
            yield place, Rollout(request, ids, [0.0] * len(ids), "length" if reply.endswith("...") else "stop", 0)


def test_replies_are_counted_as_what_they_are(template):
    harmless = talk.rows(0, "test", unsafe=False)[:4]
    unsafe = talk.rows(0, "test", unsafe=True)[:2]
    replies = [
        talk.response("Fine.", harmless[0]["answer"]),
        talk.response("Fine.", "I cannot help with that."),
        talk.response("Fine.", ""),
        "<think>on and on...",
        talk.response("This does harm.", "I CANNOT HELP with that."),
        talk.response("I cannot help with that.", "Take a cow."),
    ]
    sources = [Source(path="tiny_talk", split="test", kind="talk", limit=4)]
    sources += [Source(path="tiny_unsafe", split="test", kind="unsafe", limit=2)]
    run = EvaluateRun(model=Model(path="tiny"), requests=Requests(sources=sources))
    asked = request_dataset(run, template, 2048)
    job = SamplingJob("requests", asked, template, Sampling(64, temperature=0), 1, 0, verified=False)
    said = list(lines(job, asked, run.rollout, Says(template.tokenizer, replies), None, set()))
    scores = score_replies(run, asked, said)
    assert (scores.requests, scores.answered, scores.declined) == (6, 1 / 4, 1 / 2)
    assert scores.as_reference == pytest.approx(1 / 6)
    assert scores.helpfulness is None and scores.safety is None
    assert [line["samples"][0]["text"] for line in said] == replies and said[4]["kind"] == "unsafe"
    assert [line["problem"] for line in said] == [row["problem"] for row in harmless + unsafe]


def test_reward_models_that_are_not_there_are_missed_before_anything_is_generated(tmp_path, template):
    sources = [Source(path="tiny_talk", split="test", kind="talk", limit=4)]
    requests = Requests(sources=sources, safety=str(tmp_path))
    run = EvaluateRun(model=Model(path="tiny"), requests=requests)
    with pytest.raises(UserError, match=r"requests\.safety: .* holds no reward model"):
        request_dataset(run, template, 2048)
