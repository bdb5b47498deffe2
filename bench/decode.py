"""The in-process engine against transformers' `generate`: `python bench/decode.py [--rounds 3] [--before PATH]`.

Random weights of SmolLM2-135M's shape, 128 sequences of 64 tokens (16 prompts, 8 samples of each), sampled at
temperature 1. With `--before`, the engine of the checkout PATH takes part as well. All alternate, each in a process of
its own, with one thread and with as many as there are processors; the latter count. Progress goes to stderr; the last
line on stdout is JSON.
"""

import argparse
import importlib
import os
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from result import aim, show
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import r1dist

ROOT = Path(__file__).resolve().parents[1]
PROMPTS, SAMPLES, TOKENS = 16, 8, 64
ENGINE, GENERATE, BEFORE = "engine", "generate", "before"
AIMS = {"decode_ratio": (BEFORE, 1.4), "decode_ratio_generate": (GENERATE, 1.5)}
"""Figure -> (what our rate is divided by, its aim)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--before", type=Path, help="another checkout, whose engine is measured, too")
    parser.add_argument("--time", choices=(ENGINE, GENERATE), help="print the seconds of one alone")
    options = parser.parse_args()
    if options.time:
        print(seconds(options.time))
        return
    checkouts = {ENGINE: ROOT, GENERATE: ROOT} | ({BEFORE: options.before.resolve()} if options.before else {})
    rates: dict[int, dict[str, list[float]]] = {
        threads: {side: [] for side in checkouts} for threads in sorted({1, os.cpu_count() or 1})
    }
    for _ in range(options.rounds):
        for threads, of_side in rates.items():
            for side, checkout in checkouts.items():
                of_side[side].append(PROMPTS * SAMPLES * TOKENS / seconds_in_a_process(side, checkout, threads))
            print(threads, {side: round(values[-1], 1) for side, values in of_side.items()}, file=sys.stderr)
    found = {
        threads: {
            figure: [a / b for a, b in zip(of_side[ENGINE], of_side[side], strict=True)]
            for figure, (side, _) in AIMS.items()
            if side in of_side
        }
        for threads, of_side in rates.items()
    }
    aims = {figure: aim(ratios, AIMS[figure][1], "higher") for figure, ratios in found[max(found)].items()}
    show("decode", aims, sequences=PROMPTS * SAMPLES, tokens=TOKENS, table=table(rates, found))


def table(rates: dict[int, dict[str, list[float]]], found: dict[int, dict[str, list[float]]]) -> list[list[str]]:
    """Medians: tokens per second of each side, and the ratios."""
    first = min(rates)
    heads = ["threads", *(f"{side}, tokens/s" for side in rates[first]), *found[first]]
    return [heads] + [
        [
            str(threads),
            *(f"{statistics.median(values):.0f}" for values in rates[threads].values()),
            *(f"{statistics.median(ratios):.2f}" for ratios in found[threads].values()),
        ]
        for threads in rates
    ]


def seconds_in_a_process(side: str, checkout: Path, threads: int) -> float:
    command = [sys.executable, __file__, "--time", GENERATE if side == GENERATE else ENGINE]
    env = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    used, took = done.stdout.splitlines()[-2:]
    if Path(used) != checkout:
        raise SystemExit(f"{side}: Python imports r1dist from {used} instead of {checkout}")
    return float(took)


def seconds(side: str) -> float:
    """Of one generation; a short one goes before, so that nothing is done for the first time."""
    print(Path(r1dist.__file__).resolve().parents[1])
    logging.set_verbosity_error()
    model = random_model()
    prompts = [[20 + (7 * p + k) % 200 for k in range(64 - p % 8)] for p in range(PROMPTS)]
    generation = by_engine if side == ENGINE else by_generate
    generation(model, prompts, 2)
    began = time.perf_counter()
    lengths = generation(model, prompts, TOKENS)
    took = time.perf_counter() - began
    assert lengths == [TOKENS] * PROMPTS * SAMPLES, lengths
    return took


def random_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(shape).eval()


def by_engine(model: LlamaForCausalLM, prompts: list[list[int]], tokens: int) -> list[int]:
    """Lengths of the completions. The engine is this checkout's, or one that bears the names of earlier commits."""
    now = (Path(r1dist.__file__).parent / "generation").is_dir()
    package, local, protocol = ("generation", "local", "engine") if now else ("rollout", "in_process", "protocol")
    engines, asking = (importlib.import_module(f"r1dist.{package}.{name}") for name in (local, protocol))

    @contextmanager
    def unwrapped():
        yield model

    engine = engines.InProcessEngine(unwrapped, stop_ids=[-1], pad_id=0, batch_size=PROMPTS * SAMPLES)
    asked = [
        asking.Request(prompt, p, i, asking.sample_seed(0, 0, p, i))
        for p, prompt in enumerate(prompts)
        for i in range(SAMPLES)
    ]
    return [len(rollout.token_ids) for rollout in asking.generate(engine, asked, asking.Sampling(tokens))]


def by_generate(model: LlamaForCausalLM, prompts: list[list[int]], tokens: int) -> list[int]:
    """Lengths of the completions."""
    longest = max(map(len, prompts))
    rows = [prompt for prompt in prompts for _ in range(SAMPLES)]
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens, pad_token_id=0
    )
    model.generation_config.eos_token_id = None
    output = model.generate(ids, attention_mask=mask, generation_config=config)
    return [output.size(1) - longest] * len(output)


if __name__ == "__main__":
    main()
