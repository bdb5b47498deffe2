"""launch/check.py on a machine with a GPU, as far as one can be imitated: torch's answers are fakes."""

from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from r1dist.cluster import check as page
from r1dist.cluster.check import check
from r1dist.errors import UserError
from r1dist.generation.vllm import devices, start
from r1dist.generation.vllm.devices import GIB, GPU

RECIPES = ROOT / "configs" / "recipes"


@pytest.fixture
def card(monkeypatch):
    """One GPU of 24 GB, on which vLLM and flash attention run."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "RTX 4090")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (8, 9))
    properties = SimpleNamespace(total_memory=int(23.5 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(devices, "visible_gpus", lambda: (GPU(free=int(23.1 * GIB), total=int(23.5 * GIB)),))
    monkeypatch.setattr(start, "require_vllm", lambda: None)
    monkeypatch.setattr("r1dist.models.why_missing", lambda kernel: None)


def rows(capsys) -> dict[str, str]:
    lines = capsys.readouterr().out.splitlines()
    return {line.split()[0]: " ".join(line.split()[1:]) for line in lines if line.startswith("  ")}


def test_what_a_run_would_use_on_one_gpu(card, capsys):
    check(RECIPES)
    found = rows(capsys)
    assert "RTX 4090" in found["recipe"] and found["recipe"].endswith("qwen2.5-0.5b/r1_zero.yaml")
    assert "vLLM servers" in found["engine"]
    assert found["servers"] == "1 on 0, weights by ipc; they sleep while the trainer trains"
    assert found["attention"] == "flash_attention_2"


def test_without_its_vllm_no_run_can_start_and_the_mend_is_named(card, capsys, monkeypatch):
    def refuse():
        raise UserError("rollout.engine: vLLM is not installed.\nInstall it.")

    monkeypatch.setattr(start, "require_vllm", refuse)
    with pytest.raises(UserError, match=r"^no run can start here: .*vLLM is not installed\.\nInstall it\.$"):
        check(RECIPES)
    assert rows(capsys)["run"] == "Install it."


def test_packages_in_other_versions_are_named_before_they_are_imported(monkeypatch, capsys):
    monkeypatch.setattr(page, "version", lambda name: "1.15.0" if name == "trl" else version(name))
    with pytest.raises(UserError, match=r"trl 1\.15\.0 \(==1\.16\.0 is needed\)\nmake setup"):
        check(RECIPES)
    assert "torch" not in rows(capsys)
