"""Real vLLM servers, started by `launch/serve.py` as a person starts them."""

import asyncio
import json
import os
import signal
import time
from contextlib import contextmanager

import psutil
import pytest
import requests as http
import torch
from conftest import launch, write_yaml
from small_runs import served
from transformers import AutoConfig, AutoModelForCausalLM

from r1dist.config import Model, Rollout
from r1dist.errors import UserError
from r1dist.generation.engine import Request, Sampling, generate, sample_seed
from r1dist.generation.vllm.client import Client, ServerError, open_session
from r1dist.generation.vllm.endpoints import Endpoints, ServerRegistry, read
from r1dist.generation.vllm.engine import Policy, ServerEngine
from r1dist.generation.vllm.limits import Demand, check_running
from r1dist.generation.vllm.liveness import Liveness
from r1dist.generation.weight_sync.files import write_folder
from r1dist.generation.weight_sync.source import WeightSource
from r1dist.generation.weight_sync.transports import FileTransport, begin_and_finish, name_weights
from r1dist.tiny import BASE_DIR

pytest.importorskip("vllm")

END = 360
PROMPT = [362, 301, 198, 18, 10, 19, 9, 17, 28, 360, 198, 362, 285, 310, 198]
"""The chat prompt of `3+4*2=`."""


@pytest.fixture(scope="module")
def serving(tmp_path_factory):
    """The endpoints file of two servers, stopped by SIGTERM at the end."""
    path = tmp_path_factory.mktemp("serve") / "endpoints.json"
    with served(path, "--replicas", "2", "--max_model_len", "256", "--max-num-seqs", "64"):
        yield path


@pytest.fixture(scope="module")
def endpoints(serving) -> Endpoints:
    return read(serving)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """(endpoints file, supervisor) of one server whose processes can be looked at: see start.py."""
    path = tmp_path_factory.mktemp("real") / "endpoints.json"
    with served(path, "--max_model_len", "256", "--max-num-seqs", "64", real=True) as process:
        yield path, process


@contextmanager
def asking(endpoints: Endpoints, model, tmp_path):
    """An engine whose policy is `model`."""

    def score(tokens):
        with torch.no_grad():
            logprobs = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
        return logprobs.gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1).tolist()

    urls = ",".join(server.url for server in endpoints.servers)
    token = tmp_path / "token"
    token.write_text(endpoints.token)
    rollout = Rollout(engine="vllm", servers=urls, transport="shm", token_file=str(token))
    policy = Policy(score, probe=PROMPT, probe_tokens=16, stop_ids=[END], rank=0, ranks=1, broadcast=lambda v: v)
    transport = FileTransport(WeightSource(model, torch.float32), tmp_path, writes=True)
    engine = ServerEngine(rollout, ServerRegistry(rollout, None), transport, policy)
    try:
        yield engine
    finally:
        engine.close()


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype="float32").eval()


def asked(prompts: int, samples: int = 4) -> list[Request]:
    prompts = [PROMPT[:4] + [16 + p % 10] + PROMPT[5:] for p in range(prompts)]
    return [Request(ids, p, i, sample_seed(0, 0, p, i)) for p, ids in enumerate(prompts) for i in range(samples)]


def test_the_endpoints_file_tells_all_and_only_its_owner(serving, endpoints):
    assert serving.stat().st_mode & 0o777 == 0o600
    assert [server.name for server in endpoints.servers] == ["server0", "server1"]
    assert all(server.url.startswith("http://127.0.0.1:") for server in endpoints.servers)
    assert endpoints.transport == "shm" and len(endpoints.token) >= 32
    arguments = [" ".join(p.cmdline()) for p in psutil.process_iter() if p.pid in {s.pid for s in endpoints.servers}]
    assert len(arguments) == 2 and not any(endpoints.token in words for words in arguments)
    assert all("--max-num-seqs 64" in words for words in arguments)  # passed through


def test_vllm_finds_the_models_configuration_with_the_tokenizer(serving, model):
    assert AutoConfig.from_pretrained(f"{serving}.tokenizer").vocab_size == model.config.vocab_size
    assert "Error parsing config" not in (serving.parent / "server0.log").read_text()


