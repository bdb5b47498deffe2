"""The engine over servers that answer wrongly, late or not at all: stand-ins, since real ones do not on demand."""

import asyncio
import json
import subprocess
import time

import pytest
import torch
from stub_server import LOGPROB, StubServer
from torch import nn

from r1dist.config import Rollout, Serve
from r1dist.errors import UserError
from r1dist.generation.engine import Request, RolloutsLost, Sampling, generate, sample_seed
from r1dist.generation.vllm import engine as engine_module
from r1dist.generation.vllm.client import Client, ServerError, open_session
from r1dist.generation.vllm.endpoints import Endpoints, Server, ServerRegistry, read, write
from r1dist.generation.vllm.engine import Policy, ServerEngine
from r1dist.generation.vllm.liveness import Liveness
from r1dist.generation.vllm.supervisor import Supervisor
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

    def build(
        servers, score=lambda tokens: [LOGPROB] * (len(tokens) - 1), release_memory=lambda: None, **settings
    ) -> ServerEngine:
        urls = ",".join(server.url for server in servers)
        rollout = Rollout(engine="vllm", servers=urls, transport="shm", **{"no_server_timeout": 3, **settings})
        policy = Policy(
            score, probe=[3, 4], probe_tokens=4, stop_ids=[0], rank=0, ranks=1, broadcast=lambda value: value,
            release_memory=release_memory,
        )  # fmt: skip
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
    # In a batch with one request that has no seed, vLLM's CPU sampler ignores all others' seeds.
    assert servers[0].asked["unseeded"] + servers[1].asked["unseeded"] == 0


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


def test_a_request_that_is_late_twice_costs_two_requests(engine_of, servers):
    engine = engine_of(servers[:1], request_timeout=1, max_concurrent_requests=80)
    engine.sync_weights(0)
    before = servers[0].asked["completions"]
    servers[0].hold([3, 7], times=2)
    rollouts = generate(engine, asked(prompts=20), SAMPLING)
    assert [r.request for r in rollouts] == asked(prompts=20)
    assert servers[0].asked["completions"] - before == 22
    counted = engine.metrics()
    assert counted["rollout/errors/late"] == counted["rollout/resent"] == 2


def test_a_server_that_answers_is_waited_for(engine_of, servers, monkeypatch):
    """After a failure it is busy with one group for longer than a run is without any server."""
    monkeypatch.setattr(engine_module, "MONITOR_SECONDS", 0.1)
    engine = engine_of(servers[:1], no_server_timeout=1.5)
    engine.sync_weights(0)
    servers[0].misbehave("500")
    servers[0].delay = 0.3
    handle = engine.submit(asked(prompts=1), SAMPLING)
    time.sleep(0.6)
    servers[0].misbehave(None)
    servers[0].delay = 3
    assert len(list(handle)) == 4
    assert engine.metrics()["rollout/errors/status_500"] == 1


def test_a_server_that_computes_for_longer_than_a_health_check_is_left_at_work(engine_of, servers, monkeypatch):
    monkeypatch.setattr(engine_module, "MONITOR_SECONDS", 0.1)
    engine = engine_of(servers[:1], health_timeout=0.5)
    engine.sync_weights(0)
    before = servers[0].asked["completions"]
    servers[0].busy, servers[0].delay = True, 2.5
    assert len(generate(engine, asked(prompts=3), SAMPLING)) == 12
    assert servers[0].asked["completions"] - before == 3
    servers[0].busy = False
    assert not [name for name in engine.metrics() if "errors" in name]


def state(running: int | None = 1, seconds: float | None = 5.0, tokens: float = 9) -> dict:
    return {"running": running, "processor_seconds": seconds, "tokens": tokens, "shape": {}}


@pytest.mark.parametrize(
    ("changes", "hung"),
    [
        (lambda i: state(), True),
        (lambda i: state(seconds=5 + 0.001 * i), True),  # what waiting takes
        (lambda i: state(seconds=5 + i), False),
        (lambda i: state(tokens=i), False),
        (lambda i: state(running=0), False),
        (lambda i: state(running=int(i > 8)), False),  # it has just been asked
        (lambda i: state(seconds=5.0 - i), False),  # started anew
        (lambda i: state(seconds=None), False),
        (lambda i: None, False),  # a server without our middleware does not say
    ],
)
def test_an_engine_that_has_requests_and_computes_nothing_is_hung(servers, changes, hung):
    async def watch():
        async with open_session() as session:
            liveness = Liveness(Client(session, servers[0].url, None), patience=0.5)
            for i in range(10):
                servers[0].engine = changes(i)
                await liveness.probe(timeout=5)
                await asyncio.sleep(0.1)

    if hung:
        with pytest.raises(ServerError, match=r"hung: 1 completions run, but for 0\.5 s its engine has"):
            asyncio.run(watch())
    else:
        asyncio.run(watch())


