"""A base model whose texts end otherwise than its chat template's turns, as those of Qwen2.5 and Llama do."""

import json

import pytest
import torch
from conftest import ROOT, SMALL_GRPO, metrics, write_yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from r1dist.data.tags import TAGS
from r1dist.files import greedy_answers, read_lines
from r1dist.tiny import BASE_DIR

TURN, TEXT = "<|im_end|>", "<|endoftext|>"
OPENS = "<think>\n"
SFT = {
    "data": {"sources": [{"path": "tiny", "limit": 256, "seed": 1}]},
    "seed": 0,
    "max_steps": 16,
    "learning_rate": 3e-4,
    "per_device_train_batch_size": 8,
    "packing": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The tiny base, with an end of text that it cannot write: its embedding, which is also the head's, is 0.

    Its tokenizer has no padding; its template opens the thought, and drops the thoughts of replies.
    """
    folder = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    tokenizer.eos_token, tokenizer.pad_token = TEXT, None
    content = "{{ message.content.split('</think>')[-1] if message.role == 'assistant' else message.content }}"
    template = tokenizer.chat_template.replace("{{ message.content }}", content)
    tokenizer.chat_template = template.replace("assistant\n{%", f"assistant\n{OPENS}{{%")
    tokenizer.save_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids(TEXT)
    model = AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[end] = 0
    model.config.eos_token_id, model.generation_config = end, GenerationConfig(eos_token_id=end)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def launched(zygote, tmp_path_factory):
    """Runs a launcher to its end, and returns what it printed."""
    logs = tmp_path_factory.mktemp("logs")

    def launch(script: str, *arguments) -> str:
        log = logs / f"{len(list(logs.iterdir()))}.log"
        pid = zygote.ask(run=script, argv=[*map(str, arguments)], env={}, log=str(log))["pid"]
        code = zygote.ask(wait=pid)["code"]
        assert code == 0, log.read_text()
        return log.read_text()

    return launch


@pytest.fixture(scope="module")
def trained(base, launched):
    tree = {**SFT, "model": {"path": str(base)}, "output_dir": str(base / "sft")}
    launched("sft.py", "--config", write_yaml(base / "sft.yaml", tree))
    return base / "sft"


def test_what_is_taught_to_end_turns_ends_them(trained, launched, tmp_path):
    small = ("--data.sources.0.limit", 60, "--sampling.samples", 1, "--output", tmp_path / "scores.json")
    launched("evaluate.py", "--config", ROOT / "configs/recipes/tiny/evaluate.yaml", "--model.path", trained, *small)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["greedy"]["finished"] >= 0.95 and scores["sampled"]["finished"] >= 0.95
    assert scores["greedy"]["format"] >= 0.95  # its thoughts were taught, though the template drops them


def test_what_is_saved_says_so(trained):
    tokenizer = AutoTokenizer.from_pretrained(trained)
    assert tokenizer.eos_token == TURN and tokenizer.pad_token == TEXT
    ends = tokenizer.convert_tokens_to_ids([TURN, TEXT])
    assert sorted(GenerationConfig.from_pretrained(trained).eos_token_id) == ends


def test_rl_pays_what_stops_there(base, launched, tmp_path):
    """From the base itself, whose settings do not name what ends turns."""
    tree = {**SMALL_GRPO, "model": {"path": str(base)}, "output_dir": str(tmp_path / "run"), "max_steps": 1}
    tree |= {"max_completion_length": 112, "rewards": {"tag_count": 1}}
    launched("grpo.py", "--config", write_yaml(tmp_path / "run.yaml", tree))
    rows = list(read_lines(tmp_path / "run/traces/rank0.jsonl"))
    assert all(row["text"].startswith(OPENS) and TURN not in row["text"] for row in rows)
    assert sum(row["finish_reason"] == "stop" for row in rows) >= 24
    assert metrics(tmp_path / "run")[0]["rewards/tag_count/mean"] >= 0.25  # `<think>` stands in the prompt


def test_samples_and_chats_stop_there(trained, launched, tmp_path):
    generator = {
        "name": "g", "model": {"path": str(trained)}, "data": {"sources": [{"path": "tiny", "limit": 8}]},
        "sampling": {"samples": 2, "max_tokens": 112},
    }  # fmt: skip
    tree = {"output_dir": str(tmp_path / "rows"), "generators": [generator], "filters": {"correct": False}}
    tree["rollout"] = {"engine": "transformers"}
    launched("sample.py", "--config", write_yaml(tmp_path / "sample.yaml", tree))
    rows = list(read_lines(tmp_path / "rows/rows.jsonl"))
    assert rows and all(row["messages"][-1]["content"].startswith(OPENS) for row in rows)
    asked = ("--prompt", "Start with 7, then *3 +4 *9: what is the last digit?", "--temperature", 0)
    shown = launched("chat.py", "--model.path", trained, *asked, "--max_tokens", 112)
    assert OPENS in shown and shown.endswith("</answer>\n")


def test_rl_and_evaluation_show_examples_and_begin_the_reply(launched, tmp_path):
    """Rewards and measures see the prefill as part of the reply; the examples stand in the prompt."""
    prompting = {"examples": "configs/recipes/tiny/examples.jsonl", "shots": 1, "prefill": "<think>Let me"}
    tree = {**SMALL_GRPO, "output_dir": str(tmp_path / "run"), "max_steps": 1, "prompting": prompting}
    launched("grpo.py", "--config", write_yaml(tmp_path / "run.yaml", {**tree, "rewards": {"tag_count": 1}}))
    rows = list(read_lines(tmp_path / "run" / "traces" / "rank0.jsonl"))
    assert rows and all(row["text"].startswith("<think>Let me") for row in rows)
    assert all(row["prompt_tokens"] > 80 for row in rows)  # 24 to 40 without the example
    assert all(row["rewards"]["tag_count"] == sum(row["text"].count(tag) == 1 for tag in TAGS) / 4 for row in rows)
    tree = {"model": {"path": "tiny"}, "data": {"sources": [{"path": "tiny", "split": "test", "limit": 8}]}}
    tree |= {"prompting": prompting, "sampling": {"samples": 1, "max_tokens": 16}, "output": str(tmp_path / "e.json")}
    tree["rollout"] = {"engine": "transformers"}
    launched("evaluate.py", "--config", write_yaml(tmp_path / "evaluate.yaml", tree))
    texts = [row["text"] for row in greedy_answers(tmp_path / "e.json")]
    assert len(texts) == 8 and all(text.startswith("<think>Let me") for text in texts)
