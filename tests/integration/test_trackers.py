"""docs/trackers.md: its example runs as it stands; each tracker gets every number, by its offline mode."""

import json
import os
import re
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator

import pytest
import yaml
from conftest import ROOT, launch, metrics, write_yaml

PAGE = (ROOT / "docs" / "trackers.md").read_text(encoding="utf-8")
TREE = yaml.safe_load(re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1])
SFT = {"model": {"path": "tiny"}, "data": {"sources": [{"path": "tiny_talk", "limit": 16}]}, "packing": False}
PAIRS = {"model": {"path": "tiny"}, "loss": "pairwise", "sources": [{"path": "tiny_pairs", "limit": 16}]}
SHORT = {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": ["tensorboard"]}


def tracked(tmp_path, tracker: str, **environment) -> str:
    """What the page's run prints, with another tracker. In a process of its own: trackers read variables early."""
    config = write_yaml(tmp_path / "tracked.yaml", {**TREE, "report_to": [tracker], "run_name": "mine"})
    words = [sys.executable, "launch/grpo.py", "--config", config, "--output_dir", tmp_path / "run"]
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return re.search(rf"^{tracker}: (.*)$", done.stdout, re.MULTILINE)[1]


def logged(tmp_path) -> dict[tuple[str, int], float]:
    """(name, step) -> each number of `metrics.jsonl`, under the names that trackers get."""
    found = {}
    for line in metrics(tmp_path / "run"):
        for name, value in line.items():
            if name != "step" and value is not None:
                found[name if name.startswith("eval/") else f"train/{name}", line["step"]] = value
    assert {("train/rewards/accuracy/mean", 2), ("eval/sums/accuracy", 2), ("train/seconds/generate", 1)} <= set(found)
    return found


def scalars(folder) -> dict[tuple[str, int], float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {(tag, e.step): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}


def test_the_pages_example_runs(tmp_path):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    config = write_yaml(tmp_path / "tracked.yaml", TREE)
    done = launch("grpo.py", "--config", config, "--output_dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    [folder] = (tmp_path / "run" / "runs").iterdir()
    assert f"tensorboard: tensorboard --logdir {folder}\n" in done.stdout
    shown = scalars(folder)
    for key, value in logged(tmp_path).items():
        assert shown[key] == pytest.approx(value, rel=1e-6, abs=1e-6), key
    tables = sorted(path.name for path in (tmp_path / "run/completions").iterdir())
    assert tables == ["completions_00001.parquet", "completions_00002.parquet"]


@pytest.mark.parametrize(("script", "tree"), [("sft.py", SFT), ("reward_model.py", PAIRS)])
def test_so_do_the_other_trainers(tmp_path, script, tree):
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    config = write_yaml(tmp_path / "run.yaml", {**tree, **SHORT, "output_dir": str(tmp_path / "run")})
    done = launch(script, "--config", config)
    assert done.returncode == 0, done.stderr
    [folder] = (tmp_path / "run" / "runs").iterdir()
    assert f"tensorboard: tensorboard --logdir {folder}" in done.stdout
    shown = scalars(folder)
    for line in metrics(tmp_path / "run"):
        assert shown["train/loss", line["step"]] == pytest.approx(line["loss"], rel=1e-6)


def test_a_name_that_is_unknown_ends_a_launcher_with_the_nearest(tmp_path):
    config = write_yaml(
        tmp_path / "run.yaml", {**SFT, **SHORT, "report_to": ["tensorbord"], "output_dir": "runs/none"}
    )
    done = launch("sft.py", "--config", config)
    assert done.returncode == 2 and "did you mean `tensorboard`?" in done.stderr


def wandb_records(content: bytes) -> Iterator[bytes]:
    """What a `.wandb` file holds: LevelDB's log format behind a header of 7 bytes."""
    place, data = 7, b""
    while place + 7 <= len(content):
        if (rest := -place % 32768) < 7 and rest:
            place += rest
            continue
        length, kind = struct.unpack_from("<xxxxHB", content, place)
        data += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield data
            data = b""


def test_wandb_offline(tmp_path):
    pytest.importorskip("wandb", reason="pip install wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    shown = tracked(tmp_path, "wandb", WANDB_MODE="offline", WANDB_DIR=str(tmp_path), WANDB_SILENT="true")
    folder = re.fullmatch(r"wandb sync (.*)", shown)[1]
    [path] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert folder == str(path.parent)
    found, step = {}, 0
    for record in map(Record.FromString, wandb_records(path.read_bytes())):
        items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
        step = items.get("train/global_step", step)
        found |= {(name, step): value for name, value in items.items()}
    for key, value in logged(tmp_path).items():
        assert found[key] == pytest.approx(value), key
    tables = sorted(path.parent.glob("files/media/table/completions_*.table.json"))
    assert len(tables) >= 2  # TRL logs the last one again, when training ends
    content = json.loads(tables[-1].read_text())
    assert {"step", "prompt", "completion", "accuracy", "format", "advantage"} <= set(content["columns"])
    assert len(content["data"]) == 16


def test_trackio_local(tmp_path):
    pytest.importorskip("trackio", reason="pip install trackio")
    shown = tracked(tmp_path, "trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    assert shown == "trackio show --project huggingface"
    [path] = (tmp_path / "trackio").glob("*.db")
    rows = sqlite3.connect(path).execute("select step, metrics from metrics where run_name = 'mine'").fetchall()
    found, step = {}, 0
    for _, text in rows:
        items = json.loads(text)
        step = items.get("train/global_step", step)
        found |= {(name, step): value for name, value in items.items()}
    for key, value in logged(tmp_path).items():
        assert found[key] == pytest.approx(value), key
    assert ("completions", 2) in found


def test_mlflow_in_a_local_store(tmp_path):
    pytest.importorskip("mlflow", reason="pip install mlflow")
    pytest.importorskip("sqlalchemy", reason="pip install mlflow")
    from mlflow import MlflowClient

    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    shown = tracked(tmp_path, "mlflow", MLFLOW_TRACKING_URI=store)
    run_id, command = re.fullmatch(r"run (\w+); (.*)", shown).groups()
    assert command == f"mlflow ui --backend-store-uri {store}"
    client = MlflowClient(store)
    for (name, step), value in logged(tmp_path).items():
        name = name.removeprefix("train/").replace("eval/", "eval_", 1)
        history = {metric.step: metric.value for metric in client.get_metric_history(run_id, name)}
        assert history[step] == pytest.approx(value), name
