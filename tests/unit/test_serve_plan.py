"""Which servers a run starts on which devices, and the command that starts each. Nothing is started."""

import os
import subprocess
import threading
from types import SimpleNamespace

import pytest

from r1dist.config import GRPORun, Model, Rollout, Serve, ServeRun
from r1dist.config.loader import build, split_arguments
from r1dist.errors import UserError
from r1dist.generation import trainer_engines
from r1dist.generation.vllm import supervisor
from r1dist.generation.vllm.command import command, environment
from r1dist.generation.vllm.endpoints import Endpoints, Server, write
from r1dist.generation.vllm.plugin import OWNER
from r1dist.generation.vllm.plugin.guard import TOKEN
from r1dist.generation.vllm.start import plan_serve, plan_servers


def plan(gpus: int, trainers: int, **settings):
    return plan_servers(Rollout(engine="vllm", **settings), "bfloat16", 900, gpus, trainers)


def test_one_gpu_is_shared_by_trainer_and_server():
    serve, transport = plan(1, 1, sleep=True)
    assert (transport, serve.gpu_memory_utilization, serve.sleep, serve.devices) == ("ipc", 0.3, True, None)
    assert (serve.dtype, serve.max_model_len) == ("bfloat16", 900)


def test_gpus_that_the_trainer_leaves_over_serve():
    serve, transport = plan(4, 2)
    assert (transport, serve.devices, serve.gpu_memory_utilization) == ("nccl", "2,3", None)
    two = Serve(replicas=2, devices=serve.devices)
    seen = [environment(two, replica, "nccl", "t", {})["CUDA_VISIBLE_DEVICES"] for replica in range(2)]
    assert seen == ["2", "3"]


def test_what_the_devices_cannot_do_is_refused_with_what_they_can():
    with pytest.raises(UserError, match="Set replicas to 1 and tensor_parallel to 2"):
        plan(2, 2)
    with pytest.raises(UserError, match="there is no GPU here"):
        plan(0, 1, sleep=True)
    with pytest.raises(UserError, match="transport: `nccl` needs GPUs"):
        plan(0, 1, transport="nccl")


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
    with trainer_engines._managed(run, "bfloat16", 900, trainers=1):
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
