"""Rebuild a shipped base model: `python tools/build_tiny/build.py [--model tiny-small] [--output DIR]`.

Reads top to bottom: tokenizer, model, rows in batches of like length, an AdamW run for each phase, save.
Simplified on purpose: no validation split and no packing, since the corpus is generated and never repeats.
"""

import argparse
import ast
import hashlib
import inspect
import itertools
import json
import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from corpus import END_OF_TEXT, FIRST_HABITS, IM_END, LAST_HABITS, documents
from safetensors.torch import load_file, save_file
from tiny_tokenizer import build_tokenizer
from tqdm import tqdm
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from r1dist.tiny import EMBEDDED

BATCHES_PER_DRAW = 8  # rows are sorted by length within this many batches, so that little is padded


@dataclass(frozen=True)
class Phase:
    """A part of the training, with its own stretch of the corpus and its own learning rate schedule."""

    seed: int
    steps: int
    learning_rate: float
    warmup_steps: int
    habits: dict[str, float] = field(repr=False)
    prose: float = 0.0
    """Share of rows that are plain sentences and requests, not problems."""


PHASES = (
    Phase(0, 2500, 2e-3, 100, FIRST_HABITS),
    Phase(1, 400, 1e-3, 20, LAST_HABITS),
    Phase(2, 600, 1e-3, 20, LAST_HABITS, prose=0.4),
)


@dataclass(frozen=True)
class BuildConfig:
    """Everything that decides the shipped weights, beside the corpus itself."""

    seed: int = 0
    vocab_size: int = 384
    tokenizer_rows: int = 3000
    hidden_size: int = 160
    intermediate_size: int = 512
    layers: int = 4
    heads: int = 5
    context: int = 512
    batch_rows: int = 128
    phases: tuple[Phase, ...] = PHASES


CONFIGS = {
    "tiny": BuildConfig(),
    "tiny-small": BuildConfig(hidden_size=96, intermediate_size=320, layers=3, heads=3),
}


def fingerprint(config: BuildConfig) -> str:
    """SHA-256 over the configuration, a sample of the corpus, and the code that trains."""
    sample = {
        "config": asdict(config),
        "corpus": [list(itertools.islice(documents(p.seed, p.habits, p.prose), 1000)) for p in config.phases],
        "code": [ast.dump(ast.parse(inspect.getsource(f))) for f in (build_model, batches, train)],
    }
    return hashlib.sha256(json.dumps(sample, sort_keys=True).encode()).hexdigest()


def build_model(config: BuildConfig, tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """A randomly initialised Qwen2 of `config`'s shape."""
    torch.manual_seed(config.seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            max_position_embeddings=config.context,
            tie_word_embeddings=True,
            use_sliding_window=False,
            bos_token_id=None,
            eos_token_id=tokenizer.convert_tokens_to_ids(IM_END),
            pad_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        )
    )


def batches(config: BuildConfig, phase: Phase, tokenizer: Qwen2Tokenizer) -> Iterator[dict[str, torch.Tensor]]:
    """Endless training batches of `batch_rows` rows of like length: input_ids, attention_mask, labels [B, T]."""
    order = random.Random(phase.seed)
    rows = documents(phase.seed, phase.habits, phase.prose)
    while True:
        drawn = tokenizer(list(itertools.islice(rows, config.batch_rows * BATCHES_PER_DRAW)))["input_ids"]
        drawn.sort(key=len)
        chunks = [drawn[i : i + config.batch_rows] for i in range(0, len(drawn), config.batch_rows)]
        order.shuffle(chunks)
        for chunk in chunks:
            batch = tokenizer.pad({"input_ids": chunk}, return_tensors="pt")
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            yield {**batch, "labels": labels}


def train(config: BuildConfig, phase: Phase, model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer) -> None:
    """AdamW with warm-up and a cosine to a twentieth; the weights end rounded to the dtype that is shipped."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=phase.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)

    def scale(step: int) -> float:
        if step < phase.warmup_steps:
            return (step + 1) / phase.warmup_steps
        done = (step - phase.warmup_steps) / max(1, phase.steps - phase.warmup_steps)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    model.train()
    progress = tqdm(itertools.islice(batches(config, phase, tokenizer), phase.steps), total=phase.steps, unit="step")
    for step, batch in enumerate(progress):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}")
    model.to(torch.bfloat16).to(torch.float32)


def save(config: BuildConfig, model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, output: Path) -> None:
    """Write the checkpoint as bfloat16 safetensors that carry, as metadata, what made them."""
    model.to(torch.bfloat16)
    stops = [tokenizer.convert_tokens_to_ids(token) for token in (IM_END, END_OF_TEXT)]
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=stops[1])
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    weights = output / "model.safetensors"
    made_by = {"fingerprint": fingerprint(config), "build": json.dumps(asdict(config))}
    save_file(load_file(weights), weights, metadata={"format": "pt", **made_by})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=CONFIGS, default="tiny")
    parser.add_argument("--output", type=Path, help="default: where the shipped one lies")
    arguments = parser.parse_args()
    config = CONFIGS[arguments.model]
    output = arguments.output or EMBEDDED[arguments.model]
    tokenizer = build_tokenizer(config.seed, config.tokenizer_rows, config.vocab_size)
    model = build_model(config, tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens -> {output}", flush=True)
    for phase in config.phases:
        train(config, phase, model, tokenizer)
    save(config, model, tokenizer, output)


if __name__ == "__main__":
    main()