def test_no_route_answers_without_the_token(endpoints):
    url = endpoints.servers[0].url
    right = {"Authorization": f"Bearer {endpoints.token}"}
    version = http.get(f"{url}/weight_info", headers=right, timeout=10).json()
    routes = http.get(f"{url}/openapi.json", headers=right, timeout=10).json()["paths"]
    assert {"/update_weights", "/collective_rpc", "/sleep", "/wake_up", "/v1/completions", "/health"} <= routes.keys()
    tried = 0
    for path in [*routes, "/openapi.json", "/docs", "/metrics", "/nowhere"]:
        for method in {"get", "post", "options", *routes.get(path, {})}:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": endpoints.token}):
                answer = http.request(method, url + path, headers=headers, json={"new_version": "x"}, timeout=10)
                assert answer.status_code == 401, (method, path)
                tried += 1
    assert tried > 250
    assert http.get(f"{url}/weight_info", headers=right, timeout=10).json() == version


@pytest.mark.parametrize("by_url", [True, False])
def test_servers_that_fit_are_accepted(serving, endpoints, tokenizer, tmp_path, by_url):
    token = tmp_path / "token"
    token.write_text(endpoints.token)
    urls = {"servers": endpoints.servers[0].url, "transport": "shm", "token_file": str(token)}
    rollout = Rollout(engine="vllm", **(urls if by_url else {"servers": str(serving)}))
    for trains in (False, True):
        check_running(rollout, Demand(Model(path="tiny"), tokenizer, PROMPT, 256 - len(PROMPT), trains))
    small = Demand(Model(path="tiny-small"), tokenizer, PROMPT, 20, trains=True)
    with pytest.raises(UserError, match="another model: its hidden_size is 160"):
        check_running(rollout, small)


