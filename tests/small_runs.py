"""Small runs that can be started in a moment and killed: see zygote.py."""

import atexit
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from conftest import ROOT, SMALL_GRPO, python

from r1dist.generation.vllm.endpoints import read

STEPS = 12

# 32 rollouts of 4 prompts to a generation, which two optimizer steps share; 8 prompts, so 4 steps to an epoch.
# Forwards are cut to a budget, groups that are alike replaced, and from the second epoch on prompts never solved, too.
GRPO = {
    **SMALL_GRPO,
    "data": {"sources": [{"path": "tiny", "limit": 8}], "template": "chat"},
    "learning_rate": 1e-3,
    "max_steps": STEPS,
    "steps_per_generation": 2,
    "per_device_train_batch_size": 16,
    "max_completion_length": 24,
    "beta": 0.05,
    "sync_ref_model": True,
    "ref_model_sync_steps": 5,
    "ref_model_mixup_alpha": 1.0,
    "save_strategy": "steps",
    "save_steps": 1,
    "train": {"token_budget": 300, "dynamic_sampling": 1, "pass_rate": [0.1, 1.0]},
}
COMMON = {
    "model": {"path": "tiny"},
    "seed": 0,
    "learning_rate": 1e-3,
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "gradient_checkpointing": False,
    "save_strategy": "steps",
    "save_steps": 1,
}
SFT = {**COMMON, "data": {"sources": [{"path": "tiny_talk", "limit": 64}]}, "packing": False}
PAIRS = {**COMMON, "loss": "pairwise", "sources": [{"path": "tiny_pairs", "limit": 16}]}
LABELS = {**COMMON, "loss": "pointwise", "sources": [{"path": "tiny_judged", "limit": 16}]}
RUNS = {
    "grpo": ("grpo.py", GRPO, 1),
    "grpo, ZeRO-2": ("grpo.py", {**GRPO, "per_device_train_batch_size": 8}, 2),
    "sft": ("sft.py", SFT, 1),
    "pairs": ("reward_model.py", PAIRS, 1),
    "labels": ("reward_model.py", LABELS, 1),
}


@contextmanager
def served(endpoints: Path, *words: str, real: bool = False) -> Iterator[subprocess.Popen]:
    """`launch/serve.py` with the tiny model, once all of its servers are up; SIGTERM ends it.

    It runs in a real Python, so that no `kill_launched` ends it. Its servers are forked, unless they are to be `real`.
    """
    starts = sys.executable if real else python()
    serve = f"import runpy, sys; sys.executable = {starts!r}; runpy.run_path('launch/serve.py', run_name='__main__')"
    command = [sys.executable, "-c", serve, "--model.path", "tiny", "--endpoints", str(endpoints)]
    command += ["--dtype", "float32", "--cores", "1", *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 240
    while not (endpoints.exists() and all(server.state == "ready" for server in read(endpoints).servers)):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "the servers did not come up"
        time.sleep(0.5)
    yield process
    if process.poll() is None:
        process.terminate()
        assert process.wait(20) == 0


class Zygote:
    """The process of zygote.py, which ends with this one. `python` is the path of what stands in for Python."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory()
        self.python, path = (Path(self.folder.name) / name for name in ("python", "socket"))
        words = [sys.executable, "-I", "-S", ROOT / "tests/start.py", sys.executable, path]
        self.python.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, words))} "$@"\n')
        self.python.chmod(0o755)
        command = [sys.executable, "tests/zygote.py", self.python, path]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self.process.stdout.readline() == "up\n"
        atexit.register(self.process.communicate)  # at the end of its input it ends

    def ask(self, **order) -> dict:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


class Launch:
    """One start of a run, in `processes` processes; several under DeepSpeed by configs/deepspeed/`deepspeed`.json."""

    def __init__(
        self, zygote: Zygote, script: str, config: Path, processes: int, *arguments: str,
        deepspeed: str | None = "zero2",
    ):  # fmt: skip
        self.zygote = zygote
        self.log = config.with_suffix(".log")
        argv = ["--config", str(config), "--resume", "auto", *arguments]
        self.pids = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        for rank in range(processes):
            env = {}
            if processes > 1:
                env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                env |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            if processes > 1 and deepspeed is None:
                env |= {"ACCELERATE_USE_CPU": "true"}  # with which accelerate would leave DeepSpeed out
            elif processes > 1:
                env |= {"ACCELERATE_USE_DEEPSPEED": "true"}
                env |= {"ACCELERATE_DEEPSPEED_CONFIG_FILE": f"configs/deepspeed/{deepspeed}.json"}
            self.pids.append(zygote.ask(run=script, argv=argv, env=env, log=str(self.log))["pid"])

    def send(self, number: int) -> None:
        for pid in self.pids:
            os.kill(pid, number)

    def kill(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # the workers that verify, if it got that far
        self.wait()

    def wait(self) -> list[int]:
        return [self.zygote.ask(wait=pid)["code"] for pid in self.pids]

    def ended(self) -> bool:
        return any((Path("/proc") / str(pid) / "stat").read_text().split()[2] == "Z" for pid in self.pids)
