"""`launch/grpo.py` as a user runs it: what it writes, what it refuses, and the real path of the Qwen recipe."""

import json

import pytest
import torch
from conftest import GSM8K, ROOT, SMALL_GRPO, launch, metrics, torchrun, write_yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from r1dist.tiny import BASE_DIR

TRACE_FIELDS = {
    "step", "prompt_id", "sample_index", "policy_version", "seed", "prompt_tokens", "completion_tokens",
    "finish_reason", "rewards", "advantage", "prompt", "text",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three steps with a checkpoint, two optimizer steps to a generation."""
    folder = tmp_path_factory.mktemp("grpo")
    tree = {**SMALL_GRPO, "output_dir": str(folder / "run"), "save_strategy": "steps", "save_steps": 2}
    tree |= {"per_device_train_batch_size": 16, "steps_per_generation": 2, "max_steps": 3}
    config = write_yaml(folder / "run.yaml", tree)
    done = launch("grpo.py", "--config", config, accelerate=("--config_file", "configs/accelerate/cpu.yaml"))
    assert done.returncode == 0, done.stderr
    assert "rollouts are generated in this process, by transformers (as configured)" in done.stderr.splitlines()[0]
    return folder / "run", config, done


def test_traces_hold_each_sample_once_with_what_it_earned(finished):
    folder, _, _ = finished
    rows = [json.loads(line) for line in (folder / "traces" / "rank0.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 32  # generations at steps 0 and 2
    assert all(row.keys() == TRACE_FIELDS for row in rows)
    assert len({(row["step"], row["prompt_id"], row["sample_index"]) for row in rows}) == len(rows)
    assert len({row["seed"] for row in rows}) == len(rows)
    assert {row["policy_version"] for row in rows} == {0, 2} == {row["step"] for row in rows}
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    for row in rows:
        assert row["rewards"].keys() == {"accuracy", "format"}
        assert row["finish_reason"] == "length" or row["completion_tokens"] <= 48
        if row["finish_reason"] == "stop":
            assert len(tokenizer(row["text"])["input_ids"]) + 1 == row["completion_tokens"]
    groups = {(row["step"], row["prompt_id"]): [] for row in rows}
    for row in rows:
        groups[row["step"], row["prompt_id"]].append(row)
    for group in groups.values():
        assert sorted(row["sample_index"] for row in group) == list(range(8))
        totals = torch.tensor([sum(row["rewards"].values()) for row in group])
        expected = (totals - totals.mean()) / (totals.std() + 1e-4)
        torch.testing.assert_close(torch.tensor([row["advantage"] for row in group]), expected, atol=1e-4, rtol=1e-4)


def test_phases_are_timed_and_logged(finished):
    folder, _, done = finished
    logged = metrics(folder)
    assert [line["step"] for line in logged] == [1, 2, 3]
    first = logged[0]
    phases = {key.removeprefix("seconds/") for key in first if key.startswith("seconds/")}
    assert {"generate", "reward", "reference", "old_logprobs", "train", "sync"} <= phases
    assert all(first[f"seconds/{phase}"] > 0 for phase in ("generate", "reward", "reference", "train"))
    assert "seconds/generate" not in logged[1]  # the second step trains on the first one's rollouts
    assert "step 3/3" in done.stdout and "0:00 left" in done.stdout


def test_the_saved_policy_loads_and_has_moved(finished, base_model):
    folder, _, _ = finished
    trained = AutoModelForCausalLM.from_pretrained(folder)
    moved = [not torch.equal(a, b) for a, b in zip(trained.parameters(), base_model.parameters(), strict=True)]
    assert any(moved)


def test_the_folder_says_what_made_it(finished):
    folder, _, _ = finished
    record = json.loads((folder / "run.json").read_text())
    assert record["launcher"] == "grpo" and record["versions"]["trl"] == "1.16.0"
    assert record["config"]["learning_rate"] == 1e-4 and record["config"]["loss_type"] == "grpo"


def test_another_run_may_not_write_into_the_folder(finished):
    folder, config, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = launch("grpo.py", "--config", config)
    assert done.returncode == 2 and "already holds a run" in done.stderr and "--resume" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_resume_goes_on_from_the_newest_checkpoint(finished):
    folder, config, _ = finished
    done = launch("grpo.py", "--config", config, "--resume", "--max_steps", "4")
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in metrics(folder)][-2:] == [3, 4]


def test_two_cpu_processes_resume(tmp_path):
    """Their checkpoints hold tensors tagged "cpu:0", which torch alone does not load back."""
    tree = {**SMALL_GRPO, "output_dir": str(tmp_path / "run"), "save_strategy": "steps", "save_steps": 1}
    config = write_yaml(tmp_path / "run.yaml", {**tree, "per_device_train_batch_size": 8, "max_steps": 1})
    for arguments in ((), ("--resume", "--max_steps", "2")):
        done = torchrun("grpo.py", "--config", config, *arguments)
        assert done.returncode == 0, done.stderr
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2]


def test_a_bare_launch_says_which_recipe_it_runs_and_why():
    done = launch("grpo.py", "--dry_run")
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0]
    recipe = "qwen2.5-0.5b" if torch.cuda.is_available() else "tiny"
    assert first.startswith("No --config given and found ") and f"configs/recipes/{recipe}/r1_zero.yaml" in first


@pytest.fixture(scope="module")
def small_qwen(tmp_path_factory):
    """A randomly initialised model of Qwen2.5-0.5B's class: grouped queries and tied embeddings, shrunken."""
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=56, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows_like_gsm8k(folder):
    """GSM8K itself where it lies beside the checkout, else a file of its shape."""
    if GSM8K.is_dir():
        return GSM8K / "train.jsonl"
    path = folder / "gsm8k.jsonl"
    rows = [{"question": f"Tom has {n} apples and buys one.", "answer": f"{n}+1\n#### {n + 1}"} for n in range(64)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_whole_path_of_the_qwen_grpo_recipe(tmp_path, small_qwen):
    done = launch(
        "grpo.py", "--config", ROOT / "configs/recipes/qwen2.5-0.5b/r1_zero_gsm8k.yaml",
        "--model.path", small_qwen, "--data.sources.0.path", rows_like_gsm8k(tmp_path),
        "--rollout.engine", "transformers", "--data.sources.0.limit", "64",
        "--output_dir", tmp_path / "run", "--max_steps", "2",
        "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2", "--max_completion_length", "16",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(metrics(tmp_path / "run")) == 2
    rows = [json.loads(line) for line in (tmp_path / "run/traces/rank0.jsonl").read_text().splitlines()]
    assert len(rows) == 32 and all(row["finish_reason"] == "length" or row["completion_tokens"] < 16 for row in rows)


def test_the_whole_path_of_the_qwen_sft_recipe(tmp_path, small_qwen):
    marks = "<|begin_of_thought|>one and {0}<|end_of_thought|><|begin_of_solution|>{0}<|end_of_solution|>"
    rows = [
        {"system": "s", "conversations": [
            {"from": "user", "value": f"1+{n}"}, {"from": "assistant", "value": marks.format(n + 1)}
        ]}
        for n in range(40)
    ]  # fmt: skip
    path = tmp_path / "stratos.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = launch(
        "sft.py", "--config", ROOT / "configs/recipes/qwen2.5-0.5b/sft.yaml", "--model.path", small_qwen,
        "--data.sources.0.path", path, "--output_dir", tmp_path / "run", "--gradient_accumulation_steps", "2",
        "--max_length", "2048", "--num_train_epochs", "2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert len(losses) > 2 and losses[-1] < losses[0]
