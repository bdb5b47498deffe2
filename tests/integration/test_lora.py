"""Training with adapters: only they are trained and saved, a resume is exact, and what is left loads everywhere."""

import json
import shutil

import pytest
import torch
from conftest import write_yaml
from safetensors.torch import load_file
from small_runs import GRPO, LABELS, PAIRS, SFT, Launch

from r1dist.adapters import load_model
from r1dist.config import ChatRun, Model
from r1dist.evaluation.chat import Chat
from r1dist.models import load_tokenizer
from r1dist.rewards.model import ModelReward
from r1dist.tiny import BASE_DIR

LORA = {"path": "tiny", "lora": {"r": 4, "alpha": 8, "dropout": 0.1}}
SHORT = {"model": LORA, "learning_rate": 1e-2, "max_steps": 4, "save_total_limit": 4}
HOLDOUT = {"holdout": [{"path": "tiny_pairs", "limit": 4}]}
KINDS = {
    "sft": ("sft.py", {**SFT, **SHORT}, "CAUSAL_LM", 1),
    "sft, ZeRO-2": ("sft.py", {**SFT, **SHORT, "gradient_checkpointing": True}, "CAUSAL_LM", 2),
    "grpo": ("grpo.py", {**GRPO, **SHORT, "sync_ref_model": False}, "CAUSAL_LM", 1),
    "pairs": ("reward_model.py", {**PAIRS, **SHORT, **HOLDOUT}, "SEQ_CLS", 1),
    "labels": ("reward_model.py", {**LABELS, **SHORT, "gradient_checkpointing": True}, "SEQ_CLS", 1),
}


@pytest.fixture(scope="module", params=KINDS)
def trained(request, zygote, tmp_path_factory):
    """The kind, the way to start its run again, its folder, and a copy of what it left."""
    script, tree, task, processes = KINDS[request.param]
    folder = tmp_path_factory.mktemp("lora")
    config = write_yaml(folder / "run.yaml", {**tree, "output_dir": str(folder / "run")})

    def start(*arguments):
        launch = Launch(zygote, script, config, processes, *arguments)
        assert launch.wait() == [0] * processes, launch.log.read_text()[-3000:]

    start()
    shutil.copytree(folder / "run", folder / "whole")
    return task, start, folder / "run", folder / "whole"


def tensors(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_adapters_are_trained_and_saved_with_a_reward_models_head(trained):
    task, _, _, whole = trained
    saved = tensors(whole)
    assert not (whole / "model.safetensors").exists()
    heads = [name for name in saved if "lora" not in name]
    assert len(heads) == (task == "SEQ_CLS") and (not heads or heads[0].endswith("score.weight"))
    for step, later in ((1, 2), (2, 4)):
        before, after = tensors(whole / f"checkpoint-{step}"), tensors(whole / f"checkpoint-{later}")
        assert before.keys() == after.keys() == saved.keys()
        assert all(not torch.equal(before[name], after[name]) for name in saved)
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors(whole / "checkpoint-4").items())


def test_a_resumed_run_comes_to_the_same_adapters(trained):
    _, start, run, whole = trained
    for step in (3, 4):
        shutil.rmtree(run / f"checkpoint-{step}")
    (run / "adapter_model.safetensors").unlink()
    start()
    resumed, undisturbed = tensors(run), tensors(whole)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in undisturbed.items())
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "loss" in line] == [1, 2, 3, 4]


def test_the_whole_model_is_left_if_it_is_asked_for(trained):
    task, start, run, whole = trained
    start("--model.lora.save", "merged")  # may change on resume; nothing is left to train
    assert not list(run.glob("adapter_*"))
    labels = {"num_labels": 1} if task == "SEQ_CLS" else {}
    merged, adapted = (load_model(str(folder), task, dtype=torch.float32, **labels) for folder in (run, whole))
    of_adapted, name = adapted.state_dict(), "model.layers.0.mlp.up_proj.weight"
    assert merged.state_dict().keys() == of_adapted.keys()
    assert all(torch.allclose(tensor, of_adapted[key], atol=1e-6) for key, tensor in merged.state_dict().items())
    assert not torch.allclose(of_adapted[name], load_model(str(BASE_DIR), dtype=torch.float32).state_dict()[name])
    assert json.loads((run / "config.json").read_text())["pad_token_id"] is not None


def test_what_is_left_is_loaded_for_chat_and_rewards(trained):
    task, _, run, whole = trained
    folders = (str(run), str(whole))
    if task == "SEQ_CLS":
        merged, adapted = (ModelReward("helpfulness", name)(["Hi!"], [{"problem": "Hello"}]) for name in folders)
        assert merged == pytest.approx(adapted, abs=1e-4)
        return
    chats = [Chat(ChatRun(model=Model(path=name), temperature=0, max_tokens=8)) for name in folders]
    assert len({chat.reply("2+3=?", lambda text: None) for chat in chats}) == 1
    assert load_tokenizer(Model(path=str(whole))).chat_template


@pytest.mark.parametrize("trained", ["grpo"], indirect=True)
@pytest.mark.parametrize(("script", "tree"), [("sft.py", SFT), ("grpo.py", {**GRPO, "sync_ref_model": False})])
def test_the_next_stage_starts_from_the_adapters(trained, zygote, tmp_path, script, tree):
    _, _, _, whole = trained
    # With nothing learnt, it leaves the merged model.
    still = {"learning_rate": 0.0, "max_steps": 1, "save_strategy": "no", "output_dir": str(tmp_path / "next")}
    config = write_yaml(tmp_path / "run.yaml", {**tree, **still, "model": {"path": str(whole)}})
    launch = Launch(zygote, script, config, 1)
    assert launch.wait() == [0], launch.log.read_text()[-3000:]
    merged = load_model(str(whole), dtype=torch.float32).state_dict()
    passed_on = load_file(tmp_path / "next/model.safetensors")
    assert len(passed_on) > 20
    assert all(torch.allclose(tensor, merged[name], atol=1e-6) for name, tensor in passed_on.items())
    for line in map(json.loads, (tmp_path / "next/metrics.jsonl").open()):
        assert abs(line.get("kl", 0.0)) < 1e-6  # the reference model has the adapters, too
