"""Reward models that a server holds, against a stand-in for it; servers/test_served_reward_model.py has a real one."""

import math

import pytest
from judge_stub import JudgeStub

from r1dist.cluster.memory import reward_models
from r1dist.config import GRPORun, Model, Reward
from r1dist.config.loader import build
from r1dist.errors import RewardFailed, UserError, VerifiersBroken
from r1dist.models import load_model_config
from r1dist.rewards import Rewards, calls
from r1dist.rewards.model import conversation_ids
from r1dist.rewards.registry import check_rewards
from r1dist.tiny import BASE_DIR

ROW = {"problem": "Say hello.", "kind": "talk", "prompt_id": 3}
TEXT = "<think>thought</think>\n<answer>Hello!</answer>"


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(calls, "BACK_OFF", 0.01)
    with JudgeStub() as stub:
        yield stub


def scored(stub, name: str, texts: list[str], **fields) -> list[float | None]:
    # The base model's folder stands for a reward model's: of it only the tokenizer is read.
    reward = Reward(parameters={"model": str(BASE_DIR), "url": stub.root}, **fields)
    rows = [ROW] * len(texts)
    return Rewards({name: reward}, None).score([(0, 3, n) for n in range(len(texts))], 0, texts, rows)[name]


def test_the_server_is_given_the_token_ids_of_what_the_model_judges(stub, template):
    for name, judged in (("helpfulness", "Hello!"), ("safety", TEXT)):
        stub.asked.clear()
        ids = conversation_ids(template, ROW["problem"], judged)
        logit = len(ids) / 10 - 3
        expected = logit if name == "helpfulness" else 1 / (1 + math.exp(-logit))
        assert scored(stub, name, [TEXT]) == pytest.approx([expected], abs=1e-6)
        assert stub.asked == [{"input": [ids], "use_activation": False}]


def test_tokens_that_pad_at_the_end_are_left_out_as_transformers_does(stub, template, monkeypatch):
    ids = conversation_ids(template, ROW["problem"], TEXT)
    pad = template.tokenizer.pad_token_id
    monkeypatch.setattr("r1dist.rewards.served.conversation_ids", lambda *asked: [*ids, pad, pad])
    scored(stub, "safety", [TEXT])
    assert stub.asked[0]["input"] == [ids]


def test_an_outage_a_refusal_and_another_kind_of_model_end_the_run(stub):
    stub.always = (503, "no", {})
    with pytest.raises(
        VerifiersBroken, match=r"rewards.safety, row of prompt_id 3: .*/classify answers with status 503"
    ):
        scored(stub, "safety", [TEXT], retries=1)
    assert len(stub.asked) == 2
    stub.always = (400, "longer than max_model_len", {})
    with pytest.raises(RewardFailed, match="status 400: longer than max_model_len"):
        scored(stub, "safety", [TEXT])
    stub.always = (200, '{"data": []}', {})
    with pytest.raises(VerifiersBroken, match="/classify gives no score"):
        scored(stub, "safety", [TEXT], retries=0)
    stub.always, stub.logits = None, lambda ids: [0.5, 0.5]
    with pytest.raises(RewardFailed, match="/classify gives 2 scores: its model is no reward model"):
        scored(stub, "safety", [TEXT])


def test_a_served_model_is_checked_at_the_start_and_takes_no_memory_here(small_grpo):
    def run(**fields) -> GRPORun:
        tree = {**small_grpo, "rewards": {"safety": {"model": str(BASE_DIR), **fields}}}
        run = build(GRPORun, tree, "run.yaml")
        check_rewards(run)
        return run

    config = load_model_config(Model(path="tiny"))
    assert reward_models(run(), config, mixed=False)
    assert reward_models(run(url="http://host:8000", concurrency=64), config, mixed=False) == {}
    with pytest.raises(UserError, match=r"rewards.safety: `url` host:8000 is not the address of a server"):
        run(url="host:8000")
    with pytest.raises(UserError, match="`retries` is for functions of your own"):
        run(retries=3)
