"""A pipeline's cards have its table of stages; those on the hub are replaced where they have changed."""

import importlib.util
import json

import pytest
from conftest import ROOT, SMALL_GRPO, write_yaml

from r1dist.config.loader import parse
from r1dist.config.pipeline import PipelineRun
from r1dist.errors import UserError
from r1dist.files import write_run_file
from r1dist.pipeline.cards import write_cards
from r1dist.pipeline.graph import Graph
from r1dist.pipeline.manifest import digest, settings_of
from r1dist.pipeline.runner import Runner

SCORES = {"accuracy": 0.5, "ci95": [0.4, 0.6], "format": 1.0, "language": None, "mean_tokens": 12.5}
SUMMARY = {
    "seed": 3,
    "stages": [
        {"name": "base", "kind": "base", "eval": {**SCORES, "accuracy": 0.1, "ci95": [0.0, 0.2]}, "sampled": SCORES},
        {"name": "rows", "kind": "sample", "data": {"rows": 7}},
        {"name": "judge", "kind": "reward_model", "scores": {"accuracy": 0.75}},
        {"name": "rl", "kind": "grpo", "eval": SCORES, "sampled": {**SCORES, "accuracy": 0.25}},
    ],
}


def graph(folder, **fields) -> Graph:
    tree = {**SMALL_GRPO, "output_dir": "unused", "per_device_train_batch_size": 16, **fields}
    write_yaml(folder / "grpo.yaml", tree)
    write_yaml(folder / "evaluate.yaml", {"model": {"path": "tiny"}, "data": {"sources": [{"path": "tiny"}]}})
    stages = [
        {"name": "base", "kind": "base", "model": "tiny"},
        {"name": "rl", "kind": "grpo", "config": "grpo.yaml", "inputs": {"model.path": "base"}},
    ]
    pipeline = {"output_dir": str(folder / "x"), "evaluate": "evaluate.yaml", "stages": stages}
    pipeline["accelerate"] = str(ROOT / "configs" / "accelerate" / "zero2_cpu.yaml")
    return Graph(parse(PipelineRun, ["--config", str(write_yaml(folder / "p.yaml", pipeline))]), folder)


def finished(plan: Graph):
    step = plan.steps["rl"]
    write_run_file(step.folder, "grpo", step.config, {})
    return step


def test_the_card_has_the_recipes_stages(tmp_path):
    plan = graph(tmp_path)
    step = finished(plan)
    write_cards(plan, [step], SUMMARY)
    text = (step.folder / "README.md").read_text()
    for row in (
        f"This is `rl`, a stage of the recipe `{tmp_path.name}`, seed 3. `model.path` comes from `base`.",
        "| base | 10.0 % (0.0 % to 20.0 %) | 50.0 % | 100.0 % | - | 12.5 |",
        "| rows | 7 rows | - | - | - | - |",
        "| judge | 75.0 % of rows held out | - | - | - | - |",
        "| **rl** | 50.0 % (40.0 % to 60.0 %) | 25.0 % | 100.0 % | - | 12.5 |",
    ):
        assert row in text, row


def test_the_card_on_the_hub_is_replaced_only_where_it_has_changed(tmp_path, hub):
    plan = graph(tmp_path, push_to_hub=True, hub_model_id="mine")
    step = finished(plan)
    hub.repositories["somebody/mine"] = {"main": {"README.md": b"as training left it", "config.json": b"{}"}}
    hub.refuse_commits = 1
    write_cards(plan, [step], SUMMARY)
    assert not (step.folder / "README.md").exists()  # to be tried again
    for _ in range(2):
        write_cards(plan, [step], SUMMARY)
    assert hub.messages == ["Model card with the recipe's results"]
    files = hub.files("somebody/mine")
    assert files["README.md"] == (step.folder / "README.md").read_bytes() and set(files) == {
        "README.md",
        "config.json",
    }
    assert b"somebody/mine" in files["README.md"] and b"**rl**" in files["README.md"]


def test_a_wrong_token_ends_the_pipeline_before_its_first_stage(tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match=r"refuses the token \(401\)"):
        Runner(graph(tmp_path, push_to_hub=True)).run()
    assert not (tmp_path / "x").exists()


def test_a_missing_tracker_ends_it_there_too(tmp_path, monkeypatch):
    plan = graph(tmp_path, report_to=["mlflow"])
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "mlflow" else found(name, *a))
    with pytest.raises(UserError, match=r"^rl: `report_to`: mlflow is not installed .*\n`pip install mlflow`"):
        Runner(plan).run()
    assert "It would be refused: rl: `report_to`" in Runner(plan).plan() and not (tmp_path / "x").exists()


def test_card_tracker_and_upload_change_nothing_about_what_a_stage_is(tmp_path):
    plain, tracked = graph(tmp_path), graph(tmp_path, push_to_hub=True, report_to=["tensorboard"], run_name="a")
    assert settings_of(plain.steps["rl"], {}) == settings_of(tracked.steps["rl"], {})
    step = finished(plain)
    (step.folder / "config.json").write_text("{}")
    before = digest(step.folder)
    write_cards(plain, [step], SUMMARY)
    assert digest(step.folder) == before and json.loads((step.folder / "config.json").read_text()) == {}
