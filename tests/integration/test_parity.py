"""One batch, one step: the same loss and gradient however the work is divided."""

import pytest
from conftest import SMALL_GRPO, launch, metrics, torchrun, write_yaml

RANKS = ("--num_processes", "2")
CPU = ("--config_file", "configs/accelerate/cpu.yaml")
# Name -> (accelerate's arguments, processes, gradient accumulation); the global batch is 32 rollouts throughout.
LAYOUTS = {
    "accumulate 2": (("--config_file", "configs/accelerate/single_gpu.yaml"), 1, 2),
    "accumulate 4": (CPU, 1, 4),
    "2 processes": (None, 2, 1),
    "2 processes, accumulate 2": (None, 2, 2),
    "zero 1": (("--config_file", "configs/accelerate/zero1.yaml", *RANKS), 2, 1),
    "zero 2": (("--config_file", "configs/accelerate/zero2_cpu.yaml"), 2, 2),
    "zero 3": (("--config_file", "configs/accelerate/zero3_cpu.yaml"), 2, 1),
    "zero 2 offloaded": (("--config_file", "configs/accelerate/zero2_offload.yaml"), 1, 2),
    "zero 3 offloaded": (("--config_file", "configs/accelerate/zero3_offload.yaml", *RANKS), 2, 2),
}


def first_step(folder, loss_type, accelerate, processes, accumulation) -> dict:
    rows = 32 // processes // accumulation
    tree = {**SMALL_GRPO, "output_dir": str(folder / "run"), "max_steps": 1, "loss_type": loss_type}
    # Two steps' worth of reference drift would need two steps; a KL weight alone makes the term take part.
    tree |= {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation, "beta": 0.04}
    config = write_yaml(folder / "run.yaml", tree)
    if accelerate is None:  # accelerate launches several CPU processes under DeepSpeed only
        done = torchrun("grpo.py", "--config", config)
    else:
        done = launch("grpo.py", "--config", config, accelerate=accelerate)
    assert done.returncode == 0, done.stderr
    return metrics(folder / "run")[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """By loss: one process, one micro-batch."""
    return {
        loss_type: first_step(tmp_path_factory.mktemp("whole"), loss_type, CPU, 1, 1) for loss_type in ("dapo", "grpo")
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_first_step(tmp_path, whole, layout):
    # DAPO's normaliser, the tokens of the global batch, is the one that a division of the work can break.
    step = first_step(tmp_path, "dapo", *LAYOUTS[layout])
    assert abs(whole["dapo"]["loss"]) > 1e-3
    for name in ("completions/mean_length", "reward"):
        assert step[name] == pytest.approx(whole["dapo"][name], rel=1e-6), "not the same batch"
    for name in ("loss", "grad_norm"):
        assert step[name] == pytest.approx(whole["dapo"][name], rel=1e-4), name


@pytest.mark.parametrize("layout", ["accumulate 4", "zero 2"])
def test_first_step_of_grpo(tmp_path, whole, layout):
    """GRPO's first loss is the mean advantage, zero by construction: its gradient tells."""
    step = first_step(tmp_path, "grpo", *LAYOUTS[layout])
    assert step["loss"] == pytest.approx(whole["grpo"]["loss"], abs=1e-6)
    assert step["grad_norm"] == pytest.approx(whole["grpo"]["grad_norm"], rel=1e-4)


def test_first_step_of_sft(tmp_path):
    """Completion-only loss, averaged over the tokens of the global batch."""
    steps = {}
    for name, rows in (("cpu", 8), ("zero2_cpu", 4)):
        done = launch(
            "sft.py", "--config", "configs/recipes/tiny/sft.yaml", "--max_steps", "1", "--data.sources.0.limit", "200",
            "--output_dir", tmp_path / name, "--per_device_train_batch_size", rows,
            accelerate=("--config_file", f"configs/accelerate/{name}.yaml"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        steps[name] = metrics(tmp_path / name)[0]
    for field in ("loss", "grad_norm"):
        assert steps["zero2_cpu"][field] == pytest.approx(steps["cpu"][field], rel=1e-4)
    assert steps["zero2_cpu"]["num_tokens"] == steps["cpu"]["num_tokens"]
