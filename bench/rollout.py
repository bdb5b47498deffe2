"""The engine against vLLM's own offline generation: `python bench/rollout.py [--rounds 5]`.

One server behind our engine and one `vllm.LLM`, both with the same random model of 5M parameters, alternate on
the same prompts, seeds and lengths: all of 64 tokens, and skewed (geometric, a mean of about a quarter of the
maximum). Then 2,048 samples are asked of a server that answers at once: what is left is our own overhead, and
200 such steps show whether memory grows. Progress goes to stderr; the last line on stdout is JSON.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from result import aim, show
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from r1dist.config import Rollout, Serve
from r1dist.generation.engine import Request, Sampling, generate, sample_seed
from r1dist.generation.vllm.engine import Policy, ServerEngine
from r1dist.generation.vllm.start import connect, start_managed
from r1dist.generation.weight_sync.source import WeightSource
from r1dist.run.process import set_up_process
from r1dist.tiny import BASE_DIR

ROOT = Path(__file__).resolve().parents[1]
PROMPTS, SAMPLES = 32, 16
LENGTHS = {"throughput_ratio": (64, 0), "throughput_ratio_skewed": (256, 6)}
"""Metric -> (most tokens, token ids that end a completion): each id ends it with a chance of 1/363 a token."""
OVERHEAD_SAMPLES, MEMORY_STEPS = 2048, 200


def main() -> None:
    set_up_process()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = random_model(folder / "model")
        aims, found = throughput(folder, model, rounds)
        share, client = overhead(folder, model, found["engine_tokens_per_second"])
    parameters = sum(p.numel() for p in model.parameters())
    show("rollout", aims | {"client_overhead": aim(share, 0.05, "lower")}, parameters=parameters, **found, **client)


def random_model(folder: Path, hidden: int = 256, positions: int = 512) -> Qwen2ForCausalLM:
    """Over the tiny tokenizer's vocabulary, 5M parameters by default; its draws are nearly uniform."""
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=6,
            num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=positions,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def requests(step: int, prompts: int, samples: int) -> list[Request]:
    ids = [[20 + (7 * p + k) % 200 for k in range(24)] for p in range(prompts)]
    return [Request(ids[p], p, i, sample_seed(0, step, p, i)) for p in range(prompts) for i in range(samples)]


def engine_over(rollout: Rollout, model, folder: Path, stops: list[int]) -> ServerEngine:
    policy = Policy(
        lambda tokens: [0.0] * (len(tokens) - 1), probe=[20, 21], probe_tokens=0, stop_ids=stops, rank=0,
        ranks=1, broadcast=lambda value: value,
    )  # fmt: skip
    return connect(rollout, folder / "servers", WeightSource(model, torch.float32), policy, trainers=1)


def throughput(folder: Path, model, rounds: int) -> tuple[dict, dict]:
    """The aims, and what else is to be told of them."""
    os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"  # stdout is for the result
    from vllm import LLM, SamplingParams

    rollout = Rollout(engine="vllm", max_logp_diff=1e9, serve=Serve(dtype="float32", max_model_len=512))
    servers = start_managed(rollout, str(folder / "model"), "float32", 512, folder / "servers", trainers=1)
    llm = LLM(
        str(folder / "model"), dtype="float32", enforce_eager=True, max_model_len=512, max_logprobs=-1,
        kv_cache_memory_bytes=2**30, logprobs_mode="processed_logprobs", enable_chunked_prefill=False,
    )  # fmt: skip
    aims, speeds, means = {}, {}, {}
    try:
        for metric, (most, ends) in LENGTHS.items():
            stops = list(range(300, 300 + ends))
            engine = engine_over(rollout, model, folder, stops)
            engine.sync_weights(0)
            ours, theirs, lengths = [], [], []
            for step in range(rounds + 1):
                asked = requests(step, PROMPTS, SAMPLES)
                began = time.perf_counter()
                rollouts = generate(engine, asked, Sampling(max_tokens=most))
                seconds = time.perf_counter() - began
                lengths += [len(r.token_ids) for r in rollouts]
                ours.append(sum(len(r.token_ids) for r in rollouts) / seconds)
                params = [
                    SamplingParams(n=SAMPLES, max_tokens=most, seed=r.seed, stop_token_ids=stops, logprobs=0)
                    for r in asked[::SAMPLES]
                ]
                prompts = [{"prompt_token_ids": r.prompt_ids} for r in asked[::SAMPLES]]
                began = time.perf_counter()
                outputs = llm.generate(prompts, params, use_tqdm=False)
                seconds = time.perf_counter() - began
                theirs.append(sum(len(c.token_ids) for o in outputs for c in o.outputs) / seconds)
                print(f"{metric} {step}: {ours[-1]:.0f} against {theirs[-1]:.0f} tokens/s", file=sys.stderr)
            engine.close()
            ratios = [a / b for a, b in zip(ours[1:], theirs[1:], strict=True)]  # the first round warms up
            aims[metric] = aim(ratios, 0.9, "higher")
            means[metric] = statistics.fmean(lengths)
            speeds[metric] = statistics.median(ours[1:])
    finally:
        servers.stop()
    return aims, {"mean_length": means, "engine_tokens_per_second": speeds["throughput_ratio"]}


def overhead(folder: Path, model, speed: float) -> tuple[float, dict]:
    """Seconds of ours for 2,048 samples of 64 tokens, as a share of what a server needs for them at `speed`."""
    serve_stub = "import sys, time; sys.path.insert(0, 'tests'); from stub_server import StubServer; "
    serve_stub += "print(StubServer(tokens=64).url, flush=True); time.sleep(3600)"
    stub = subprocess.Popen([sys.executable, "-c", serve_stub], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        url = stub.stdout.readline().strip()
        rollout = Rollout(
            engine="vllm", servers=url, transport="shm", max_logp_diff=1e9, max_concurrent_requests=OVERHEAD_SAMPLES
        )
        engine = engine_over(rollout, model, folder, [])
        engine.sync_weights(0)
        seconds, cpu, memory = [], [], []
        process = psutil.Process()
        for step in range(MEMORY_STEPS):
            asked = requests(step, OVERHEAD_SAMPLES // SAMPLES, SAMPLES)
            began, busy = time.perf_counter(), time.process_time()
            generate(engine, asked, Sampling(max_tokens=64))
            seconds.append(time.perf_counter() - began)
            cpu.append(time.process_time() - busy)
            memory.append(process.memory_info().rss / 2**20)
        engine.close()
    finally:
        stub.kill()
    generation = OVERHEAD_SAMPLES * 64 / speed
    return statistics.median(cpu) / generation, {
        "client_cpu_seconds": statistics.median(cpu),
        "with_the_stubs_own_seconds": statistics.median(seconds),
        "generation_seconds": generation,
        "memory_mib": {"after_20": memory[19], "after_200": memory[-1]},
    }


if __name__ == "__main__":
    main()
