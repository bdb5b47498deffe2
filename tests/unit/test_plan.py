"""`--dry_run`'s estimate against what torch really holds."""

import torch
from conftest import ROOT, launch
from transformers import Qwen2Config, Qwen2ForCausalLM

from r1dist.cluster.plan import KNOWN_SHAPES, Sharding, activations, parameter_count, peak, training_memory
from r1dist.config import GRPORun, SFTRun
from r1dist.config.loader import build, parse

QWEN = ROOT / "configs/recipes/qwen2.5-0.5b"


def test_parameters_are_counted_exactly(base_model):
    assert parameter_count(base_model.config) == sum(p.numel() for p in base_model.parameters())
    assert parameter_count(KNOWN_SHAPES["Qwen/Qwen2.5-0.5B"]) == 494_032_768
    assert parameter_count(KNOWN_SHAPES["Qwen/Qwen2.5-7B"]) == 7_615_616_512


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


def test_activations_are_in_the_range_of_what_autograd_keeps():
    config = Qwen2Config(
        vocab_size=1000, hidden_size=128, intermediate_size=512, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).train()
    held: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model(input_ids=torch.randint(0, 1000, (8, 256)))
    measured = sum(size for pointer, size in held.items() if pointer not in weights)
    logits = 2 * 4 * 8 * 256 * 1000
    estimate = activations(config, 8 * 256, checkpointed=False, width=4) - logits
    assert 0.5 * measured < estimate < 2 * measured


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


def test_the_qwen_recipes_fit_the_gpus_they_name():
    shape = KNOWN_SHAPES["Qwen/Qwen2.5-0.5B"]
    for name, run_class, sharding, gigabytes in (
        ("r1_zero", GRPORun, Sharding(), 24),
        ("r1_zero_gsm8k", GRPORun, Sharding(), 24),
        ("sft", SFTRun, Sharding(), 24),
        ("r1_zero_12gb", GRPORun, Sharding(1, 3, optimizer_on_host=True, parameters_on_host=True), 12),
    ):
        run = parse(run_class, ["--config", str(QWEN / f"{name}.yaml"), "--bf16"])
        # 2 GB for the CUDA context, the allocator and the display.
        assert peak(training_memory(run, shape, sharding)) < (gigabytes - 2) * 1e9, name


def test_the_7b_recipes_fit_eight_gpus_of_80_gb():
    shape = KNOWN_SHAPES["Qwen/Qwen2.5-7B"]
    for name, run_class in (("r1_zero", GRPORun), ("reasoning_rl", GRPORun), ("sft_full", SFTRun)):
        run = parse(run_class, ["--config", str(QWEN.parent / "qwen2.5-7b" / f"{name}.yaml"), "--bf16"])
        assert peak(training_memory(run, shape, Sharding(8, 3))) < 75e9, name


def test_dry_runs_need_no_hub_and_write_nothing(tmp_path):
    for script, recipe in (("grpo.py", "r1_zero"), ("sft.py", "sft")):
        done = launch(script, "--config", QWEN / f"{recipe}.yaml", "--dry_run", "--output_dir", tmp_path / "run")
        assert done.returncode == 0, done.stderr
        assert "path: Qwen/Qwen2.5-0.5B" in done.stdout and "494,032,768 parameters" in done.stdout
        assert "optimizer states" in done.stdout and "peak" in done.stdout
        assert not (tmp_path / "run").exists()
