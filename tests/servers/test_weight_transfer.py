"""`ipc` and `nccl` with vLLM's own engines at both ends, over stand-ins for CUDA and NCCL alone."""

import signal
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from stub_server import LOGPROB, StubServer
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config

from r1dist.config import GRPORun, Rollout
from r1dist.config.loader import build
from r1dist.errors import RunStopped
from r1dist.files import CHECKSUMS
from r1dist.generation.engine import Request, RolloutsLost, Sampling, generate, sample_seed
from r1dist.generation.vllm import engine as engine_module
from r1dist.generation.vllm import start
from r1dist.generation.vllm.client import Client
from r1dist.generation.vllm.endpoints import ServerRegistry
from r1dist.generation.vllm.engine import Policy, ServerEngine
from r1dist.generation.weight_sync.source import WeightSource
from r1dist.rewards import verifiers_of
from r1dist.rewards.pool import Pool
from r1dist.rl.train import _train

pytest.importorskip("vllm")

import cuda_stand_in
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
from weight_receiver import Receiver, checksum, receiving_engine

from r1dist.generation.weight_sync import gpu

SAMPLING = Sampling(max_tokens=8)
TIMEOUT = 4


@pytest.fixture(autouse=True)
def cuda(monkeypatch):
    cuda_stand_in.install(monkeypatch.setattr)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        monkeypatch.setenv("CUDA_STAND_IN", folder)
        yield


@pytest.fixture
def small_chunks(monkeypatch):
    """Eight layers need several broadcasts, and more than a socket buffers."""
    monkeypatch.setattr(gpu, "PACKED_BYTES", 1)


@pytest.fixture
def receiver_of():
    receivers = []

    def begin(backend: str) -> Receiver:
        receivers.append(Receiver(backend))
        return receivers[-1]

    yield begin
    for receiver in receivers:
        receiver.end()


@pytest.fixture
def stubs():
    pair = [StubServer(), StubServer()]
    yield pair
    for server in pair:
        server.stop()


def small_model() -> nn.Module:
    return nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8)))


def asked(prompts: int = 8) -> list[Request]:
    return [Request([3, p], p, i, sample_seed(0, 0, p, i)) for p in range(prompts) for i in range(2)]


def policy_of(rank: int = 0, ranks: int = 1, broadcast=lambda value: value) -> Policy:
    def score(tokens):
        return [LOGPROB] * (len(tokens) - 1)

    return Policy(score, probe=[3, 4], probe_tokens=4, stop_ids=[0], rank=rank, ranks=ranks, broadcast=broadcast)


def transport_of(model: nn.Module, backend: str, policy: Policy, dtype=torch.float32, timeout=TIMEOUT):
    rollout = Rollout(engine="vllm", sync_timeout=timeout)
    return start._transport(rollout, backend, WeightSource(model, dtype), policy)


@pytest.fixture
def engine_of(monkeypatch):
    monkeypatch.setattr(engine_module, "MONITOR_SECONDS", 0.1)
    engines = []

    def build(servers, backend: str, model: nn.Module) -> ServerEngine:
        urls = ",".join(server.url for server in servers)
        limits = {"no_server_timeout": 2, "health_timeout": 3, "sync_timeout": TIMEOUT, "request_timeout": 10}
        rollout = Rollout(engine="vllm", servers=urls, transport=backend, **limits)
        policy = policy_of()
        transport = transport_of(model, backend, policy)
        engines.append(ServerEngine(rollout, ServerRegistry(rollout, None), transport, policy))
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()


def sent(model: nn.Module, dtype: torch.dtype) -> dict[str, tuple]:
    source = WeightSource(model, dtype)
    return {name: checksum(tensor.detach()) for bucket in source.buckets() for name, tensor in bucket}