def test_an_engine_at_which_nobody_looked_is_not_hung(servers):
    async def watch():
        async with open_session() as session:
            liveness = Liveness(Client(session, servers[0].url, None), patience=0.5)
            for running in (0, 1, 1, 0, 1):
                servers[0].engine = state(running=running)
                await liveness.probe(timeout=5)
                await asyncio.sleep(0.7)

    asyncio.run(watch())


def test_a_request_that_servers_refuse_stops_the_run(engine_of, servers):
    engine = engine_of(servers)
    engine.sync_weights(0)
    for server in servers:
        server.misbehave("400")
    with pytest.raises(RolloutsLost, match="refuses the request"):
        generate(engine, asked(), SAMPLING)


def test_an_engine_that_hangs_behind_a_server_that_answers_is_taken_out(engine_of, servers, monkeypatch):
    monkeypatch.setattr(engine_module, "MONITOR_SECONDS", 0.1)
    engine = engine_of(servers, health_timeout=1, request_timeout=10)
    engine.sync_weights(0)
    servers[0].engine = state()
    servers[0].misbehave("hang")
    assert [r.request for r in generate(engine, asked(), SAMPLING)] == asked()
    assert engine.metrics()["rollout/errors/hung"] >= 1


def test_a_managed_server_is_left_at_work_and_ended_when_it_hangs(servers, tmp_path):
    supervisor = Supervisor(Serve(hang_timeout=1), "model", "shm", tmp_path / "endpoints.json")
    replica = supervisor.replicas[0]
    replica.process = subprocess.Popen(["sleep", "100"], start_new_session=True)
    servers[0].busy, servers[0].engine = True, state(running=0)

    async def fault(seconds: float) -> str:
        async with open_session() as session:
            client = Client(session, servers[0].url, None)
            assert await supervisor._coming_up(replica, client) is None
            return await asyncio.wait_for(supervisor._fault(replica, client), seconds)

    try:
        with pytest.raises(TimeoutError):
            asyncio.run(fault(7))
        servers[0].engine = state(running=2)
        assert "2 completions run" in asyncio.run(fault(30))
    finally:
        replica.process.kill()
        replica.process.wait()


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


def test_a_sleeping_server_is_woken_as_memory_becomes_free(engine_of, servers):
    [server] = used = servers[:1]
    engine = engine_of(used, sleep=True, release_memory=lambda: server.calls.append("empty_cache"))
    for step in range(2):
        server.calls.clear()
        engine.sync_weights(step)
        generate(engine, asked(), SAMPLING)
        engine.end_generation()
        order = ["empty_cache", "wake_up(weights)", "update_weights", "wake_up(kv_cache)", "completions", "sleep"]
        places = [server.calls.index(call) for call in order]
        assert places == sorted(places), server.calls
        assert server.asked["wake_up"] == 2 * (step + 1)
    server.calls.clear()
    generate(engine, asked(), SAMPLING)  # another generation of the same step
    assert server.calls[:4] == ["empty_cache", "wake_up(weights)", "wake_up(kv_cache)", "completions"]


def test_a_server_that_does_not_wake_is_given_no_weights(engine_of, servers, monkeypatch):
    monkeypatch.setattr(engine_module, "MONITOR_SECONDS", 0.1)
    engine = engine_of(servers, sleep=True)
    engine.sync_weights(0)
    engine.end_generation()
    servers[0].refused["wake_up"] = "500"
    engine.sync_weights(1)
    assert servers[0].asked["update_weights"] == 1 and servers[1].asked["update_weights"] == 2
    assert [r.request for r in generate(engine, asked(), SAMPLING)] == asked()
    assert servers[0].asked["update_weights"] == 1
    assert engine.metrics()["rollout/errors/status_500"] >= 1
    servers[0].refused.clear()
    for _ in range(100):  # it is tried again after a pause
        generate(engine, asked(), SAMPLING)
        if servers[0].version == servers[1].version:
            break
        time.sleep(0.1)
    assert servers[0].version == servers[1].version and not servers[0].asleep


@pytest.mark.parametrize("trains", [True, False])
def test_a_server_that_another_run_left_asleep_is_woken(engine_of, servers, trains):
    servers[0].asleep = {"weights", "kv_cache"}
    engine = engine_of(servers[:1])
    if trains:
        engine.sync_weights(0)
    else:
        engine.use_loaded_weights()
    assert not servers[0].asleep
    assert len(generate(engine, asked(), SAMPLING)) == len(asked())


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
