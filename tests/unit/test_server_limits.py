"""Servers that exist and cannot do what a run will ask of them: refused before anything is written."""

from types import SimpleNamespace

import pytest
from stub_server import StubServer

from r1dist.config import GRPORun, Model, Rollout, SampleRun
from r1dist.config.loader import build
from r1dist.errors import UserError
from r1dist.generation.trainer_engines import training_servers
from r1dist.generation.vllm import start
from r1dist.generation.vllm.devices import GIB, GPU
from r1dist.generation.vllm.endpoints import Endpoints, Server, write
from r1dist.generation.vllm.limits import Demand, check_running
from r1dist.rl.train import train
from r1dist.sampling.run import sample
from r1dist.tiny import BASE_DIR

SHAPE = {"vocab_size": 363, "hidden_size": 160, "num_hidden_layers": 4}


@pytest.fixture
def server():
    server = StubServer()
    server.models = {"max_model_len": 64, "root": str(BASE_DIR)}
    server.engine = {"running": 0, "processor_seconds": 1.0, "tokens": 0, "shape": SHAPE}
    yield server
    server.stop()


def check(tokenizer, *urls: str, completion: int = 44, trains: bool = True, **settings) -> None:
    rollout = Rollout(engine="vllm", servers=",".join(urls), **{"transport": "shm", "health_timeout": 1} | settings)
    demand = Demand(Model(path="tiny"), tokenizer, tokenizer("1+1=")["input_ids"] * 5, completion, trains)
    check_running(rollout, demand)


@pytest.mark.parametrize("trains", [True, False])
def test_a_server_that_fits_is_accepted_whether_or_not_it_tells_of_its_engine(server, tokenizer, trains):
    check(tokenizer, server.url, trains=trains)
    server.engine = None
    check(tokenizer, server.url, trains=trains)


def test_a_context_that_is_too_small_is_refused_with_the_number_that_is_needed(server, tokenizer):
    refusal = (
        r"holds 64 tokens, and 65 are needed: a prompt of 20 and a completion of 45.\nStart it with .* 65 or more"
    )
    with pytest.raises(UserError, match=refusal):
        check(tokenizer, server.url, completion=45)


def _chunked(server):
    server.settings["scheduler_config"]["enable_chunked_prefill"] = True


@pytest.mark.parametrize(
    ("change", "trains", "refusal"),
    [
        (lambda s: s.engine["shape"].update(hidden_size=64), True, "its hidden_size is 64, that of tiny is 160"),
        (lambda s: s.engine["shape"].update(vocab_size=500), False, "its vocab_size is 500, that of tiny is 363"),
        (lambda s: setattr(s, "tokenize", lambda text: list(range(len(text)))), True, "another vocabulary"),
        (lambda s: s.models.update(root="other/model"), False, "serves other/model, and the samples are to be tiny's"),
        (lambda s: setattr(s, "version", "ab-3"), False, r"weights of a training run \(ab-3\), not those of tiny"),
        (lambda s: s.settings.update(weight_transfer_config=None), True, "takes weights by None, .* by shm"),
        (lambda s: s.settings.update(weight_transfer_config={"backend": "nccl"}), True, "by nccl, .* by shm"),
        (_chunked, True, "a request with a seed would kill it.\nStart it .* --no-enable-chunked-prefill"),
        (_chunked, False, "a request with a seed would kill it"),
    ],
)
def test_a_server_of_another_kind_is_refused(server, tokenizer, change, trains, refusal):
    server.engine = {**server.engine, "shape": dict(SHAPE)}
    change(server)
    with pytest.raises(UserError, match=rf"^rollout\.servers: {server.url} .*{refusal}") as refused:
        check(tokenizer, server.url, trains=trains)
    assert len(str(refused.value).splitlines()) == 2


def test_weights_that_are_replaced_may_be_anothers_and_a_gpu_may_chunk(server, tokenizer):
    server.models["root"], server.version = "other/checkpoint", "ab-3"
    _chunked(server)
    server.settings["device_config"]["device"] = "cuda"
    check(tokenizer, server.url)


