"""The engine over servers that answer wrongly, late or not at all: stand-ins, since real ones do not on demand."""

import json
import time

import pytest
import torch
from stub_server import LOGPROB, StubServer
from torch import nn

from r1dist.config import Rollout
from r1dist.errors import UserError
from r1dist.generation.engine import Request, RolloutsLost, Sampling, generate, sample_seed
from r1dist.generation.vllm.endpoints import Endpoints, Server, ServerRegistry, read, write
from r1dist.generation.vllm.engine import Policy, ServerEngine
from r1dist.generation.weight_sync.source import WeightSource
from r1dist.generation.weight_sync.transports import FileTransport

SAMPLING = Sampling(max_tokens=8)


def asked(prompts: int = 12, samples: int = 4, step: int = 0) -> list[Request]:
    return [Request([3, p], p, i, sample_seed(0, step, p, i)) for p in range(prompts) for i in range(samples)]


@pytest.fixture
def servers():
    pair = [StubServer(), StubServer()]
    yield pair
    for server in pair:
        server.stop()


@pytest.fixture
def engine_of(tmp_path):
    engines = []

    def build(servers, score=lambda tokens: [LOGPROB] * (len(tokens) - 1), **settings) -> ServerEngine:
        urls = ",".join(server.url for server in servers)
        rollout = Rollout(engine="vllm", servers=urls, transport="shm", **{"no_server_timeout": 3, **settings})
        policy = Policy(score, probe=[3, 4], probe_tokens=4, stop_ids=[0], rank=0, broadcast=lambda value: value)
        transport = FileTransport(WeightSource(nn.Linear(2, 2), torch.float32), tmp_path, writes=True)
        engines.append(ServerEngine(rollout, ServerRegistry(rollout, None), transport, policy))
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()
    assert not list(tmp_path.iterdir())  # no weights are left lying about


def test_rollouts_carry_their_version_and_every_sample_its_seed(engine_of, servers):
    engine = engine_of(servers)
    for step in (0, 5):
        engine.sync_weights(step)
        requests = asked(step=step)
        rollouts = generate(engine, requests, SAMPLING)
        assert [r.request for r in rollouts] == requests
        assert {r.policy_version for r in rollouts} == {step}
        assert all(r.token_ids == [5 + r.request.seed % 7] * 4 for r in rollouts)
    drawn = servers[0].seeds + servers[1].seeds
    wanted = [r.seed for step in (0, 5) for r in asked(step=step)]
    assert set(wanted) <= set(drawn) and servers[0].seeds and servers[1].seeds
    assert engine.metrics() == {"rollout/servers": 2.0, "rollout/logp_diff": 0.0}


def test_several_greedy_samples_are_asked_for_once(engine_of, servers):
    engine = engine_of(servers)
    engine.sync_weights(0)
    rollouts = generate(engine, asked(prompts=3), Sampling(max_tokens=8, temperature=0))
    assert [r.request for r in rollouts] == asked(prompts=3)
    # vLLM: "n must be 1 when using greedy sampling".
    assert (
        len(servers[0].seeds + servers[1].seeds) == servers[0].asked["completions"] + servers[1].asked["completions"]
    )


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        ("500", "status_500"), ("503", "status_503"), ("garbage", "garbage"), ("empty", "empty"),
        ("choices", "choices"), ("nan", "garbage"), ("hang", "late"),
    ],
)  # fmt: skip
def test_a_wrong_answer_is_counted_and_the_group_is_made_elsewhere(engine_of, servers, wrong, kind):
    engine = engine_of(servers, request_timeout=1)
    engine.sync_weights(0)
    servers[0].misbehave(wrong)
    rollouts = generate(engine, asked(), SAMPLING)
    assert [r.request for r in rollouts] == asked()
    counted = engine.metrics()
    assert counted[f"rollout/errors/{kind}"] >= 1 and counted["rollout/resent"] >= 1


def test_a_server_that_recovers_is_used_again(engine_of, servers):
    engine = engine_of(servers, max_concurrent_requests=4)
    engine.sync_weights(0)
    servers[0].misbehave("500")
    generate(engine, asked(), SAMPLING)
    servers[0].misbehave(None)
    before = servers[0].asked["completions"]
    for _ in range(20):
        generate(engine, asked(prompts=40), SAMPLING)
        if servers[0].seeds and servers[0].asked["completions"] > before + 1:
            break
        time.sleep(0.5)
    assert servers[0].asked["completions"] > before + 1


def test_without_any_server_every_one_is_named_with_its_last_error(engine_of, servers):
    engine = engine_of(servers)
    engine.sync_weights(0)
    servers[0].misbehave("503")
    servers[1].misbehave("garbage")
    with pytest.raises(RolloutsLost) as lost:
        generate(engine, asked(), SAMPLING)
    assert f"{servers[0].url}: status_503" in str(lost.value) and f"{servers[1].url}: garbage" in str(lost.value)


def test_a_server_that_forgets_its_weights_is_given_them_again(engine_of, servers):
    engine = engine_of(servers)
    engine.sync_weights(3)
    label = servers[0].version
    assert label.endswith("-3")
    servers[0].version = "default"  # as after a restart
    requests = asked(prompts=4)
    for _ in range(30):
        generate(engine, requests, SAMPLING)
        if servers[0].version == label:
            break
        time.sleep(0.2)
    assert servers[0].version == label and servers[0].asked["update_weights"] == 2


@pytest.mark.parametrize("difference", [1.0, float("nan")])
def test_other_logprobs_than_the_trainers_stop_the_run(engine_of, servers, difference):
    engine = engine_of(servers, score=lambda tokens: [LOGPROB + difference] * (len(tokens) - 1))
    with pytest.raises(RolloutsLost, match=r"the weights of step 0, but its logprobs differ .*max_logp_diff is 0.2"):
        engine.sync_weights(0)


def test_endpoints_file_is_its_owners_and_is_checked(tmp_path):
    path = tmp_path / "endpoints.json"
    endpoints = Endpoints([Server("server0", "http://127.0.0.1:1", "ready")], "shm", "secret")
    write(path, endpoints)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read(path) == endpoints
    path.write_text(json.dumps({"servers": [{"nome": 1}]}))
    with pytest.raises(UserError, match="is not an endpoints file"):
        read(path)
    with pytest.raises(UserError, match="there is no file"):
        read(tmp_path / "absent.json")


def test_a_group_of_servers_that_vanishes_is_told_of(tmp_path):
    path = tmp_path / "endpoints.json"
    write(path, Endpoints([Server("server0", "http://127.0.0.1:1", "ready")], "shm", "secret"))
    registry = ServerRegistry(Rollout(engine="vllm", servers=str(path)), None)
    assert registry.read().servers[0].state == "ready"
    path.unlink()
    server = registry.read().servers[0]
    assert server.state == "starting" and "is gone" in server.error


def test_urls_need_to_say_how_they_take_weights():
    with pytest.raises(UserError, match=r"rollout.transport: `auto` cannot know"):
        ServerRegistry(Rollout(engine="vllm", servers="http://a:1,http://b:2"), None)
