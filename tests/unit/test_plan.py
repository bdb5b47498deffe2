"""What a run takes of a GPU's memory, part by part, and which GPUs the recipes fit. No GPU has measured it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT, launch
from transformers import PretrainedConfig, Qwen2ForCausalLM

from r1dist.cluster.memory import GIB, Card, Sharding, parameter_count, peak, room, training_memory
from r1dist.cluster.placement import SERVED_WEIGHTS
from r1dist.cluster.plan import check_machine, print_plan
from r1dist.cluster.recipes import LEAST_GIB, R1_ZERO, made_for, r1_zero_by_memory
from r1dist.cluster.shapes import KNOWN_SHAPES
from r1dist.config import GRPORun, RewardModelRun, SFTRun
from r1dist.config.loader import build, parse
from r1dist.errors import UserError
from r1dist.run.process import choose_default

RECIPES = ROOT / "configs/recipes"
QWEN = RECIPES / "qwen2.5-0.5b"


def test_parameters_are_counted_exactly(base_model):
    assert parameter_count(base_model.config) == sum(p.numel() for p in base_model.parameters())
    assert parameter_count(KNOWN_SHAPES["Qwen/Qwen2.5-0.5B"]) == 494_032_768
    assert parameter_count(KNOWN_SHAPES["Qwen/Qwen2.5-1.5B"]) == 1_543_714_304
    assert parameter_count(KNOWN_SHAPES["Qwen/Qwen2.5-7B"]) == 7_615_616_512
    assert parameter_count(KNOWN_SHAPES["HuggingFaceTB/SmolLM2-135M-Instruct"]) == 134_515_008


def test_lasting_parts_are_what_torch_holds(base_model, small_grpo):
    run = build(GRPORun, {**small_grpo, "bf16": False}, "test")
    parts = training_memory(run, base_model.config, Sharding())
    model = Qwen2ForCausalLM(base_model.config)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    states = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values() if t.dim())
    assert parts["weights"] == parts["gradients"] == parts["reference model"] == size
    assert parts["optimizer states"] == states


def test_zero_divides_what_its_stage_divides(base_model, small_grpo):
    run = build(GRPORun, {**small_grpo, "bf16": False}, "test")
    whole = training_memory(run, base_model.config, Sharding())
    divided = {1: {"optimizer states"}, 2: {"optimizer states", "gradients"}}
    divided[3] = divided[2] | {"weights", "reference model"}
    for stage, names in divided.items():
        parts = training_memory(run, base_model.config, Sharding(processes=4, zero_stage=stage))
        for name in ("weights", "gradients", "optimizer states", "reference model"):
            assert parts[name] == (whole[name] // 4 if name in names else whole[name]), (stage, name)


def test_a_token_budget_and_the_hosts_memory_leave_room_for_long_rollouts(small_grpo):
    shape, rows = KNOWN_SHAPES["Qwen/Qwen2.5-0.5B"], {"per_device_train_batch_size": 32, "bf16": True}

    def training(**train) -> float:
        tree = {**small_grpo, **rows, "max_completion_length": 16384, "train": train, "gradient_checkpointing": True}
        return training_memory(build(GRPORun, tree, "test"), shape, Sharding())["activations (training)"]

    assert training(token_budget=1) == training(token_budget=16384)  # a rollout is never cut
    assert training(token_budget=2 * 16640) * 14 < training() < training(token_budget=2 * 16640) * 16
    assert (
        training(token_budget=16640, activation_offload=True) < training(token_budget=16640) - 24 * 16640 * 896 * 1.9
    )


TRAINING = [
    recipe
    for recipe in sorted((ROOT / "configs/recipes").glob("qwen*/*.yaml"))
    if "learning_rate" in recipe.read_text()
]
RUN_CLASSES = {"rewards": GRPORun, "rollout": GRPORun, "loss": RewardModelRun}


def run_of(recipe: Path, *arguments: str) -> GRPORun | SFTRun | RewardModelRun:
    tree = yaml.safe_load(recipe.read_text())
    run_class = next((kind for key, kind in RUN_CLASSES.items() if key in tree), SFTRun)
    return parse(run_class, ["--config", str(recipe), "--bf16", *arguments])


def shape_of(run) -> PretrainedConfig:
    """Of a stage that starts from another's model, the base model's."""
    base = "Qwen/Qwen2.5-7B" if "7b" in run.model.path else "Qwen/Qwen2.5-0.5B"
    return KNOWN_SHAPES.get(run.model.path, KNOWN_SHAPES[base])


def needed(recipe: Path, *arguments: str) -> tuple[float, Card]:
    """GiB of each GPU without flash attention, which takes more; and the smallest GPUs that the recipe is made for."""
    run, gib = run_of(recipe, *arguments), LEAST_GIB[made_for(recipe)]
    if recipe.parent.name == "qwen2.5-7b":  # a node of 8; where servers generate, half of it
        serves = isinstance(run, GRPORun)
        card, sharding = Card(gib, 8), Sharding(4 if serves else 8, 3)
    else:
        offload = ROOT / "configs/deepspeed/zero2_offload.json"
        card, sharding = Card(gib), Sharding.from_file(1, offload) if "offload" in recipe.stem else Sharding()
    return peak(training_memory(run, shape_of(run), sharding, card)) / GIB, card


@pytest.mark.parametrize("recipe", TRAINING, ids=lambda recipe: f"{recipe.parent.name}-{recipe.stem}")
def test_each_recipe_fits_the_gpus_that_it_is_made_for(recipe):
    gib, card = needed(recipe)
    assert gib <= room(card.gib), f"{gib:.1f} of {room(card.gib):.1f} GiB"


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs/recipes").glob("qwen*/*.yaml")), ids=lambda r: r.stem)
def test_what_only_generates_leaves_its_servers_a_cache(recipe):
    tree = yaml.safe_load(recipe.read_text())
    models = [g["model"] for g in tree.get("generators", [])] or ([tree["model"]] if "sampling" in tree else [])
    for model in models:
        name = "Qwen/Qwen2.5-7B" if recipe.parent.name == "qwen2.5-7b" else "Qwen/Qwen2.5-0.5B"
        assert model["dtype"] == "bfloat16"
        assert 2 * parameter_count(KNOWN_SHAPES[name]) < SERVED_WEIGHTS * LEAST_GIB[made_for(recipe)] * GIB


def test_a_recipe_for_larger_gpus_does_not_fit_smaller_ones():
    for gb, smaller in ((16, 12), (80, 24)):
        gib, _ = needed(RECIPES / R1_ZERO[gb])
        assert gib > room(LEAST_GIB[smaller]), gb


@pytest.mark.parametrize(
    ("name", "gib", "recipe"),
    [
        ("RTX 3060", 11.6, "r1_zero_12gb"),
        ("RTX 4060 Ti", 15.6, "r1_zero_16gb"),
        ("RTX 3080", 19.7, "r1_zero_16gb"),
        ("L4", 22.0, "r1_zero"),
        ("L40S", 44.4, "r1_zero_48gb"),
        ("H100", 79.1, "r1_zero_80gb"),
        ("H200", 139.8, "r1_zero_80gb"),
        ("RTX 3070", 7.7, "r1_zero_12gb"),
    ],
)
def test_without_a_config_the_memory_of_the_gpu_decides(gpu, capsys, name, gib, recipe):
    gpu(name, gib)
    chosen = choose_default(r1_zero_by_memory(RECIPES), RECIPES / "tiny" / "r1_zero.yaml")
    assert chosen == RECIPES / "qwen2.5-0.5b" / f"{recipe}.yaml"
    (line,) = capsys.readouterr().out.splitlines()
    assert f"found {name} with {gib} GiB" in line and line.endswith(f"{recipe}.yaml")


@pytest.fixture
def gpu(monkeypatch):
    """Lets torch find a GPU of this name and memory."""

    def found(name: str, gib: float, gpus: int = 1) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (8, 9))
        memory = SimpleNamespace(total_memory=int(gib * GIB))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: memory)

    return found


def test_too_little_memory_is_told_in_two_lines_before_anything_is_loaded(gpu, capsys):
    gpu("RTX 3060", 11.6)
    run = run_of(QWEN / "r1_zero.yaml", "--per_device_train_batch_size", "2")
    for refuse in (check_machine, print_plan):
        with pytest.raises(UserError, match=r"r1_zero_12gb\.yaml fits") as refused:
            refuse(run)
        first, second = str(refused.value).splitlines()
        assert "the largest part is optimizer states: 3.7 GiB" in first and "11.6" in first
        assert "model.lora" in second
    gpu("RTX 4090", 23.5)
    check_machine(run)
    gpu("GTX 1060", 5.9)
    with pytest.raises(UserError, match=r"no recipe is made for less than 11\.5 GiB"):
        check_machine(run_of(QWEN / "r1_zero_12gb.yaml", "--max_completion_length", "16000"))


def test_a_larger_batch_is_what_is_named_where_that_is_too_large(gpu):
    gpu("RTX 4090", 23.5)
    with pytest.raises(UserError, match="activations") as refused:
        check_machine(run_of(QWEN / "r1_zero.yaml", "--per_device_train_batch_size", "128"))
    assert "lower per_device_train_batch_size" in str(refused.value) and "r1_zero.yaml fits" in str(refused.value)


def test_servers_on_the_trainers_gpu_are_counted_awake_or_asleep():
    def parts(*arguments: str, gib: float = 24) -> dict[str, int]:
        run = run_of(QWEN / "r1_zero.yaml", *arguments)
        return training_memory(run, shape_of(run), Sharding(), Card(gib))

    asleep, awake = parts(), parts("--rollout.max_staleness", "1")
    assert asleep["vLLM server (generation)"] == pytest.approx(0.3 * 24 * GIB)
    assert awake["vLLM server"] > 0.3 * 24 * GIB and peak(awake) > peak(asleep) + 2 * GIB
    share = parts("--rollout.serve.gpu_memory_utilization", "0.5")
    assert share["vLLM server (generation)"] == pytest.approx(0.5 * 24 * GIB)
    # The 7B's embedding is larger than vLLM's own buffer.
    run = run_of(
        QWEN.parent / "qwen2.5-7b" / "r1_zero.yaml", "--rollout.sleep", "--rollout.serve.tensor_parallel", "4"
    )
    run.rollout.serve.tensor_parallel = 4
    large = training_memory(run, shape_of(run), Sharding(4, 3), Card(80, 4))
    assert large["weights in transit (weight transfer)"] == 2 * 152064 * 3584 * 2


def test_the_in_process_engine_decodes_its_whole_batch():
    def cache(*arguments: str) -> int:
        run = run_of(QWEN / "r1_zero.yaml", "--rollout.engine", "transformers", *arguments)
        return training_memory(run, shape_of(run), Sharding())["cache and gathered weights (generation)"]

    assert cache("--rollout.batch_size", "128") == 2 * cache("--rollout.batch_size", "64")
    assert cache("--per_device_train_batch_size", "1") == cache()


def test_reward_models_are_whole_on_each_rank_in_what_it_computes_in():
    recipe = QWEN.parent / "qwen2.5-7b" / "final_rl.yaml"
    run = run_of(recipe)
    parts = training_memory(run, shape_of(run), Sharding(4, 3))
    count = parameter_count(shape_of(run), "SEQ_CLS")
    assert count == 7_615_616_512 - 152064 * 3584 + 2 * 3584 and parts["reward models"] == 2 * 2 * count
    run.trl["bf16"] = False
    assert training_memory(run, shape_of(run), Sharding(4, 3))["reward models"] == 2 * 4 * count


def test_dry_runs_need_no_hub_and_write_nothing(tmp_path):
    for script, recipe in (("grpo.py", "r1_zero"), ("sft.py", "sft")):
        done = launch(script, "--config", QWEN / f"{recipe}.yaml", "--dry_run", "--output_dir", tmp_path / "run")
        assert done.returncode == 0, done.stderr
        assert "path: Qwen/Qwen2.5-0.5B" in done.stdout and "494,032,768 parameters" in done.stdout
        assert "optimizer states" in done.stdout and "peak" in done.stdout
        assert not (tmp_path / "run").exists()
