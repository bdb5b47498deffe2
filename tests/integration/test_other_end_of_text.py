"""A base model whose texts end otherwise than its chat template's turns, as Qwen2.5's and Llama's do."""

import json

import pytest
import torch
from conftest import ROOT, launch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from r1dist.tiny import BASE_DIR

TURN, TEXT = "<|im_end|>", "<|endoftext|>"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """The tiny base, which ends texts with `<|endoftext|>` and cannot write it: its embedding, the head's too, is 0."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    tokenizer.eos_token, tokenizer.pad_token = TEXT, None
    tokenizer.save_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids(TEXT)
    model = AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight[end] = 0
    model.config.eos_token_id = end
    model.generation_config = GenerationConfig(eos_token_id=end)
    model.save_pretrained(folder)
    return str(folder)


def test_what_is_trained_to_end_turns_ends_them(base, tmp_path):
    run, output = tmp_path / "sft", tmp_path / "scores.json"
    config = ROOT / "configs/recipes/tiny/sft.yaml"
    trained = launch("sft.py", "--config", config, "--model.path", base, "--output_dir", run)
    assert trained.returncode == 0, trained.stderr
    ids = AutoTokenizer.from_pretrained(run).convert_tokens_to_ids([TURN, TEXT])
    assert sorted(GenerationConfig.from_pretrained(run).eos_token_id) == ids
    assert AutoTokenizer.from_pretrained(run).eos_token == TURN
    small = ("--data.sources.0.limit", "100", "--sampling.samples", "1", "--output", output)
    done = launch("evaluate.py", "--model.path", run, *small)
    assert done.returncode == 0, done.stderr
    scores = json.loads(output.read_text())
    assert scores["greedy"]["finished"] >= 0.95 and scores["sampled"]["finished"] >= 0.95
    assert scores["greedy"]["format"] >= 0.95


def test_every_launcher_stops_there(base, tmp_path):
    """Of a base that has not been trained: what ends turns is no token of its own settings."""