def test_rollouts_are_the_policys_and_two_servers_never_give_the_same_twice(endpoints, model, tmp_path):
    with torch.no_grad():
        for parameter in model.parameters():  # weights that the servers did not load at their start
            parameter.mul_(1.05)
    with asking(endpoints, model, tmp_path) as engine:
        engine.sync_weights(0)
        rollouts = generate(engine, asked(12, 8), Sampling(max_tokens=24))
        counted = engine.metrics()
        again = generate(engine, asked(12, 8), Sampling(max_tokens=24))
        cut = generate(engine, asked(4), Sampling(max_tokens=3))
    assert counted["rollout/logp_diff"] < 1e-3 and counted["rollout/servers"] == 2
    assert [r.request for r in rollouts] == asked(12, 8)
    for prompt in range(12):
        texts = [tuple(r.token_ids) for r in rollouts[8 * prompt : 8 * prompt + 8]]
        assert len(set(texts)) > 4
    same = sum(a.token_ids == b.token_ids for a, b in zip(rollouts, again, strict=True))
    assert same > 0.9 * len(rollouts)  # a seed is a sample, whichever server draws it; rounding may differ
    for rollout in rollouts[::7]:
        ids = torch.tensor([rollout.request.prompt_ids + rollout.token_ids])
        with torch.no_grad():
            own = model(ids).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
            own = own.gather(1, ids[0, len(PROMPT) :, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(rollout.logprobs), own, atol=2e-3, rtol=0)
        assert (rollout.finish_reason == "stop") == (rollout.token_ids[-1] == END)
    assert all(r.finish_reason == "stop" or len(r.token_ids) == 3 for r in cut)


def test_a_payload_that_is_not_whole_changes_nothing_and_kills_nobody(endpoints, model, tmp_path):
    def weights(change) -> dict:
        tensors = {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}
        change(tensors)
        folder = tmp_path / str(time.monotonic_ns())
        return {"folder": str(folder), "digest": write_folder(folder, [list(tensors.items())])}

    def drop_head(tensors):
        del tensors["lm_head.weight"]

    def reshape(tensors):
        tensors["model.norm.weight"] = torch.zeros(7)

    def add(tensors):
        tensors["model.extra"] = torch.zeros(2)

    async def go():
        async with open_session() as session:
            client = Client(session, endpoints.servers[0].url, endpoints.token)
            before = (await client.weight_version(10), await client.prompt_logprobs(list(range(10, 30)), 10))
            for change in (drop_head, reshape, add):
                with pytest.raises(ServerError, match="500"):
                    await begin_and_finish(client, weights(change), 30)
            missing = {"folder": str(tmp_path / "nowhere"), "digest": "0"}
            with pytest.raises(ServerError, match="500"):
                await begin_and_finish(client, missing, 30)
            after = (await client.weight_version(10), await client.prompt_logprobs(list(range(10, 30)), 10))
            assert after == before
            await begin_and_finish(client, weights(lambda tensors: None), 30)
            await name_weights(client, "good", 30)
            assert await client.weight_version(10) == "good"

    asyncio.run(go())


def test_an_update_whose_trainer_died_does_not_lock_the_next_one_out(endpoints, model, tmp_path):
    right = {"Authorization": f"Bearer {endpoints.token}"}
    http.post(f"{endpoints.servers[1].url}/start_weight_update", headers=right, timeout=10).raise_for_status()
    with asking(endpoints, model, tmp_path) as engine:
        engine.sync_weights(1)
        assert engine.metrics()["rollout/servers"] == 2


def test_a_run_that_needs_more_than_these_servers_hold_is_refused(serving, small_grpo, tmp_path):
    rollout = {"engine": "vllm", "servers": str(serving)}
    config = write_yaml(tmp_path / "run.yaml", {**small_grpo, "rollout": rollout})
    done = launch("grpo.py", "--config", config, "--max_completion_length", "300")
    assert done.returncode == 2, done.stderr
    assert "holds 256 tokens, and 3" in done.stderr and "Start it with --max_model_len 3" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_second_group_of_servers_does_not_take_the_first_ones_file(serving):
    done = launch("serve.py", "--model.path", "tiny", "--endpoints", serving)
    assert done.returncode == 2 and "is there already" in done.stderr and serving.exists()


@pytest.mark.parametrize("stopped", ["VLLM::EngineCore", "VLLM::Worker"])
def test_an_engine_that_hangs_is_found_while_its_server_answers(real, stopped):
    endpoints = read(real[0])
    family = psutil.Process(endpoints.servers[0].pid).children(recursive=True)
    [engine] = [process for process in family if process.name().startswith(stopped)]

    async def go():
        async with open_session() as session:
            client = Client(session, endpoints.servers[0].url, endpoints.token)
            liveness = Liveness(client, patience=3)
            drawn = [client.complete(PROMPT, 8, seed, Sampling(max_tokens=230), [], 300) for seed in range(0, 2400, 8)]
            asking = asyncio.gather(*drawn)
            try:
                for _ in range(10):
                    await liveness.probe(timeout=10)
                    await asyncio.sleep(0.5)
                assert (await client.health(10)).running > 64
                engine.send_signal(signal.SIGSTOP)
                with pytest.raises(ServerError, match=r"hung: \d+ completions run"):
                    for _ in range(200):
                        await liveness.probe(timeout=10)
                        await asyncio.sleep(0.5)
                engine.send_signal(signal.SIGCONT)
                before = (await client.health(10)).tokens
                await asyncio.sleep(2)
                assert (await client.health(10)).tokens > before
            finally:
                engine.send_signal(signal.SIGCONT)
                asking.cancel()

    asyncio.run(go())


def test_servers_do_not_outlive_a_supervisor_that_was_killed(real):
    path, process = real
    server = psutil.Process(read(path).servers[0].pid)
    family = [server, *server.children(recursive=True)]
    assert len(family) >= 3  # with its engine and its worker
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(family, timeout=10)
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_servers_that_cannot_start_are_told_of(tmp_path):
    path = tmp_path / "endpoints.json"
    done = launch("serve.py", "--model.path", "tiny", "--endpoints", path, "--no-such-flag", "1")
    assert done.returncode == 3, done.stderr
    assert "no server could be started" in done.stderr and "no-such-flag" in done.stderr
    assert json.loads(path.read_text())["servers"][0]["state"] == "failed"
