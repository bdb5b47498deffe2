"""Resuming with another division of the same step: other micro-batches, other processes."""

import json

import pytest
from conftest import SMALL_GRPO, launch, metrics, torchrun, write_yaml
from step_records import STUB, DrawingServer

CPU = ("--config_file", "configs/accelerate/cpu.yaml")
TREE = {**SMALL_GRPO, "max_completion_length": 24, "save_strategy": "steps", "save_steps": 1, "beta": 0.05}
TREE["lr_scheduler_type"] = "constant"  # it may not depend on the last step


def start(config, *arguments, processes=1):
    words = ("--config", config, "--resume", "auto", *map(str, arguments))
    done = torchrun("grpo.py", *words) if processes == 2 else launch("grpo.py", *words, accelerate=CPU)
    assert done.returncode == 0, done.stderr[-3000:]


def traces(folder) -> list[dict]:
    rows = [json.loads(line) for path in folder.glob("traces/*.jsonl") for line in path.read_text().splitlines()]
    return sorted(rows, key=lambda row: (row["step"], row["prompt_id"], row["sample_index"]))


def shape(per_device: int, accumulation: int, generation: int) -> list:
    return [
        "--per_device_train_batch_size", per_device, "--gradient_accumulation_steps", accumulation,
        "--steps_per_generation", generation,
    ]  # fmt: skip


@pytest.mark.parametrize("held", [False, True], ids=["at a generation's end", "between a generation's steps"])
def test_another_micro_batch_trains_on_the_same_rollouts(tmp_path, held):
    """32 x 1, one step, then 16 x 2 and 8 x 4: as 32 x 1 throughout."""
    steps = 2 if held else 1
    for name in ("whole", "divided"):
        write_yaml(tmp_path / f"{name}.yaml", {**TREE, "output_dir": str(tmp_path / name)})
    start(tmp_path / "whole.yaml", *shape(32, 1, steps), "--max_steps", 4)
    for last, (per_device, accumulation) in {1: (32, 1), 3: (16, 2), 4: (8, 4)}.items():
        arguments = shape(per_device, accumulation, steps * accumulation)
        start(tmp_path / "divided.yaml", *arguments, "--max_steps", last)
    whole, divided = (traces(tmp_path / name) for name in ("whole", "divided"))
    assert [{**row, "advantage": 0} for row in divided] == [{**row, "advantage": 0} for row in whole]
    for one, other in zip(metrics(tmp_path / "divided"), metrics(tmp_path / "whole"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=2e-7)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_generations_of_another_size_are_refused(tmp_path):
    config = write_yaml(tmp_path / "run.yaml", {**TREE, "output_dir": str(tmp_path / "run"), "max_steps": 1})
    start(config, *shape(32, 1, 1))
    done = launch("grpo.py", "--config", config, "--resume", *map(str, shape(32, 1, 2)), "--max_steps", "2")
    assert done.returncode == 2 and "its generations had 32 rows, 64 now" in done.stderr


def test_other_processes_go_on_with_the_generations_of_their_steps(tmp_path):
    """Ahead of the training, each rollout is asked for once, and is one step old."""
    server = DrawingServer()
    config = write_yaml(tmp_path / "run.yaml", {**TREE, "output_dir": str(tmp_path / "run")})
    words = [*STUB, "--rollout.servers", server.url, "--rollout.max_staleness", "1"]
    start(config, *words, *shape(32, 1, 1), "--max_steps", 2)
    before = len(server.seeds)
    start(config, *words, *shape(16, 1, 1), "--max_steps", 5, processes=2)
    server.stop()
    rows = traces(tmp_path / "run")
    assert [row["step"] for row in rows] == [step for step in range(5) for _ in range(32)]
    assert [row["step"] - row["policy_version"] for row in rows[::32]] == [0, 1, 0, 1, 1]
    asked = [seed for seed in server.seeds[before:] if seed > 100]  # the others are the probes after each sync
    assert len(asked) == 3 * 32 == len(set(asked))
