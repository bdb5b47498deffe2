"""Adapters: merged to what they compute, loaded with their own tokenizer, refused where they cannot be used."""

import dataclasses
import importlib.util
import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

from r1dist.adapters import load_model, merged_path
from r1dist.cluster.memory import Sharding, training_memory
from r1dist.config import ChatRun, EvaluateRun, GRPORun, Lora, Model, RewardModelRun, SampleRun, ServeRun, SFTRun
from r1dist.config.loader import build
from r1dist.errors import UserError
from r1dist.generation.local import load_engine
from r1dist.generation.vllm.start import plan_serve
from r1dist.models import check_lora, load_model_config, load_tokenizer, named_stop_ids, weights_path
from r1dist.pipeline.manifest import digest
from r1dist.reward_models import train as reward_models
from r1dist.rewards.model import ModelReward, conversation_ids
from r1dist.sft import train as sft
from r1dist.tiny import BASE_DIR

ZERO3 = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
IDS = torch.tensor([[5, 80, 200, 17, 3, 9]])


def adapters(folder, auto_class=AutoModelForCausalLM, task="CAUSAL_LM", base=BASE_DIR, **kwargs):
    """A folder with adapters of rank 4 that change much; returns it and the logits of the adapted model."""
    torch.manual_seed(0)
    model = auto_class.from_pretrained(base, dtype=torch.float32, **kwargs)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=24, target_modules="all-linear", task_type=task)).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1 if "lora" in name else 1)
    model.save_pretrained(folder)
    with torch.no_grad():
        return str(folder), model(IDS).logits


def test_a_model_is_whole_where_a_trainers_is_sharded(tmp_path):
    folder, _ = adapters(tmp_path, AutoModelForSequenceClassification, "SEQ_CLS", num_labels=1)
    reply = (["Hello!"], [{"problem": "Say hello."}])
    plain = ModelReward("helpfulness", folder)(*reply)
    sharding = HfDeepSpeedConfig(ZERO3)  # as TRL's arguments leave it, as long as they live
    assert ModelReward("helpfulness", folder)(*reply) == plain
    assert is_deepspeed_zero3_enabled()  # of what is loaded to be trained
    del sharding
    assert not is_deepspeed_zero3_enabled()


def test_merged_is_what_the_adapters_compute_and_what_their_equation_says(tmp_path, base_model):
    folder, adapted = adapters(tmp_path)
    by_hand = {name: tensor.clone() for name, tensor in base_model.state_dict().items()}
    factors = load_file(tmp_path / "adapter_model.safetensors")
    changed = 0
    for name, a in factors.items():
        if name.endswith("lora_A.weight"):
            weight = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            by_hand[weight] += 24 / 4 * factors[name.replace("lora_A", "lora_B")] @ a
            changed += 1
    assert changed == len(factors) / 2 > 20
    reference = AutoModelForCausalLM.from_config(base_model.config).eval()
    reference.load_state_dict(by_hand)
    in_memory = load_model(folder, dtype=torch.float32).eval()
    on_disk = AutoModelForCausalLM.from_pretrained(merged_path(folder, "float32"), dtype=torch.float32).eval()
    with torch.no_grad():
        base = base_model(IDS).logits
        for model in (reference, in_memory, on_disk):
            assert torch.allclose(model(IDS).logits, adapted, rtol=1e-4, atol=1e-4)
    assert (adapted - base).abs().max() > 1
    assert in_memory.lm_head.weight is in_memory.model.embed_tokens.weight


def test_adapters_are_merged_once_and_again_when_they_change(tmp_path):
    folder, _ = adapters(tmp_path)
    output = digest(tmp_path)  # as a pipeline records a stage's
    first = merged_path(folder, "float32")
    written = [(path, path.stat().st_mtime_ns) for path in sorted(tmp_path.glob("merged-*/*"))]
    assert merged_path(folder, "float32") == first and weights_path(Model(path=folder)) == first
    assert written == [(path, path.stat().st_mtime_ns) for path in sorted(tmp_path.glob("merged-*/*"))]
    assert digest(tmp_path) == output
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 1}))
    assert digest(tmp_path) != output
    assert merged_path(folder, "float32") != first


