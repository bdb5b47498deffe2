"""Evaluation during training: it is logged, and training goes on as if it had not been there."""

import json
import math
import shutil
from statistics import fmean

import pytest
from conftest import SMALL_GRPO, launch, metrics, write_yaml
from small_runs import COMMON, LABELS, PAIRS
from step_records import DrawingServer

from r1dist.config import Source
from r1dist.data.sources import load_labels
from r1dist.files import read_lines
from r1dist.rewards.model import ModelReward
from r1dist.run.checkpoints import checkpoints, step_of

SOURCE = {"path": "tiny", "split": "test", "limit": 5}
PROBLEMS = [{"name": "greedy", "sources": [SOURCE]}, {"name": "sampled", "sources": [SOURCE], "samples": 2}]
EVERY_OTHER = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True}
GRPO = {**SMALL_GRPO, "max_steps": 4, "max_completion_length": 24, "save_strategy": "steps", "save_steps": 1}
GRPO |= {"per_device_train_batch_size": 16}
SFT = {**COMMON, "data": {"sources": [{"path": "tiny_talk", "limit": 64}], "template": "chat"}, "max_steps": 4}
SFT |= {"eval_max_tokens": 24}
HELD_OUT = {"split": "test", "limit": 21}  # no multiple of a batch, nor of the ranks


def trained(folder, script, tree, processes=1, evaluates=True, **fields):
    tree = {**tree, "output_dir": str(folder / "run"), **fields}
    if evaluates:
        tree = {**tree, **EVERY_OTHER, "data": {**tree["data"], "eval": PROBLEMS}}
    config = "configs/accelerate/cpu.yaml" if processes == 1 else "configs/accelerate/zero3_cpu.yaml"
    folder.mkdir(exist_ok=True)
    done = launch(script, "--config", write_yaml(folder / "run.yaml", tree), accelerate=("--config_file", config))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


def weights(run) -> bytes:
    return (run / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("script", "tree"), [("grpo.py", GRPO), ("sft.py", SFT)], ids=["grpo", "sft"])
@pytest.mark.parametrize("processes", [1, 2])
def test_the_weights_are_those_without_it(tmp_path, script, tree, processes):
    rows = tree["per_device_train_batch_size"] // processes
    tree = {**tree, "per_device_train_batch_size": rows}
    without = trained(tmp_path / "without", script, tree, processes, evaluates=False)
    run = trained(tmp_path / "with", script, tree, processes)
    assert weights(run) == weights(without)
    lines = [line for line in metrics(run) if "eval/greedy/accuracy" in line]
    assert [line["step"] for line in lines] == [0, 2, 4]
    assert lines[0]["eval/sampled/pass_at_2"] >= lines[0]["eval/sampled/accuracy"]
    assert lines[0]["eval/greedy/accuracy_low"] <= lines[0]["eval/greedy/accuracy"]
    answers = list(read_lines(run / "evaluations" / "sampled.jsonl"))
    assert [(line["step"], line["prompt_id"]) for line in answers] == [(s, p) for s in (0, 2, 4) for p in range(5)]
    losses = [[line["loss"] for line in metrics(of) if "loss" in line] for of in (run, without)]
    assert len(losses[0]) == 4 and losses[0] == losses[1]


