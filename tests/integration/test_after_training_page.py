"""docs/after_training.md: its example trains, is uploaded to a stand-in of the hub, and answers in transformers."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL_GRPO
from huggingface_hub import constants
from stub_hub import StubHub
from transformers import AutoTokenizer, GenerationConfig, set_seed

import r1dist.reward_models.train as reward_models
import r1dist.rl.train as rl
import r1dist.sft.train as sft
from r1dist.config import GRPORun, Model, RewardModelRun, SFTRun
from r1dist.config.loader import build
from r1dist.data.templates import load_template

PAGE = (ROOT / "docs" / "after_training.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)[1]


def launched(hub: StubHub, tmp_path, command: str, *words: str, token: str = "hf_writes"):
    """In a process of its own: the hub's address is read when its client is imported."""
    config = tmp_path / "worked.yaml"
    config.write_text(block("yaml"))
    command = command.replace("worked.yaml", str(config))
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": token}
    arguments = [*shlex.split(command)[1:], "--output_dir", str(tmp_path / "worked"), *words]
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def uploaded(tmp_path_factory):
    """The page's run with its upload, and checkpoints on the way: the stub, the folder, and what was printed."""
    tmp_path = tmp_path_factory.mktemp("page")
    [command] = re.findall(r"^    (python launch/sft.py .*--push_to_hub.*)$", PAGE, re.MULTILINE)
    with StubHub() as hub:
        saving = ("--save_strategy", "steps", "--save_steps", "4", "--hub_strategy", "checkpoint")
        done = launched(hub, tmp_path, command, *saving)
        assert done.returncode == 0, done.stderr
        yield hub, tmp_path / "worked", done.stdout


def test_the_upload_has_the_model_and_nothing_of_the_run(uploaded):
    hub, folder, printed = uploaded
    assert f"hub: {hub.url}/somebody/worked\n" in printed and hub.private == {"somebody/worked"}
    files = hub.files("somebody/worked")
    top = {name for name in files if not name.startswith("last-checkpoint/")}
    model = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert top == model | {"chat_template.jinja", "README.md"}
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert {"last-checkpoint/optimizer.pt", "last-checkpoint/rank0.pt"} <= set(files)
    assert hub.messages[0] == "Training in progress, step 4" and hub.messages[-1] == "End of training"
    assert "HF_TOKEN" not in files["README.md"].decode() and b"hf_writes" not in b"".join(files.values())


def test_the_model_works_in_transformers_as_the_page_says(uploaded, tmp_path, capsys):
    """From what was uploaded alone."""
    hub, _, _ = uploaded
    for name, content in hub.files("somebody/worked").items():
        if "/" not in name:
            (tmp_path / name).write_bytes(content)
    set_seed(0)
    exec(block("python").replace("runs/worked", str(tmp_path)), {})
    assert capsys.readouterr().out.rstrip().endswith("</answer>")  # it has stopped by itself
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.eos_token_id in GenerationConfig.from_pretrained(tmp_path).eos_token_id
    used = (tmp_path / "README.md").read_text()
    code = used.partition("### transformers\n\n```python\n")[2].partition("```")[0]
    exec(code.replace("somebody/worked", str(tmp_path)).replace("max_new_tokens=2048", "max_new_tokens=8"), {})


def test_a_wrong_token_is_refused_before_anything_is_written(tmp_path):
    command = "python launch/sft.py --config worked.yaml --push_to_hub"
    with StubHub() as hub:
        done = launched(hub, tmp_path, command, token="hf_wrong")
    assert done.returncode == 2 and "refuses the token (401)" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "worked").exists() and hub.repositories == {}


ONE_STEP = {"model": {"path": "tiny"}, "max_steps": 1, "use_cpu": True, "push_to_hub": True, "save_strategy": "no"}
LORA = {**ONE_STEP, "model": {"path": "tiny", "lora": {"r": 4}}, "data": {"sources": [{"path": "tiny", "limit": 16}]}}
LABELS = {**ONE_STEP, "loss": "pointwise", "sources": [{"path": "tiny_judged", "limit": 16}]}
LABELS["holdout"] = [{"path": "tiny_judged", "split": "test", "limit": 4}]
RL = {**SMALL_GRPO, **ONE_STEP, "data": {"sources": [{"path": "tiny", "limit": 16}], "template": "r1_zero"}}


def trained(monkeypatch, tmp_path, module, run_class, tree) -> dict[str, bytes]:
    """What a run in this process uploads."""
    monkeypatch.setattr(module, "set_up_process", lambda **kwargs: None)  # once in a process
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_writes")
    with StubHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        module.train(build(run_class, {**tree, "output_dir": str(tmp_path / "run")}, "test"))
        return hub.files("somebody/run")


def code_in(files: dict[str, bytes], tmp_path) -> str:
    code = files["README.md"].decode().partition("```python\n")[2].partition("```")[0]
    return re.sub("somebody/run", str(tmp_path / "run"), re.sub(r"max_new_tokens=\d+", "max_new_tokens=4", code))


def test_adapters_are_uploaded_and_load_as_their_card_says(monkeypatch, tmp_path):
    files = trained(monkeypatch, tmp_path, sft, SFTRun, LORA)
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "generation_config.json"} <= set(
        files
    )
    assert "model.safetensors" not in files and b"library_name: peft" in files["README.md"]
    exec(code_in(files, tmp_path), {})


def test_so_is_a_reward_model_with_what_it_was_right_on(monkeypatch, tmp_path):
    files = trained(monkeypatch, tmp_path, reward_models, RewardModelRun, LABELS)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert b"% of 4 rows held out" in files["README.md"]
    found: dict = {}
    exec(code_in(files, tmp_path), found)
    assert 0 < found["score"] < 1


def test_so_is_a_policy_whose_prompt_is_no_chat(monkeypatch, tmp_path):
    """Every token that ends a rollout is in the generation settings, so `generate` stops there, too."""
    files = trained(monkeypatch, tmp_path, rl, GRPORun, RL)
    stops = load_template(Model(path="tiny"), "r1_zero").stop_ids
    assert json.loads(files["generation_config.json"])["eos_token_id"] == stops
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= set(files)
    code = code_in(files, tmp_path)
    assert "A conversation between User and Assistant" in code and "apply_chat_template" not in code
    exec(code, {})
