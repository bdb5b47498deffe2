"""Stages as commands, from the YAML to `summary.json`."""

import json
import re

import pytest
from conftest import ROOT, SMALL_GRPO, launch, metrics, write_yaml
from transformers import AutoModelForCausalLM

from r1dist.report.table import stage_table

SMALL_SFT = {
    "model": {"path": "tiny"},
    "data": {"sources": [{"path": "tiny", "limit": 256, "seed": 1}]},
    "max_steps": 8,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 8,
    "max_length": 256,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "seed": 0,
}


@pytest.fixture
def pipeline(tmp_path):
    evaluation = {
        "model": {"path": "tiny"},
        "data": {"sources": [{"path": "tiny", "split": "test", "limit": 40}]},
        "sampling": {"samples": 2, "max_tokens": 48},
    }
    write_yaml(tmp_path / "grpo.yaml", {**SMALL_GRPO, "output_dir": "unused", "per_device_train_batch_size": 16})
    write_yaml(tmp_path / "sft.yaml", {**SMALL_SFT, "output_dir": "unused"})
    write_yaml(tmp_path / "evaluate.yaml", evaluation)
    stages = [
        {"name": "base", "kind": "base", "model": "tiny"},
        {"name": "sft", "kind": "sft", "config": "sft.yaml", "start": "base"},
        {"name": "rl", "kind": "grpo", "config": "grpo.yaml", "start": "sft"},
    ]
    tree = {"output_dir": str(tmp_path / "run"), "stages": stages, "evaluate": "evaluate.yaml"}
    return {**tree, "accelerate": "configs/accelerate/zero2_cpu.yaml"}


def test_stages_build_on_each_other(tmp_path, pipeline):
    config = write_yaml(tmp_path / "pipeline.yaml", pipeline)
    done = launch("pipeline.py", "--config", config)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [(stage["name"], stage["kind"]) for stage in summary["stages"]] == [
        ("base", "base"), ("sft", "sft"), ("rl", "grpo"),
    ]  # fmt: skip
    for stage in summary["stages"]:
        assert (
            stage["seconds"] > 0 and {"accuracy", "ci95", "format", "language", "mean_tokens"} <= stage["eval"].keys()
        )
    base, sft, _ = (stage["eval"] for stage in summary["stages"])
    assert sft["mean_tokens"] > base["mean_tokens"] and sft["format"] > base["format"]
    losses = [line["loss"] for line in metrics(tmp_path / "run" / "sft")]
    assert losses[-1] < losses[0]
    record = json.loads((tmp_path / "run" / "rl" / "run.json").read_text())
    assert record["config"]["model"]["path"] == str(tmp_path / "run" / "sft")
    assert len(list((tmp_path / "run" / "rl" / "traces").iterdir())) == 2
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "rl")
    again = launch("pipeline.py", "--config", config)
    assert again.returncode == 2 and "already holds a run" in again.stderr


def test_a_dry_run_prints_the_commands_that_a_person_could_type(tmp_path, pipeline):
    done = launch(
        "pipeline.py", "--config", write_yaml(tmp_path / "pipeline.yaml", pipeline), "--dry_run", "--seed", "3"
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 5
    assert "launch/sft.py" in lines[1] and "--model.path tiny" in lines[1] and lines[1].endswith("--seed 3")
    assert "launch/grpo.py" in lines[3] and f"--model.path {tmp_path / 'run' / 'sft'}" in lines[3]
    assert not (tmp_path / "run").exists()


def test_a_stage_that_fails_shows_its_last_lines(tmp_path, pipeline):
    write_yaml(tmp_path / "sft.yaml", {**SMALL_SFT, "output_dir": "unused", "lerning_rate": 1})
    done = launch("pipeline.py", "--config", write_yaml(tmp_path / "pipeline.yaml", pipeline))
    assert done.returncode == 2
    assert "stage `sft` failed" in done.stderr and "sft.log" in done.stderr
    log = (tmp_path / "run" / "logs" / "sft.log").read_text()
    assert "did you mean `learning_rate`?" in log
    assert len(json.loads((tmp_path / "run" / "summary.json").read_text())["stages"]) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": "nowhere"}, r"`start` naming a stage before it \(base\)"),
        ({"config": None}, "needs `config`"),
        ({"kind": "dpo"}, "`stages.1.kind`"),
    ],
)
def test_a_stage_that_cannot_run_is_refused(tmp_path, pipeline, change, message):
    pipeline["stages"][1].update(change)
    done = launch("pipeline.py", "--config", write_yaml(tmp_path / "pipeline.yaml", pipeline))
    assert done.returncode == 2 and re.search(message, done.stderr), done.stderr
    assert not (tmp_path / "run").exists()


def test_the_table_has_a_row_for_each_stage():
    scores = {"accuracy": 0.5, "ci95": [0.4, 0.6], "format": 1.0, "language": None, "mean_tokens": 12.5}
    stages = [{"name": name, "kind": "grpo", "seconds": 3, "eval": scores, "sampled": scores} for name in "ab"]
    lines = stage_table(stages).splitlines()
    assert len(lines) == 5 and "50.0 %" in lines[3] and " - " in lines[3]
    assert len({len(line) for line in lines[1:]}) == 1


def test_the_readmes_pipeline_is_the_demo():
    done = launch("pipeline.py", "--dry_run")
    assert done.returncode == 0
    assert str(ROOT / "configs/recipes/tiny/r1_zero.yaml") in done.stdout