def test_on_two_ranks_with_servers_the_weights_are_those_without_it(tmp_path):
    # Their answers depend on a request's seed alone; those of a real server on what else it is asked at the time, too.
    servers = [DrawingServer(), DrawingServer()]
    urls = ",".join(server.url for server in servers)
    tree = {**GRPO, "max_steps": 2, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    tree |= {"rollout": {"engine": "vllm", "servers": urls, "transport": "shm", "max_logp_diff": 100}}
    tree |= {"rewards": {"overlong": {"max_tokens": 24, "cache_tokens": 20}, "repetition": {"ngram": 1}}}
    without = trained(tmp_path / "without", "grpo.py", tree, 2, evaluates=False)
    run = trained(tmp_path / "with", "grpo.py", tree, 2)
    for server in servers:
        server.stop()
    assert weights(run) == weights(without) and all(server.seeds for server in servers)
    assert [line["step"] for line in metrics(run) if "eval/sampled/accuracy" in line] == [0, 2]
    answers = list(read_lines(run / "evaluations" / "sampled.jsonl"))
    assert [(line["step"], line["prompt_id"]) for line in answers] == [(s, p) for s in (0, 2) for p in range(5)]


def test_a_resumed_run_has_each_evaluation_once(tmp_path):
    run = trained(tmp_path, "grpo.py", GRPO, save_total_limit=4)
    whole, logged = weights(run), [line for line in metrics(run) if "eval/greedy/accuracy" in line]
    answers = (run / "evaluations" / "greedy.jsonl").read_text()
    for newer in ("checkpoint-3", "checkpoint-4"):  # of those that are kept
        shutil.rmtree(run / newer)
    run = trained(tmp_path, "grpo.py", GRPO, resume="auto", save_total_limit=4)
    assert weights(run) == whole
    again = [line for line in metrics(run) if "eval/greedy/accuracy" in line]
    assert again == logged and (run / "evaluations" / "greedy.jsonl").read_text() == answers


def test_the_best_checkpoint_is_kept_and_loaded(tmp_path):
    best = {"metric_for_best_model": "greedy/mean_tokens", "load_best_model_at_end": True, "save_total_limit": 2}
    run = trained(tmp_path, "sft.py", {**SFT, "max_steps": 8}, save_steps=2, greater_is_better=False, **best)
    measured = [line for line in metrics(run) if "eval/greedy/accuracy" in line]
    lengths = {line["step"]: line["eval/greedy/mean_tokens"] for line in measured[1:]}  # nothing is saved at 0
    step = min(lengths, key=lengths.get)
    assert {step_of(path) for path in checkpoints(run)} == {6, 8, step}
    assert weights(run) == (run / f"checkpoint-{step}" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("script", "tree", "path", "processes"),
    [
        ("reward_model.py", PAIRS, "tiny_pairs", 2),
        ("reward_model.py", LABELS, "tiny_judged", 1),
        ("sft.py", SFT, "tiny_talk", 1),
    ],
    ids=["pairs", "labels", "sft"],
)
def test_rows_held_out_are_measured_in_training(tmp_path, script, tree, path, processes):
    tree = {**tree, "max_steps": 2, "per_device_train_batch_size": 4 // processes}
    held_out = {"holdout": [{**HELD_OUT, "path": path}], "eval_strategy": "steps", "eval_steps": 1}
    held_out |= {"eval_on_start": True, "metric_for_best_model": "loss"}
    without = trained(tmp_path / "without", script, tree, processes, evaluates=False)
    run = trained(tmp_path / "with", script, tree, processes, evaluates=False, **held_out)
    logged = [line for line in metrics(run) if "eval/loss" in line]
    losses = {line["step"]: line["eval/loss"] for line in logged}
    assert list(losses) == [0, 1, 2] and weights(run) == weights(without)
    state = json.loads((run / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_global_step"] == min((1, 2), key=losses.get)
    if script == "reward_model.py":
        last, scores = logged[-1], json.loads((run / "evaluation.json").read_text())
        assert scores["rows"] == 21 and last["eval/accuracy"] == scores["accuracy"]
        assert [last["eval/accuracy_low"], last["eval/accuracy_high"]] == pytest.approx(scores["ci95"])
    if tree.get("loss") == "pointwise":
        rows = load_labels([Source(path=path, **HELD_OUT)])
        good = ModelReward("safety", str(run))(rows["completion"], list(rows))
        chances = [chance if label else 1 - chance for chance, label in zip(good, rows["label"], strict=True)]
        assert last["eval/loss"] == pytest.approx(-fmean(map(math.log, chances)), rel=1e-4)
    shutil.rmtree(run / "checkpoint-2")
    trained(tmp_path / "with", script, tree, processes, evaluates=False, resume="auto", **held_out)
    assert weights(run) == weights(without)
    assert [line for line in metrics(run) if "eval/loss" in line] == logged
