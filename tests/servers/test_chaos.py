"""Whole runs with real servers that are killed, stopped and taken away while it goes on."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from urllib.request import Request, urlopen

import psutil
import pytest
from conftest import ROOT, SMALL_GRPO, kill_launched, launched, python, write_yaml
from small_runs import served
from stub_server import StubServer

from r1dist.generation.vllm.endpoints import Endpoints, Server, read, write

pytest.importorskip("vllm")

PATIENCE = 600  # seconds; it ends a test that hangs and says nothing of speed
ZERO2 = ("--config_file", "configs/accelerate/zero2_cpu.yaml")
ZERO3 = ("--config_file", "configs/accelerate/zero3_cpu.yaml")
ONE = ("--config_file", "configs/accelerate/cpu.yaml")


class Run:
    """A GRPO run with managed servers, in the background."""

    def __init__(self, folder: Path, accelerate: tuple[str, ...], replicas: int, env: dict | None = None, **settings):
        self.folder = folder / "run"
        self.weights = folder / "weights"
        rollout = {"engine": "vllm", "weights_folder": str(self.weights), "serve": {"replicas": replicas, "cores": 1}}
        rollout |= settings.pop("rollout", {})
        tree = {**SMALL_GRPO, "output_dir": str(self.folder), "rollout": rollout, **settings}
        config = write_yaml(folder / "run.yaml", tree)
        words = [python(), "-m", "accelerate.commands.launch", *accelerate, "launch/grpo.py", "--config", config]
        self.output = (folder / "output.txt").open("w+")
        self.process = subprocess.Popen(
            words, cwd=ROOT, env=env, stdout=self.output, stderr=subprocess.STDOUT, start_new_session=True
        )

    def metrics(self) -> list[dict]:
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in map(json.loads, lines) if "train_runtime" not in line]

    def trace(self) -> list[dict]:
        files = (self.folder / "traces").glob("rank*.jsonl")
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    def server(self, number: int) -> Server:
        return read(self.folder / "servers" / "endpoints.json").servers[number]

    def running(self, number: int) -> int:
        """Sequences that a server is generating right now, by its own count."""
        endpoints = read(self.folder / "servers" / "endpoints.json")
        token = {"Authorization": f"Bearer {endpoints.token}"}
        asked = Request(f"{endpoints.servers[number].url}/metrics", headers=token)
        with urlopen(asked, timeout=PATIENCE) as answer:
            said = answer.read().decode()
        return int(float(re.search(r"^vllm:num_requests_running\{.*\} (\S+)$", said, re.MULTILINE)[1]))

    def signal(self, number: int, *signals: int) -> None:
        """To a server and all its processes; several signals have a second between them."""
        for index, sent in enumerate(signals):
            time.sleep(1 if index else 0)
            os.killpg(self.server(number).pid, sent)

    def wait_for(self, what: Callable[[], bool]) -> None:
        began = time.monotonic()
        while not what():
            assert self.process.poll() is None, self.told()
            assert time.monotonic() - began < PATIENCE, self.told()
            time.sleep(0.02)

    def wait_for_steps(self, more: int) -> None:
        wanted = len(self.metrics()) + more
        self.wait_for(lambda: len(self.metrics()) >= wanted)

    def told(self) -> str:
        self.output.flush()
        return Path(self.output.name).read_text()[-6000:]

    def end(self) -> None:
        kill_launched()
        self.process.wait()


@pytest.fixture
def run_of(tmp_path):
    runs = []

    def start(*arguments, **settings) -> Run:
        runs.append(Run(tmp_path, *arguments, **settings))
        return runs[-1]

    yield start
    for run in runs:
        run.end()


def in_use(run: Run) -> float:
    return run.metrics()[-1]["rollout/servers"]


def test_a_run_outlives_its_servers_deaths(run_of):
    settings = {"health_timeout": 4, "request_timeout": 30, "sync_timeout": 15}
    run = run_of(ZERO3, 2, rollout=settings, per_device_train_batch_size=32, max_steps=500)
    run.wait_for(lambda: len(run.metrics()) >= 3 and in_use(run) == 2)
    for process in launched():  # it trains as fast as it can while a server starts again, which is what is waited for
        process.nice(19)

    def lost_and_back() -> float:
        """Seconds until a step has used one server, and a later one both."""
        began = time.monotonic()
        run.wait_for(lambda: in_use(run) == 1)
        run.wait_for(lambda: in_use(run) == 2)
        return time.monotonic() - began

    # In the middle of a generation: it holds still with what it was asked for.
    run.wait_for(lambda: run.running(0) >= 8)
    run.signal(0, signal.SIGSTOP, signal.SIGKILL)
    generation_recovery = lost_and_back()

    # In the middle of a sync: the weights are being written, and it never answers that it has them.
    run.wait_for(lambda: any(run.weights.glob("*/*.partial")))
    run.signal(1, signal.SIGSTOP, signal.SIGKILL)
    sync_recovery = lost_and_back()

    # Hung: it neither answers nor hangs up.
    run.signal(0, signal.SIGSTOP)
    run.wait_for(lambda: in_use(run) == 1)
    run.wait_for_steps(2)
    assert in_use(run) == 1
    os.killpg(run.server(0).pid, signal.SIGCONT)
    run.wait_for(lambda: in_use(run) == 2)

    run.wait_for_steps(1)
    steps = run.metrics()
    run.end()
    print(f"back in use after {generation_recovery:.0f} s and {sync_recovery:.0f} s; {len(steps)} steps")
    # No server is probed in a step that finds none which takes the weights in time, on a machine that is busy.
    probed = [line["rollout/logp_diff"] for line in steps if "rollout/logp_diff" in line]
    assert len(probed) > len(steps) / 2 and all(0 <= difference < 0.02 for difference in probed)
    assert sum(line.get("rollout/resent", 0) for line in steps) >= 1
    assert any(line.get("rollout/errors/late", 0) for line in steps)
    rows = [row for row in run.trace() if row["step"] < len(steps)]
    assert len(rows) == 64 * len(steps)
    assert len({(row["step"], row["prompt_id"], row["sample_index"]) for row in rows}) == len(rows)
    assert all(row["policy_version"] == row["step"] for row in rows)


@pytest.fixture(scope="module")
def endpoints(tmp_path_factory):
    """The endpoints file of a server that outlives the runs."""
    path = tmp_path_factory.mktemp("serve") / "endpoints.json"
    with served(path, "--max_model_len", "256"):
        yield str(path)


RESUMED = {"resume": "auto", "save_strategy": "steps", "save_steps": 1, "save_total_limit": 20}


def by_name(rows: list[dict]) -> dict[tuple, dict]:
    return {(row["step"], row["prompt_id"], row["sample_index"]): row for row in rows}


def test_a_killed_run_takes_up_the_rollouts_that_its_checkpoint_holds(run_of, endpoints):
    """Two optimizer steps to a generation; killed where the checkpoint of the first is there."""
    settings = {**RESUMED, "steps_per_generation": 2, "per_device_train_batch_size": 16, "max_steps": 8}
    run = run_of(ONE, 1, rollout={"servers": endpoints}, **settings)
    run.wait_for((run.folder / "checkpoint-3").exists)
    run.end()
    before = by_name([row for row in run.trace() if row["step"] < 3])
    again = run_of(ONE, 1, rollout={"servers": endpoints}, **settings)
    assert again.process.wait(PATIENCE) == 0, again.told()
    rows = again.trace()
    made = by_name(rows)
    assert len(rows) == len(made) == 4 * 32 and {row["step"] for row in rows} == {0, 2, 4, 6}
    assert len(before) == 2 * 32 and all(made[key] == row for key, row in before.items())
    assert len({row["prompt_id"] for row in rows}) == 4 * 4
    assert [line["step"] for line in again.metrics()] == list(range(1, 9))
    assert all(line["rollout/logp_diff"] < 0.02 for line in again.metrics() if "rollout/logp_diff" in line)


def test_a_run_that_is_a_generation_ahead_loses_and_repeats_nothing(run_of, endpoints):
    """Two ranks; killed while the next generation is being made; 8 prompts, so an epoch is two steps."""
    settings = {**RESUMED, "per_device_train_batch_size": 16, "max_steps": 7}
    settings |= {"data": {"sources": [{"path": "tiny", "limit": 8}], "template": "chat"}}
    ahead = {"servers": endpoints, "max_staleness": 1}
    run = run_of(ZERO2, 1, rollout=ahead, **settings)
    run.wait_for((run.folder / "checkpoint-4").exists)
    run.end()
    again = run_of(ZERO2, 1, rollout=ahead, **settings)
    assert again.process.wait(PATIENCE) == 0, again.told()
    rows = again.trace()
    assert len(rows) == len(by_name(rows)) == 7 * 32 and {row["step"] for row in rows} == set(range(7))
    assert len({row["seed"] for row in rows}) == len(rows)
    resumed = {row["step"] for row in rows if row["policy_version"] == row["step"]} - {0}
    assert len(resumed) == 1 and min(resumed) >= 4  # nothing was ahead of where it was taken up
    assert all(row["policy_version"] == row["step"] - 1 for row in rows if row["step"] not in {0, *resumed})
    steps = again.metrics()
    assert [line["step"] for line in steps] == list(range(1, 8))
    assert all("sampling/outside_clip/mean" in line for line in steps)
    assert [line["rollout/staleness"] for line in steps] == [float(i not in {0, *resumed}) for i in range(7)]
    assert all(line["rollout/logp_diff"] < 0.02 for line in steps)
    assert all("seconds/old_logprobs" not in line for line in steps)
    assert all(0 < line["sampling/importance_sampling_ratio/mean"] < 1.1 for line in steps)
    for epoch in range(3):  # each epoch has every prompt, in an order of its own
        prompts = [row["prompt_id"] for row in rows if row["step"] in (2 * epoch, 2 * epoch + 1)]
        assert len(set(prompts)) == 8 and len(prompts) == 64


def test_without_any_server_the_run_is_saved_and_says_why(run_of, tmp_path):
    servers = [StubServer(), StubServer()]  # that real ones are killed is tested above
    places = [Server(f"server{number}", server.url, "ready") for number, server in enumerate(servers)]
    write(tmp_path / "endpoints.json", Endpoints(places, "shm"))
    settings = {"servers": str(tmp_path / "endpoints.json"), "max_logp_diff": 100}
    settings |= {"no_server_timeout": 8, "health_timeout": 4}
    run = run_of(ZERO3, 2, rollout=settings, per_device_train_batch_size=16, max_steps=10_000)
    run.wait_for(lambda: len(run.metrics()) >= 3)
    for server in servers:
        server.stop()
    assert run.process.wait(PATIENCE) != 0
    told = run.told()
    assert (
        "stopped: no server could be used for 8 s (rollout.no_server_timeout). server0: " in told
        and "; server1: " in told
    )
    assert "--resume continues from there" in told
    step = len(run.metrics())
    assert (run.folder / f"checkpoint-{step}" / "trainer_state.json").exists()


def test_servers_do_not_outlive_their_run_and_adapters_reach_them(run_of):
    lora = {"model": {"path": "tiny", "lora": {"r": 4, "alpha": 16}}, "learning_rate": 1e-2}
    real = {**os.environ, "REAL_SERVERS": "1"}
    run = run_of(ONE, 1, env=real, per_device_train_batch_size=16, max_steps=500, **lora)
    run.wait_for(lambda: len(run.metrics()) >= 4)
    assert all(0 <= line["rollout/logp_diff"] < 1e-3 for line in run.metrics())
    server = psutil.Process(run.server(0).pid)
    supervisor = server.parent()
    family = [supervisor, *supervisor.children(recursive=True)]
    assert len(family) >= 3
    trainer = supervisor.parent()
    assert trainer.pid == int((run.folder / ".lock").read_text())
    os.kill(trainer.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    assert not list(run.weights.iterdir())
