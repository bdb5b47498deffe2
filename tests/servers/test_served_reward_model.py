"""A reward model that a real vLLM server holds scores as it does in process."""

import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest
from conftest import launch, python, write_yaml

from r1dist.config import Reward, Source
from r1dist.data.sources import load_labels
from r1dist.rewards import Rewards
from r1dist.rewards.model import ModelReward

pytest.importorskip("vllm")

TRAINED = {
    "model": {"path": "tiny"},
    "seed": 0,
    "max_steps": 20,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 16,
    "max_length": 256,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "loss": "pointwise",
    "sources": [{"path": "tiny_judged"}],
}


def test_a_served_reward_model_scores_as_in_process(tmp_path):
    name, folder = "safety", tmp_path / "safety"
    config = write_yaml(tmp_path / "run.yaml", {**TRAINED, "output_dir": str(folder)})
    done = launch("reward_model.py", "--config", config)
    assert done.returncode == 0, done.stderr
    rows = [
        dict(row, prompt_id=n, kind="talk")
        for n, row in enumerate(load_labels([Source(path="tiny_judged", limit=40)]))
    ]
    texts = [row["completion"] for row in rows]
    expected = ModelReward(name, str(folder))(texts, rows)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The command of docs/judges.md, and less memory than vLLM takes by itself where there is no GPU.
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--runner", "pooling"]
    command += ["--dtype", "float32", "--port", str(port), "--enforce-eager"]
    command += ["--kv-cache-memory-bytes", str(2**28), "--gpu-memory-utilization", "0.1"]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen([python(), *command], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 400
        while not _healthy(port):
            assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "server.log").read_text()[-3000:]
            time.sleep(0.5)
        reward = Reward(parameters={"model": str(folder), "url": f"http://127.0.0.1:{port}"})
        served = Rewards({name: reward}, None).score([(0, n, 0) for n in range(40)], 0, texts, rows)[name]
    finally:
        server.terminate()
        server.wait(30)
    assert len(set(expected)) > 20
    assert served == pytest.approx(expected, abs=1e-4)


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False
