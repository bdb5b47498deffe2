"""Two machines, as far as one can pose as two: namespaces with a network of their own each, and a cable between."""

import json
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT, write_yaml
from machines import until
from small_runs import SFT

PORT = "29411"


def start(namespaces, config, output, *arguments: str) -> list[subprocess.Popen]:
    """`accelerate launch` on both machines, one process each, under ZeRO-2; what a person types by hand."""
    first, processes = next(iter(namespaces.ends.values())), []
    for rank, name in enumerate(namespaces.ends):
        command = [*namespaces.enter(name), sys.executable, "-m", "accelerate.commands.launch"]
        command += [
            "--config_file",
            "configs/accelerate/zero2_cpu.yaml",
            "--num_machines",
            "2",
            "--num_processes",
            "2",
        ]
        command += ["--machine_rank", str(rank), "--main_process_ip", first, "--main_process_port", PORT]
        command += ["--same_network", "--deepspeed_multinode_launcher", "standard"]
        command += ["launch/sft.py", "--config", str(config), "--output_dir", str(output), *arguments]
        log = output.with_suffix(f".{rank}.log").open("w")
        env = {**os.environ, "GLOO_SOCKET_IFNAME": name, "OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log))
    return processes


def losses(folder) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture
def config(tmp_path):
    return write_yaml(tmp_path / "sft.yaml", {**SFT, "output_dir": "set below", "max_steps": 3, "save_strategy": "no"})


def test_two_machines_train_as_one_with_two_processes(namespaces, config, tmp_path):
    processes = start(namespaces, config, tmp_path / "two")
    assert [process.wait(180) for process in processes] == [0, 0], (tmp_path / "two.0.log").read_text()[-2000:]
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "configs/accelerate/zero2_cpu.yaml",
    ]
    command += ["launch/sft.py", "--config", str(config), "--output_dir", str(tmp_path / "one")]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=180)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    assert len(losses(tmp_path / "one")) == 3


def test_a_cut_link_stops_both_with_a_message(namespaces, config, tmp_path):
    output = tmp_path / "cut"
    seconds = 10
    processes = start(namespaces, config, output, "--max_steps", "100000", "--train.stall_timeout", str(seconds))
    until(lambda: (output / "metrics.jsonl").exists() and len(losses(output)) > 5, 180, "a few steps")
    namespaces.cut()
    cut = time.monotonic()
    codes = [process.wait(90) for process in processes]
    assert all(codes) and time.monotonic() - cut < 2 * seconds + 45  # the time-out, its grace, and the launchers' end
    for rank in range(2):
        assert f"no progress for {seconds} s" in output.with_suffix(f".{rank}.log").read_text()
        assert "Thread" in (output / f"stacks-rank{rank}.txt").read_text()


ASK = """
import sys, urllib.error, urllib.request
headers = {"Authorization": f"Bearer {sys.argv[2]}"} if sys.argv[2] else {}
request = urllib.request.Request(sys.argv[1], headers=headers)
try:
    print(urllib.request.urlopen(request, timeout=10).status)
except urllib.error.HTTPError as error:
    print(error.code)
"""


def test_off_loopback_a_server_refuses_who_has_no_token(namespaces, tmp_path):
    here, there = map(namespaces.enter, namespaces.ends)
    address = list(namespaces.ends.values())[1]
    endpoints, token = tmp_path / "endpoints.json", tmp_path / "token"
    token.write_text("known-to-the-run\n")
    command = [*there, sys.executable, "launch/serve.py", "--model.path", "tiny", "--endpoints", str(endpoints)]
    command += ["--host", address, "--cores", "1", "--token_file", str(token)]
    with (tmp_path / "serve.log").open("w") as log:
        server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        until(lambda: endpoints.exists() and json.loads(endpoints.read_text())["servers"][0]["state"] == "ready", 180,
              "the server")  # fmt: skip
        url = json.loads(endpoints.read_text())["servers"][0]["url"]
        assert url.startswith(f"http://{address}:")

        def ask(path: str, said: str) -> str:
            command = [*here, sys.executable, "-c", ASK, url + path, said]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

        for path in ("/weight_info", "/v1/models", "/health"):
            assert ask(path, "") == "401" and ask(path, "guessed") == "401"
            assert ask(path, "known-to-the-run") == "200"
    finally:
        server.terminate()
        server.wait(30)