def test_the_embedding_of_a_7b_model_arrives_over_ipc(receiver_of):
    """152064 x 3584 in bf16 is more than vLLM's buffer of 1 GiB."""
    shape = {"vocab_size": 152064, "hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4}
    config = Qwen2Config(**shape, intermediate_size=512, num_hidden_layers=1, tie_word_embeddings=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu").tie_weights()
    block = torch.randint(-32768, 32767, (65521,), dtype=torch.int16)
    for parameter in model.parameters():
        flat = parameter.data.view(torch.int16).view(-1)
        flat.copy_(block.repeat(flat.numel() // len(block) + 1)[: flat.numel()])
    receiver = receiver_of("ipc")
    transport = transport_of(model, "ipc", policy_of(), dtype=torch.bfloat16, timeout=60)
    assert not transport.publish("v0", [Client(None, receiver.url, "secret")])
    received = receiver.received()
    assert received == sent(model, torch.bfloat16)
    assert received["lm_head.weight"][1] == (152064, 3584)
    [link] = transport.links.values()
    assert link.engine.packed_buffer_size_bytes == 152064 * 3584 * 2
    transport.close()


@pytest.mark.parametrize("backend", ["ipc", "nccl"])
def test_each_sync_brings_the_bytes_of_its_step(receiver_of, engine_of, small_chunks, backend):
    receiver, model = receiver_of(backend), small_model()
    engine = engine_of([receiver], backend, model)
    for step in range(2):
        engine.sync_weights(step)
        assert receiver.received() == sent(model, torch.float32)
        assert {rollout.policy_version for rollout in generate(engine, asked(), SAMPLING)} == {step}
        for parameter in model.parameters():
            parameter.data.add_(1)


@pytest.mark.parametrize(
    ("ends_by", "raises"),
    [(signal.SIGKILL, False), (signal.SIGKILL, True), (signal.SIGSTOP, False)],
    ids=["killed", "killed and noticed", "stopped"],
)
def test_a_worker_lost_within_a_broadcast_costs_its_server(
    receiver_of, engine_of, small_chunks, monkeypatch, ends_by, raises
):
    monkeypatch.setattr(cuda_stand_in.Communicator, "raises", raises)
    receivers, model = [receiver_of("nccl"), receiver_of("nccl")], small_model()
    engine = engine_of(receivers, "nccl", model)
    engine.sync_weights(0)
    assert engine.metrics()["rollout/servers"] == 2
    receivers[0].end_within_a_load(ends_by)
    began = time.monotonic()
    engine.sync_weights(1)
    assert engine.metrics()["rollout/servers"] == 1
    assert len(generate(engine, asked(), SAMPLING)) == len(asked())
    receivers[1].end_within_a_load(ends_by)
    engine.sync_weights(2)
    with pytest.raises(RolloutsLost, match="no server could be used"):
        generate(engine, asked(), SAMPLING)
    assert time.monotonic() - began < 4 * TIMEOUT


def test_a_run_whose_only_server_is_lost_within_a_broadcast_ends_with_a_checkpoint(
    receiver_of, small_chunks, small_grpo
):
    receiver = receiver_of("nccl")
    limits = {"no_server_timeout": 2, "health_timeout": 3, "sync_timeout": TIMEOUT, "max_logp_diff": 1e9}
    rollout = {"engine": "vllm", "servers": receiver.url, "transport": "nccl", **limits}
    run = build(GRPORun, {**small_grpo, "rollout": rollout, "max_steps": 10_000}, "run.yaml")
    folder, ended = Path(run.trl["output_dir"]), []

    def end_the_server() -> None:
        while not (folder / "metrics.jsonl").exists():
            time.sleep(0.05)
        receiver.end_within_a_load(signal.SIGKILL)
        ended.append(time.monotonic())

    threading.Thread(target=end_the_server, daemon=True).start()
    with (
        Pool(verifiers_of(run.rewards, run.data.sources), run.verify) as pool,
        pytest.raises(RunStopped, match="no server could be used"),
    ):
        _train(run, pool)
    assert time.monotonic() - ended[0] < 60
    [checkpoint] = folder.glob("checkpoint-*")
    assert (checkpoint / CHECKSUMS).exists() and checkpoint.name != "checkpoint-0"


@pytest.mark.parametrize(
    ("backend", "call", "answer", "kind"),
    [
        ("ipc", "init_weight_transfer_engine", "500", "status_500"),
        ("ipc", "start_weight_update", "503", "status_503"),
        ("ipc", "update_weights", "500", "status_500"),
        ("ipc", "update_weights", "die", "unreachable"),
        ("ipc", "finish_weight_update", "die", "unreachable"),
        ("nccl", "init_weight_transfer_engine", "500", "status_500"),
        ("nccl", "init_weight_transfer_engine", "die", "unreachable"),
    ],
)
def test_a_server_that_fails_a_sync_is_left_out_of_it(stubs, engine_of, backend, call, answer, kind):
    engine = engine_of(stubs if backend == "ipc" else stubs[:1], backend, small_model())
    stubs[0].refused[call] = answer
    began = time.monotonic()
    engine.sync_weights(0)
    assert time.monotonic() - began < TIMEOUT
    counted = engine.metrics()
    assert counted["rollout/servers"] == len(engine.servers) - 1 and counted[f"rollout/errors/{kind}"] == 1
    if backend == "ipc":
        assert len(generate(engine, asked(), SAMPLING)) == len(asked())
        stubs[0].refused.clear()
        engine.sync_weights(1)
        assert stubs[0].version == stubs[1].version == engine._label


class FusedModel(nn.Module):
    """Query, key and value in one weight, as in vLLM's attention. It runs out of memory once, at the value."""

    ROWS = {"q": (0, 8), "k": (8, 10), "v": (10, 12)}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 12, bias=False)
        self.qkv.weight.weight_loader = self._load
        self.fails = True
        record_metadata_for_reloading(self)

    @staticmethod
    def _load(param, loaded, rows) -> None:
        param.data[slice(*rows)].copy_(loaded)

    def load_weights(self, weights) -> None:
        parameter = self.qkv.weight
        for name, tensor in weights:
            if self.fails and name == "v.weight":
                self.fails = False
                raise RuntimeError("out of memory")
            parameter.weight_loader(parameter, tensor, self.ROWS[name[0]])


def test_nothing_of_a_failed_update_is_left_in_the_next_one(engine_of, monkeypatch):
    monkeypatch.setattr(gpu, "PACKED_BYTES", 10 * 8 * 4)  # query and key in one chunk, the value in the next
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    receiving = FusedModel()
    server = StubServer(receiver=receiving_engine("ipc", receiving))
    model = nn.ModuleDict(
        {name: nn.Linear(8, stop - begin, bias=False) for name, (begin, stop) in FusedModel.ROWS.items()}
    )
    engine = engine_of([server], "ipc", model)
    for held in (0, 1):
        engine.sync_weights(held)
        assert (server.version == engine._label) == held
        wanted = torch.cat([layer.weight.detach().clone() for layer in model.values()])
        for parameter in model.parameters():
            parameter.data.add_(1)
    assert torch.equal(receiving.qkv.weight, wanted)
    server.stop()


def test_an_update_that_a_killed_trainer_left_open_is_finished_first(stubs, engine_of):
    stubs[0].updating = True
    engine = engine_of(stubs, "ipc", small_model())
    engine.sync_weights(0)
    assert engine.metrics()["rollout/servers"] == 2
    updates = [call for call in stubs[0].calls if "weight_update" in call]
    begun, finished = "start_weight_update", "finish_weight_update"
    assert updates == [begun, finished, begun, finished]


def test_servers_are_not_asked_through_a_proxy(stubs, engine_of, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    engine = engine_of(stubs, "ipc", small_model())
    engine.sync_weights(0)
    assert engine.metrics()["rollout/servers"] == 2


def test_every_rank_learns_that_a_server_is_lost(stubs):
    told, turn = [None], threading.Barrier(2)

    def broadcast_from(rank: int):
        def broadcast(value):
            if rank == 0:
                told[0] = value
            turn.wait(10)
            value = told[0]
            turn.wait(10)
            return value

        return broadcast

    model, clients = small_model(), [Client(None, server.url, None) for server in stubs]
    ranks = [transport_of(model, "ipc", policy_of(rank, 2, broadcast_from(rank))) for rank in range(2)]
    stubs[0].refused["update_weights"] = "500"
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda rank, given: ranks[rank].publish("v0", given), range(2), [clients, []])
    assert first.keys() == {stubs[0].url} and second == {}
    assert ranks[0].links.keys() == ranks[1].links.keys() == {stubs[1].url}


def test_a_server_that_comes_back_is_given_weights_only_while_the_trainer_waits(stubs, engine_of):
    """As with `max_staleness: 1`: a generation is in the making while the optimizer moves the weights."""
    [server] = servers = stubs[:1]
    engine = engine_of(servers, "ipc", small_model())
    engine.sync_weights(0)
    server.delay = 2.5
    handle = engine.submit(asked(), SAMPLING)
    server.version = "default"  # as after a restart
    engine.transport.links.clear()
    before = server.asked["update_weights"]
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:  # the trainer trains
        assert server.asked["update_weights"] == before
        time.sleep(0.05)
    list(handle)
    server.delay = 0
    for _ in range(20):
        generate(engine, asked(), SAMPLING)
        if server.asked["update_weights"] > before:
            break
    assert server.asked["update_weights"] == before + 1 and server.version == engine._label
