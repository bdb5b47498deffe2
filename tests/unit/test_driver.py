"""A GPU that the driver sees and torch cannot use is an error, not a run on CPUs. `nvidia-smi` is a fake."""

import os

import pytest
import torch
from conftest import launch, write_yaml

from r1dist.run import driver
from r1dist.run.driver import driver_cards, needed_driver, unusable_gpu

CARD = "535.104.05, NVIDIA GeForce RTX 3090, 24576, 23912"


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts an `nvidia-smi` that prints `lines` at the beginning of PATH."""

    def put(lines: str, code: int = 0) -> None:
        fake = tmp_path / "bin" / "nvidia-smi"
        fake.parent.mkdir(exist_ok=True)
        fake.write_text(f"#!/bin/sh\ncat <<'END'\n{lines}\nEND\nexit {code}\n")
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return put


def test_the_cards_are_what_nvidia_smi_says(nvidia_smi):
    nvidia_smi(f"{CARD}\n580.82.07, NVIDIA GB10, [N/A], [N/A]")
    first, second = driver_cards()
    assert (first.driver, first.name, first.total_gib) == ("535.104.05", "NVIDIA GeForce RTX 3090", 24.0)
    assert (second.name, second.total_gib) == ("NVIDIA GB10", 0.0)
    nvidia_smi("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", code=9)
    assert driver_cards() == [] and unusable_gpu() is None


@pytest.mark.parametrize(
    ("cuda", "installed", "expected"),
    [
        ("13.0", "535.104.05", "the driver 535.104.05 is too old for its CUDA 13.0, which needs 580.65.06 or newer"),
        ("13.0", "580.65.05", "too old"),
        ("13.0", "580.105.08", "The driver is 580.105.08; look at what `nvidia-smi` says"),
        ("12.8", "535.104.05", "The driver is 535.104.05"),
        (None, "580.105.08", "is built without CUDA.\n`make setup GPU=1` installs one with CUDA."),
    ],
)
def test_the_reason_names_the_driver_and_what_is_needed(nvidia_smi, monkeypatch, cuda, installed, expected):
    nvidia_smi(CARD.replace("535.104.05", installed))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    reason = unusable_gpu()
    assert expected in reason and "NVIDIA GeForce RTX 3090" in reason and len(reason.splitlines()) == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # CPUs are asked for
    assert unusable_gpu() is None


def test_every_pinned_cuda_has_its_driver(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")  # of torch 2.13.0
    assert needed_driver() == driver.OLDEST_DRIVER["13"] == "580.65.06"


def test_a_launcher_does_not_train_on_cpus_unasked(nvidia_smi, tmp_path, small_grpo):
    nvidia_smi(CARD)
    small_grpo["data"]["sources"][0]["path"] = "nowhere.jsonl"  # it is looked for afterwards
    file = write_yaml(tmp_path / "run.yaml", small_grpo)

    def launched(script: str, *arguments: str) -> str:
        done = launch(script, *arguments)
        assert done.returncode == 2, done.stderr
        return done.stderr

    assert "nvidia-smi finds NVIDIA GeForce RTX 3090, but torch" in launched("grpo.py", "--config", str(file))
    assert "there is no file nowhere.jsonl" in launched("grpo.py", "--config", str(file), "--use_cpu", "true")
    assert "nvidia-smi finds" in launched("job.py", "grpo", "--config", str(file))
    assert not (tmp_path / "run").exists()
    checked = launched("check.py")
    assert "error: no run can start here: nvidia-smi finds NVIDIA GeForce RTX 3090" in checked
