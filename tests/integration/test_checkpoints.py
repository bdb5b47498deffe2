"""Checkpoints on disks that fill up, with bytes that flip, beside configurations that changed."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import metrics, write_yaml
from small_runs import GRPO, SFT, Launch, Zygote

from r1dist.errors import EXIT_BAD_INPUT, EXIT_STALLED, EXIT_STOPPED
from r1dist.run.checkpoints import checkpoints, damage, step_of

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")


def sft(zygote: Zygote, folder: Path, *arguments: str, **settings) -> tuple[int, str]:
    """Exit code and output of a run into `folder / "run"`."""
    config = write_yaml(folder / "run.yaml", {**SFT, "output_dir": str(folder / "run"), **settings})
    launch = Launch(zygote, "sft.py", config, 1, *arguments)
    [code] = launch.wait()
    return code, launch.log.read_text()


@pytest.fixture(scope="module")
def six_steps(zygote, tmp_path_factory):
    folder = tmp_path_factory.mktemp("six")
    code, said = sft(zygote, folder, max_steps=6, save_steps=2, save_total_limit=None)
    assert code == 0, said
    return folder / "run"


@pytest.fixture
def copy(six_steps, tmp_path):
    """A run with the checkpoints 2, 4 and 6, to be harmed."""
    shutil.copytree(six_steps, tmp_path / "run")
    return tmp_path


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (flip, "model.safetensors is not what was written"),
        (lambda path: os.truncate(path, 1000), "model.safetensors has 1000 of"),
        (Path.unlink, "model.safetensors is missing"),
        (lambda path: (path.parent / "checksums.json").unlink(), "checksums.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(copy, zygote, harm, told):
    run = copy / "run"
    harm(run / "checkpoint-6" / "model.safetensors")
    code, said = sft(zygote, copy, max_steps=8, save_steps=2, save_total_limit=None)
    assert code == 0, said
    assert "checkpoint-6 is damaged: " in said and told in said
    assert [line["step"] for line in metrics(run)] == list(range(1, 9))
    assert (run / "damaged-checkpoint-6").is_dir()
    assert sorted(map(step_of, checkpoints(run))) == [2, 4, 6, 8] and all(damage(c) is None for c in checkpoints(run))


def test_another_configuration_is_refused_by_its_fields(copy, zygote):
    run = copy / "run"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    code, said = sft(zygote, copy, max_steps=8, learning_rate=0.5, seed=3, logging_steps=2)
    assert code == EXIT_BAD_INPUT
    assert "learning_rate was 0.001, is 0.5, seed was 0, is 3" in said.replace("; ", ", ")
    assert "logging_steps was" not in said
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_lock_that_a_dead_process_left_is_no_hindrance(copy, zygote):
    (copy / "run" / ".lock").write_text("4194304\n")
    code, said = sft(zygote, copy, max_steps=7, save_steps=2, save_total_limit=None)
    assert code == 0, said


def test_only_as_many_are_kept_as_wanted(tmp_path, zygote):
    code, said = sft(zygote, tmp_path, max_steps=5, save_steps=1, save_total_limit=2)
    assert code == 0, said
    assert sorted(map(step_of, checkpoints(tmp_path / "run"))) == [4, 5]
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith((".old", ".saving"))]
    assert all(line["seconds/save"] > 0 for line in metrics(tmp_path / "run")[1:])


@pytest.fixture
def mounted(tmp_path):
    """Mounts a small file system; `mounted(size, *options)` gives its folder."""
    folder = tmp_path / "small"
    folder.mkdir()

    def mount(size: str, *options: str) -> Path:
        words = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(folder)]
        subprocess.run(words, check=True)
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], check=False)


@ROOT_ONLY
def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint(mounted, zygote, tmp_path):
    run = mounted("40M") / "run"
    code, said = sft(zygote, tmp_path, output_dir=str(run), save_steps=1, save_total_limit=None)
    assert code == EXIT_STOPPED, said
    assert "the disk is full" in said and "Make room" in said
    kept = checkpoints(run)
    assert kept and all(damage(checkpoint) is None for checkpoint in kept)
    assert not (run / ".saving").exists()
    subprocess.run(["mount", "-o", "remount,size=200M", str(run.parent)], check=True)
    code, said = sft(zygote, tmp_path, output_dir=str(run), save_steps=4, save_total_limit=None)
    assert code == 0, said
    assert [line["step"] for line in metrics(run)] == list(range(1, 13))


@ROOT_ONLY
def test_a_folder_that_cannot_be_written_to_is_refused(mounted, zygote, tmp_path):
    run = mounted("10M", "ro") / "run"
    code, said = sft(zygote, tmp_path, output_dir=str(run))
    assert code == EXIT_BAD_INPUT
    assert f"output_dir {run} cannot be written to: Read-only file system" in said


def grpo(folder: Path, **settings) -> Path:
    return write_yaml(folder / "run.yaml", {**GRPO, "output_dir": str(folder / "run"), **settings})


def prompts(run: Path) -> list[tuple[int, int]]:
    """(step, prompt) of all samples, whichever rank made them."""
    lines = [line for path in (run / "traces").glob("*.jsonl") for line in path.read_text().splitlines()]
    return sorted((row["step"], row["prompt_id"]) for row in map(json.loads, lines))


def test_other_processes_go_on_with_the_same_prompts(tmp_path, zygote):
    """Two processes take up what one began, from where a generation begins, and the other way round."""
    whole = tmp_path / "whole"
    whole.mkdir()
    launch = Launch(zygote, "grpo.py", grpo(whole, train={}), 1)
    assert launch.wait() == [0], launch.log.read_text()
    config = grpo(tmp_path, train={})  # which groups are replaced depends on who holds them
    ways = ((1, 3, ()), (2, 7, ("--per_device_train_batch_size", "8")), (1, 12, ()))
    for processes, steps, more in ways:
        launch = Launch(zygote, "grpo.py", config, processes, "--max_steps", str(steps), *more, deepspeed=None)
        assert launch.wait() == [0] * processes, launch.log.read_text()[-3000:]
    said = launch.log.read_text()
    assert "checkpoint-3 is between the steps of a generation" in said
    assert "2 processes instead of 1: prompts and their order are the same" in said
    assert prompts(tmp_path / "run") == prompts(whole / "run")


def test_other_processes_with_other_rows_are_refused(copy, zygote):
    config = write_yaml(copy / "run.yaml", {**SFT, "output_dir": str(copy / "run"), "max_steps": 8, "save_steps": 2})
    launch = Launch(zygote, "sft.py", config, 2, deepspeed=None)
    assert EXIT_BAD_INPUT in launch.wait()
    assert "its steps had 4 rows, 8 now" in launch.log.read_text()


def test_a_run_that_stands_still_says_where_and_ends(tmp_path, zygote):
    launch = Launch(zygote, "grpo.py", grpo(tmp_path, per_device_train_batch_size=8, train={"stall_timeout": 5}), 2)
    run = tmp_path / "run"
    while not (run / "metrics.jsonl").exists():
        assert not launch.ended(), launch.log.read_text()
        time.sleep(0.01)
    os.kill(launch.pids[1], signal.SIGSTOP)  # hangs the other in a collective
    assert launch.zygote.ask(wait=launch.pids[0])["code"] == EXIT_STALLED
    os.kill(launch.pids[1], signal.SIGKILL)
    launch.zygote.ask(wait=launch.pids[1])
    stacks = (run / "stacks-rank0.txt").read_text()
    assert "Thread" in stacks and "r1dist/run/checkpoints.py" in stacks and " in train\n" in stacks
    assert "no progress for 5 s" in launch.log.read_text()