def test_a_transport_that_the_servers_were_not_started_for_is_refused(server, tokenizer, tmp_path):
    file = tmp_path / "endpoints.json"
    write(file, Endpoints([Server("server0", server.url, "ready")], "shm"))
    check(tokenizer, str(file), transport="auto")
    with pytest.raises(UserError, match=r"rollout\.transport: nccl is asked for, but .* for shm"):
        check(tokenizer, str(file), transport="nccl")


@pytest.mark.parametrize("changes", [{"models": {}}, {"tokenize": lambda text: None}, {"settings": None}])
def test_what_answers_and_is_no_such_server_is_refused(server, tokenizer, changes):
    vars(server).update(changes)
    with pytest.raises(
        UserError, match=rf"no server can be used. {server.url}: garbage: no `\w+` in the answer\nCheck"
    ):
        check(tokenizer, server.url)
    with pytest.raises(UserError, match=r"no server can be used\. .*404"):
        check(tokenizer, server.url + "/v1")


def test_a_server_that_is_not_there_is_refused_unless_another_is(server, tokenizer, caplog):
    absent = "http://127.0.0.1:9"
    with pytest.raises(UserError, match=rf"no server can be used. {absent}: unreachable.*\nCheck the address"):
        check(tokenizer, absent)
    check(tokenizer, absent, server.url)
    assert f"{absent}: unreachable" in caplog.text


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize(
    ("rollout", "refusal"),
    [
        ({}, r"rollout\.servers: http.* holds 64 tokens, and \d+ are needed"),
        ({"servers": "managed", "serve": {"max_model_len": 64}}, r"rollout\.serve\.max_model_len: 64 is too small"),
        ({"servers": "managed", "serve": {"arguments": ["--max-model-len=64"]}}, "Set `max_model_len` instead"),
    ],
)
def test_it_is_refused_before_anything_is_written(server, small_grpo, tmp_path, monkeypatch, rollout, refusal, trains):
    for launched in ("r1dist.rl.train", "r1dist.sampling.run"):
        monkeypatch.setattr(f"{launched}.set_up_process", lambda **_: None)  # once in a process
    monkeypatch.setattr(start, "require_vllm", lambda: None)
    rollout = {"engine": "vllm", "servers": server.url, "transport": "shm", **rollout}
    with pytest.raises(UserError, match=refusal):
        if trains:
            train(build(GRPORun, {**small_grpo, "rollout": rollout, "max_completion_length": 60}, "run.yaml"))
        else:
            generator = {"name": "tiny", "model": {"path": "tiny"}, "data": small_grpo["data"]}
            generator["sampling"] = {"max_tokens": 60}
            tree = {"output_dir": str(tmp_path / "run"), "generators": [generator], "rollout": rollout}
            sample(build(SampleRun, tree, "run.yaml"))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def begin(small_grpo, tokenizer, monkeypatch):
    """The first rank's servers, checked and not started, for two processes on each machine."""
    monkeypatch.setattr(start, "require_vllm", lambda: None)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")

    def begin(rollout: dict, processes: int = 2, **fields):
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        run = build(GRPORun, {**small_grpo, **fields, "rollout": {"engine": "vllm", **rollout}}, "run.yaml")
        return training_servers(run, "float32", SimpleNamespace(tokenizer=tokenizer), [[1]], rank=0)

    return begin


def test_the_servers_of_one_machine_are_not_for_trainers_on_several(begin):
    with pytest.raises(UserError, match=r"listen at 127.0.0.1, for one machine, .*\nUse launch/job.py"):
        begin({}, processes=4)
    begin({}, processes=2)
    begin({"serve": {"host": "0.0.0.0"}}, processes=4)


def test_a_trainer_on_the_cpu_beside_gpus_shares_none(begin, monkeypatch):
    monkeypatch.setattr(start, "visible_gpus", lambda: (GPU(79 * GIB, 80 * GIB),))
    with pytest.raises(UserError, match="tensor_parallel to 2"):
        begin({})
    planned = []
    plan = start.plan_servers
    monkeypatch.setattr(start, "plan_servers", lambda *args: planned.append(plan(*args)))
    begin({}, use_cpu=True)
    [(serve, transport)] = planned
    assert (serve.devices, serve.sleep, transport) == ("0", False, "shm")
    with pytest.raises(UserError, match=r"transport: `ipc` is between GPUs, and the trainer has none"):
        begin({"transport": "ipc"}, use_cpu=True)
