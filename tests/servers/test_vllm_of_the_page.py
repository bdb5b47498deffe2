"""docs/after_training.md: vLLM serves what a run leaves, by the page's command, and stops where a reply ends."""

import json
import os
import re
import shlex
import socket
import subprocess
import time
import urllib.request
from urllib.error import URLError

import yaml
from conftest import ROOT, launch, python, write_yaml

PAGE = (ROOT / "docs" / "after_training.md").read_text(encoding="utf-8")


def test_the_pages_vllm_answers_the_pages_request(tmp_path):
    tree = yaml.safe_load(re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1])
    folder = tmp_path / "worked"
    config = write_yaml(tmp_path / "worked.yaml", {**tree, "max_steps": 1, "output_dir": str(folder)})
    done = launch("sft.py", "--config", config)
    assert done.returncode == 0, done.stderr
    [command] = re.findall(r"^    python (-m vllm\S+ .*)$", PAGE, re.MULTILINE)
    words = shlex.split(command.replace("runs/worked", str(folder)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    more = ["--port", port, "--dtype", "float32", "--max-model-len", "512", "--enforce-eager"]
    with (tmp_path / "log").open("w") as log:
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
        server = subprocess.Popen([python(), *words, *more], env=environment, stdout=log, stderr=log)
    try:
        body = json.loads(re.search(r"-d '(.*?)'\n", PAGE, re.DOTALL)[1].replace("runs/worked", str(folder)))
        reply = asked(f"http://127.0.0.1:{port}/v1/chat/completions", body, server, tmp_path / "log")
    finally:
        server.terminate()
        server.wait(60)
    [choice] = reply["choices"]
    assert choice["finish_reason"] == "stop" and choice["message"]["content"].rstrip().endswith("</answer>")


def asked(url: str, body: dict, server: subprocess.Popen, log) -> dict:
    """The server's answer, once it is up."""
    request = urllib.request.Request(
        url, json.dumps({**body, "seed": 0}).encode(), {"Content-Type": "application/json"}
    )
    deadline = time.monotonic() + 240
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except URLError:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)