def test_adapters_may_have_been_trained_on_merged_adapters(tmp_path):
    first, _ = adapters(tmp_path / "first")
    second, adapted = adapters(tmp_path / "second", base=merged_path(first, "float32"))
    settings = json.loads((tmp_path / "second/adapter_config.json").read_text())
    for base in (merged_path(first, "float32"), first):  # the merged model, or the adapters themselves
        (tmp_path / "second/adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": base}))
        with torch.no_grad():
            assert torch.allclose(load_model(second, dtype=torch.float32)(IDS).logits, adapted, rtol=1e-4, atol=1e-4)


def test_adapters_record_where_their_base_model_is_whatever_the_working_directory(monkeypatch):
    monkeypatch.chdir(BASE_DIR.parent)
    assert weights_path(Model(path=BASE_DIR.name, lora=Lora())) == str(BASE_DIR.absolute())
    assert weights_path(Model(path=BASE_DIR.name)) == BASE_DIR.name


def test_what_a_folder_of_adapters_does_not_bring_comes_from_the_base_model(tmp_path):
    folder, _ = adapters(tmp_path)
    model = Model(path=folder)
    own = AutoTokenizer.from_pretrained(BASE_DIR)
    base = Model(path="tiny")
    assert load_model_config(model).to_dict() == load_model_config(base).to_dict()
    assert load_tokenizer(model).chat_template == own.chat_template
    assert named_stop_ids(model) == named_stop_ids(base)
    own.chat_template = "{{ 'another' }}"
    own.save_pretrained(folder)
    GenerationConfig(eos_token_id=77).save_pretrained(folder)
    assert load_tokenizer(model).chat_template == "{{ 'another' }}"
    assert 77 in named_stop_ids(model) and 77 not in named_stop_ids(base)
    assert AutoTokenizer.from_pretrained(merged_path(folder, "float32")).chat_template == "{{ 'another' }}"


def test_engines_and_servers_get_the_merged_model(tmp_path, template):
    folder, adapted = adapters(tmp_path)
    with load_engine(Model(path=folder), template, 4).unwrapped() as model, torch.no_grad():
        assert torch.allclose(model(IDS).logits, adapted, rtol=1e-4, atol=1e-4)
    serve = build(ServeRun, {"model": {"path": folder}, "endpoints": str(tmp_path / "e.json")}, "test")
    assert plan_serve(dataclasses.replace(serve, dry_run=True))[0] == folder and not list(tmp_path.glob("merged-*"))
    served = plan_serve(serve)[0]
    assert served == merged_path(folder, "float32") and AutoTokenizer.from_pretrained(served).chat_template


def test_a_reward_models_adapters_bring_its_head(tmp_path, template):
    folder, _ = adapters(
        tmp_path,
        AutoModelForSequenceClassification,
        "SEQ_CLS",
        num_labels=1,
        pad_token_id=template.tokenizer.pad_token_id,
    )
    rows = [{"problem": "Hello?"}, {"problem": "Say a long word, and another one."}]
    scores = ModelReward("safety", folder)(["Hello!", "No."], rows)
    # Without padding and without PEFT's merging.
    model = AutoModelForSequenceClassification.from_pretrained(BASE_DIR, num_labels=1, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, folder).eval()
    ids = [conversation_ids(template, row["problem"], text) for row, text in zip(rows, ("Hello!", "No."), strict=True)]
    with torch.no_grad():
        hidden = [model.base_model.model.model(torch.tensor([row])).last_hidden_state[0, -1] for row in ids]
    head = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.score.weight"]
    logits = [float(head[0] @ state) for state in hidden]
    assert scores == pytest.approx([1 / (1 + math.exp(-logit)) for logit in logits], abs=1e-4)


