"""Seconds to bring new weights to a server: `python bench/sync.py [--sizes 1M 5M 50M 0.5B] [--rounds 5]`.

Random weights of each size, a real server, our engine's `sync_weights` from end to end (gather, write, load,
drop the caches, compare logprobs), in bfloat16 as a GPU run would send. For the largest size also its share of
a step: the same weights generate 64 completions of 64 tokens and are trained on them once. On a machine without
a GPU that is `shm`; the GPU transports are measured by `bench/gpu_check.py`. Progress goes to stderr; the last line
on stdout is JSON.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

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

# Name -> (vocabulary, hidden, intermediate, layers, heads, key-value heads); the last is Qwen2.5-0.5B's shape.
SHAPES = {
    "1M": (363, 128, 384, 5, 4, 2),
    "5M": (363, 256, 768, 6, 8, 4),
    "50M": (32000, 512, 1536, 10, 8, 4),
    "0.5B": (151936, 896, 4864, 24, 14, 2),
}
PROMPTS, SAMPLES, LENGTH = 8, 8, 64


def main() -> None:
    set_up_process()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    sizes = {}
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            sizes[size] = measure(size, Path(folder), options.rounds, with_step=size == options.sizes[-1])
            print(size, sizes[size], file=sys.stderr)
    share = sizes[options.sizes[-1]]["share_of_step"]
    aims = {"shm_share": aim(share, 0.05, "lower")} if options.sizes[-1] == "0.5B" else {}
    show("sync", aims, transport="shm", dtype="bfloat16", sizes=sizes)


def measure(size: str, folder: Path, rounds: int, with_step: bool) -> dict:
    model = random_model(size, folder / "model")
    rollout = Rollout(engine="vllm", max_logp_diff=1e9, serve=Serve(dtype="bfloat16", max_model_len=256))
    servers = start_managed(rollout, str(folder / "model"), "bfloat16", 256, folder / "servers", trainers=1)

    def score(tokens: list[int]) -> list[float]:
        with torch.no_grad():
            logprobs = model(torch.tensor([tokens])).logits[0, :-1].float().log_softmax(-1)
        return logprobs.gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1).tolist()

    policy = Policy(
        score, probe=list(range(20, 40)), probe_tokens=16, stop_ids=[], rank=0, ranks=1, broadcast=lambda v: v
    )
    engine = connect(rollout, folder / "servers", WeightSource(model, torch.bfloat16), policy, trainers=1)
    try:
        seconds = [timed(lambda step=step: engine.sync_weights(step)) for step in range(rounds + 1)][1:]
        found = {"parameters": sum(p.numel() for p in model.parameters()), "seconds": statistics.median(seconds)}
        found["logp_diff"] = engine.metrics()["rollout/logp_diff"]
        if with_step:
            found |= step_seconds(engine, model, found["seconds"])
    finally:
        engine.close()
        servers.stop()
    return found


def step_seconds(engine: ServerEngine, model, sync: float) -> dict:
    """Seconds of one step's generation and training, and the sync's share of the whole."""
    asked = [
        Request(list(range(20 + p, 44 + p)), p, i, sample_seed(0, 0, p, i))
        for p in range(PROMPTS)
        for i in range(SAMPLES)
    ]
    rollouts = []
    generation = timed(lambda: rollouts.extend(generate(engine, asked, Sampling(max_tokens=LENGTH))))
    optimizer = torch.optim.AdamW(model.parameters())

    def train() -> None:
        for rollout in rollouts:  # one at a time: the logits of a large vocabulary
            ids = torch.tensor([rollout.request.prompt_ids + rollout.token_ids])
            (model(ids, labels=ids).loss / len(rollouts)).backward()
        optimizer.step()

    training = timed(train)
    share = sync / (sync + generation + training)
    return {"generation_seconds": generation, "training_seconds": training, "share_of_step": share}


def random_model(size: str, folder: Path) -> Qwen2ForCausalLM:
    vocabulary, hidden, intermediate, layers, heads, kv_heads = SHAPES[size]
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=512,
            tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def timed(act) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
