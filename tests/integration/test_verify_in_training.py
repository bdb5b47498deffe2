"""Verification inside of real runs: workers that are killed, programs as answers, a sandbox that goes away."""

import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, SMALL_GRPO, launch, launched, metrics, write_yaml
from small_runs import Launch

PATIENCE = 300  # seconds; it ends a test that hangs
PROGRAM = "<think>One line does.</think>\n<answer>```python\nprint({})\n```</answer>"


def trace(run: Path) -> str:
    return (run / "traces" / "rank0.jsonl").read_text()


def test_workers_killed_at_random_change_no_reward(tmp_path, zygote):
    tree = {**SMALL_GRPO, "max_steps": 20, "max_completion_length": 24, "output_dir": str(tmp_path / "run")}
    config = write_yaml(tmp_path / "run.yaml", {**tree, "verify": {"workers": 2}})
    quiet = Launch(zygote, "grpo.py", config, 1)
    assert quiet.wait() == [0], quiet.log.read_text()[-3000:]
    (tmp_path / "run").rename(tmp_path / "quiet")
    launch = Launch(zygote, "grpo.py", config, 1)
    killed = 0
    while not launch.ended():
        # What the trainer has started is the fork server, whose children are the workers. Any may end in between.
        # One that dies while it starts counts as a verifier that is down, which is waited for longer and longer.
        with contextlib.suppress(psutil.NoSuchProcess):
            workers = [w for server in launched() if server.pid not in launch.pids for w in server.children()]
            workers = [worker for worker in workers if time.time() - worker.create_time() > 0.5]
            for worker in random.sample(workers, min(1, len(workers))):
                worker.kill()
                killed += 1
        time.sleep(random.uniform(0, 0.4))
    assert launch.wait() == [0], launch.log.read_text()[-3000:]
    assert killed >= 5 and sum(line.get("verify/died", 0) for line in metrics(tmp_path / "run")) > 0
    assert trace(tmp_path / "run") == trace(tmp_path / "quiet")


@pytest.fixture
def programmer(tmp_path, zygote):
    """A model that answers with a program, and a YAML of a run that tests the programs."""
    rows = [
        {"problem": f"Print {n}.", "completion": PROGRAM.format(n), "tests": [{"stdin": "", "stdout": str(n)}]}
        for n in range(8)
    ]
    path = tmp_path / "programs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"path": str(path), "problem": "problem", "kind": "code"}
    learn = {key: SMALL_GRPO[key] for key in ("model", "seed", "gradient_checkpointing", "save_strategy")}
    learn |= {"data": {"sources": [{**columns, "completion": "completion"}]}, "packing": False, "max_steps": 80}
    learn |= {"learning_rate": 3e-3, "per_device_train_batch_size": 8, "output_dir": str(tmp_path / "model")}
    launch = Launch(zygote, "sft.py", write_yaml(tmp_path / "sft.yaml", learn), 1)
    assert launch.wait() == [0], launch.log.read_text()[-3000:]
    math = {"path": "tiny", "limit": 8}
    tree = {**SMALL_GRPO, "model": {"path": str(tmp_path / "model")}, "max_completion_length": 64, "max_steps": 6}
    tree |= {"data": {"sources": [{**columns, "tests": "tests"}, math]}, "output_dir": str(tmp_path / "run")}
    tree |= {
        "rewards": {"code": {"kinds": ["code"]}, "code_format": {"kinds": ["code"]}, "accuracy": {"kinds": ["math"]}}
    }
    tree |= {"verify": {"retry_timeout": 3, "workers": 2}, "save_strategy": "steps", "save_steps": 100}
    return write_yaml(tmp_path / "run.yaml", tree)


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")
@pytest.mark.skipif(os.geteuid() != 0, reason="a mount namespace of its own needs root")
def test_a_sandbox_that_goes_away_stops_the_run_and_no_zero_is_trained_on(programmer, tmp_path):
    run = tmp_path / "run"
    arguments = ["--config", str(programmer), "--resume", "auto"]
    command = [sys.executable, "launch/grpo.py", *arguments]
    log = (tmp_path / "log").open("w")
    # In a mount namespace of its own, in which bubblewrap can be taken away from it alone.
    process = subprocess.Popen(["unshare", "--mount", *command], cwd=ROOT, stdout=log, stderr=log)
    began = time.monotonic()
    while not (run / "metrics.jsonl").exists() or len(metrics(run)) < 2:
        assert process.poll() is None and time.monotonic() - began < PATIENCE, (tmp_path / "log").read_text()
        time.sleep(0.01)
    gone = ["mount", "--bind", os.devnull, str(Path(shutil.which("bwrap")).resolve())]
    subprocess.run(["nsenter", f"--mount=/proc/{process.pid}/ns/mnt", *gone], check=True)
    assert process.wait(PATIENCE) == 3
    said = (tmp_path / "log").read_text()
    assert re.search(r"stopped: The sandbox did not start: .*\(tried for \d s\)", said, re.DOTALL), said
    kept = len(metrics(run))
    assert (run / f"checkpoint-{kept}").is_dir() and kept < 6
    done = launch("grpo.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in metrics(run)] == list(range(1, 7))
    rows = [json.loads(line) for line in trace(run).splitlines()]
    code = [row["rewards"]["code"] for row in rows if row["prompt"].startswith("Print")]
    assert None not in code and 1.0 in code
    assert {row["rewards"]["code"] for row in rows if not row["prompt"].startswith("Print")} == {None}
    unscored = sum(row["rewards"]["code"] is None for row in rows)
    assert sum(line["rewards/code/unscored"] for line in metrics(run)) == unscored > 0
