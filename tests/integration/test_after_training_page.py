"""docs/after_training.md: its example trains, is uploaded to a stand-in of the hub, and answers in transformers."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT
from stub_hub import StubHub
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

PAGE = (ROOT / "docs" / "after_training.md").read_text(encoding="utf-8")
SMALL = ("--max_steps", "2", "--logging_steps", "1")


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
    exec(block("python").replace("runs/worked", str(tmp_path)), {})
    shown = capsys.readouterr().out
    assert shown.startswith("<think>") and shown.rstrip().endswith("</answer>")  # it has stopped by itself
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.eos_token_id in GenerationConfig.from_pretrained(tmp_path).eos_token_id
    used = (tmp_path / "README.md").read_text()
    code = used.partition("### transformers\n\n```python\n")[2].partition("```")[0]
    exec(code.replace("somebody/worked", str(tmp_path)).replace("max_new_tokens=2048", "max_new_tokens=8"), {})


@pytest.mark.parametrize(("token", "told"), [("hf_wrong", "refuses the token (401)"), ("hf_reads", "may only read")])
def test_a_wrong_token_is_refused_before_anything_is_written(tmp_path, token, told):
    with StubHub() as hub:
        done = launched(hub, tmp_path, "python launch/sft.py --config worked.yaml --push_to_hub", *SMALL, token=token)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "worked").exists() and hub.repositories == {}


def test_adapters_and_reward_models_say_how_they_load(tmp_path):
    with StubHub() as hub:
        words = ("--model.lora.r", "4", "--push_to_hub", "--save_strategy", "no")
        done = launched(hub, tmp_path, "python launch/sft.py --config worked.yaml", *SMALL, *words)
        assert done.returncode == 0, done.stderr
    files = hub.files("somebody/worked")
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "generation_config.json"} <= set(
        files
    )
    assert b"library_name: peft" in files["README.md"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "worked")  # the adapters, with their base
    config = tmp_path / "pairs.yaml"
    config.write_text(json.dumps({"model": {"path": "tiny"}, "loss": "pairwise", "max_steps": 1, "save_strategy": "no",
                                  "sources": [{"path": "tiny_pairs", "limit": 8}]}))  # fmt: skip
    with StubHub() as hub:
        command = f"python launch/reward_model.py --config {config} --push_to_hub --hub_strategy end"
        words = ["--output_dir", str(tmp_path / "pairs")]
        done = launched(hub, tmp_path, command, *words)
        assert done.returncode == 0, done.stderr
    [files] = (branches["main"] for branches in hub.repositories.values())
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(files)
    code = files["README.md"].decode().partition("```python\n")[2].partition("```")[0]
    [folder] = hub.repositories
    found: dict = {}
    exec(code.replace(folder, str(tmp_path / folder.partition("/")[2])), found)
    assert found["score"].shape == ()