def test_adapters_that_cannot_be_used_are_refused_with_their_mend(tmp_path, monkeypatch):
    folder, _ = adapters(tmp_path)
    with pytest.raises(UserError, match="holds adapters trained for CAUSAL_LM; here SEQ_CLS is needed"):
        ModelReward("safety", folder)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**settings, "base_model_name_or_path": str(tmp_path / "gone")})
    )
    for load in (weights_path, load_model_config, load_tokenizer):
        with pytest.raises(UserError, match=r"gone\.\nCorrect `base_model_name_or_path` in its adapter_config.json"):
            load(Model(path=folder))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"peft is not installed in this environment.\n`pip install -e '.\[lora\]'`"):
        load_tokenizer(Model(path=folder))


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
def test_targets_that_are_no_layers_are_refused_before_weights_are_loaded(task, monkeypatch):
    for auto_class in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        monkeypatch.setattr(auto_class, "from_pretrained", None)
    for targets in ("nothing", "(", ["nothing"], ["q_proj", "nothing"], ["mlp"], []):
        with pytest.raises(UserError, match=r"lora.targets: .*\nUse `all-linear`, or some of down_proj, gate_proj"):
            check_lora(Model(path="tiny", lora=Lora(targets=targets)), task)
    for targets in ("all-linear", ["q_proj", "v_proj"], r".*\.0\.self_attn\.q_proj", ["layers.0.mlp.up_proj"]):
        check_lora(Model(path="tiny", lora=Lora(targets=targets)), task)
    with pytest.raises(UserError, match="share their weights"):
        check_lora(Model(path="tiny", lora=Lora(targets=["q_proj", "embed_tokens"])), task)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"model.lora: peft is not installed"):
        check_lora(Model(path="tiny", lora=Lora()), task)


def test_a_run_with_such_targets_writes_nothing(tmp_path, monkeypatch):
    model = {"path": "tiny", "lora": {"targets": ["nothing"]}}
    talk = {"data": {"sources": [{"path": "tiny_talk", "limit": 8}]}}
    pairs = {"loss": "pairwise", "sources": [{"path": "tiny_pairs", "limit": 8}]}
    for module, run_class, tree in ((sft, SFTRun, talk), (reward_models, RewardModelRun, pairs)):
        monkeypatch.setattr(module, "set_up_process", lambda **_: None)  # once for a process
        run = build(run_class, {**tree, "model": model, "output_dir": str(tmp_path / "run")}, "test")
        with pytest.raises(UserError, match=r"model\.lora\.targets"):
            module.train(run)
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fields", [{"r": 0}, {"r": -1}, {"alpha": 0}, {"dropout": 1.0}, {"save": "both"}])
def test_fields_that_make_no_sense_are_refused(small_grpo, fields):
    with pytest.raises(UserError, match=r"model\.lora"):
        build(GRPORun, {**small_grpo, "model": {"path": "tiny", "lora": fields}}, "run.yaml")


def test_lora_is_refused_where_nothing_is_trained():
    model, data = {"path": "tiny", "lora": {}}, {"sources": [{"path": "tiny"}]}
    trees = {
        ChatRun: {"model": model},
        EvaluateRun: {"model": model, "data": data},
        ServeRun: {"model": model, "endpoints": "x"},
        SampleRun: {"output_dir": "x", "generators": [{"name": "a", "model": model, "data": data}]},
    }
    for run_class, tree in trees.items():
        with pytest.raises(UserError, match=r"`model.lora` is for training"):
            build(run_class, tree, "run.yaml")


@pytest.mark.parametrize("sharding", [Sharding(), Sharding(4, 2)])
def test_the_plan_counts_what_is_trained(base_model, small_grpo, sharding):
    lora = {"path": "tiny", "lora": {"r": 4}}
    talk = {"data": {"sources": [{"path": "tiny_talk"}]}}
    pairs = {"loss": "pairwise", "sources": [{"path": "tiny_pairs"}]}
    for run_class, tree in ((GRPORun, small_grpo), (SFTRun, talk), (RewardModelRun, pairs)):
        tree = {"output_dir": "x", "bf16": False, **tree}
        whole, adapted = (
            training_memory(build(run_class, {**tree, "model": model}, "test"), base_model.config, sharding)
            for model in ({"path": "tiny"}, lora)
        )
        head = base_model.config.hidden_size if run_class is RewardModelRun else 0
        linear = [m for n, m in base_model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
        trained = 4 * sum(m.in_features + m.out_features for m in linear) + head
        divided = sharding.processes
        assert adapted["weights"] == whole["weights"] and adapted["adapters"] == 4 * trained
        assert adapted["gradients"] == 4 * trained // divided
        assert adapted["optimizer states"] == 8 * trained // divided
        assert "reference model" not in adapted
