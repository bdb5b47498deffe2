"""What stands between a launcher and the commands that it starts."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from machines import until

from r1dist.errors import EXIT_INTERRUPTED
from r1dist.files import ENDED, STOP
from r1dist.run.children import code_noted, forget, handing_on, last_words


def test_what_an_earlier_start_left_is_forgotten_and_a_fresh_stop_file_is_not(tmp_path):
    (tmp_path / ENDED).write_text('{"code": 75}')
    (tmp_path / STOP).touch()
    os.utime(tmp_path / STOP, (1, 1))
    assert code_noted(tmp_path, 1) == 75
    forget(tmp_path)
    assert code_noted(tmp_path, 1) == 1 and not (tmp_path / STOP).exists()
    (tmp_path / STOP).touch()
    os.utime(tmp_path / STOP, (time.time() + 1,) * 2)
    forget(tmp_path)
    assert (tmp_path / STOP).exists()


def test_a_training_is_asked_by_a_file_and_a_launchers_echo_is_no_second_request(tmp_path, capfd):
    folder = tmp_path / "run"
    with subprocess.Popen(["sleep", "60"]) as process, handing_on("sft", process, folder) as came:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert came == [signal.SIGUSR1] and (folder / STOP).exists() and process.poll() is None
        process.kill()
    assert not (folder / STOP).exists()  # it would stop the next start
    assert capfd.readouterr().out == "SIGUSR1: waiting for `sft` to save and stop.\n"
    with subprocess.Popen(["sleep", "60"]) as process, handing_on("evaluation", process, None):
        os.kill(os.getpid(), signal.SIGTERM)
        assert process.wait(10) == -signal.SIGTERM


def test_the_last_words_are_the_reason_if_one_was_given(tmp_path):
    log, beside = tmp_path / "grpo.log", tmp_path / "grpo-n1-0.log"
    log.write_text("error: of another day\nsrun: Exited with exit code 1\n")
    beside.write_text("step 1\n[default0]:stopped: no server is left.\n[default0]:Traceback\n")
    skip = len("error: of another day\n")
    assert last_words((log, skip), (beside, 0), (tmp_path / "none.log", 0)) == ["stopped: no server is left."]
    beside.write_text("[default0]:error: there is no file a.jsonl.\n[default1]:error: there is no file a.jsonl.\n")
    assert last_words((beside, 0)) == ["error: there is no file a.jsonl."]  # each process says it
    assert last_words((log, skip)) == ["srun: Exited with exit code 1"]


def test_a_request_from_before_the_work_is_handed_on_too(tmp_path):
    with subprocess.Popen(["sleep", "60"]) as process, handing_on("sft", process, tmp_path, [signal.SIGUSR1]) as came:
        assert (tmp_path / STOP).exists() and came == [signal.SIGUSR1]
        process.kill()


@pytest.mark.parametrize("words", [["sft", "--config", "configs/recipes/tiny/sft.yaml"], ["pipeline"]])
def test_warned_before_its_work_has_begun_a_job_stops_and_begins_nothing(tmp_path, words):
    folder = tmp_path / "run"
    command = [sys.executable, "launch/job.py", *words, "--output_dir", str(folder)]
    job = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    heard = 1 << (signal.SIGUSR1 - 1)
    until(
        lambda: int(re.search(r"SigCgt:\s(\w+)", Path(f"/proc/{job.pid}/status").read_text())[1], 16) & heard,
        20,
        "it to hear",
    )
    job.send_signal(signal.SIGUSR1)
    said = job.communicate(timeout=60)[1]
    assert job.returncode == EXIT_INTERRUPTED and "had not begun" in said
    assert not list(folder.glob("*.jsonl")) and not list(folder.glob("**/*.safetensors"))
