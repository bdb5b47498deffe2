"""A GRPO step on one GPU in Qwen2.5-0.5B's shapes, with random weights: parts of bench/gpu_check.py."""

import gc
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import trl
import yaml
from beside_trl import Bench, compare
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, Qwen2ForCausalLM

from r1dist.cluster.memory import Sharding, peak, training_memory
from r1dist.cluster.shapes import QWEN_HALF_BILLION
from r1dist.config import GRPORun, Verify
from r1dist.config.loader import build
from r1dist.rewards import VERIFIERS
from r1dist.rewards.pool import Pool
from r1dist.rl.shared_attention import sharing_attention
from r1dist.tiny import BASE_DIR

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = (8192, 16384)
GENERATED = 512
ENDS_NEVER = 151_000
"""A token of the vocabulary that no random model prefers: completions are as long as they may be."""
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""Dense bfloat16 operations per second, by the makers' data sheets."""


class QwenBench(Bench):
    """Held in float32, computed in bfloat16, as the recipe does."""

    longest = 2048
    shape = QWEN_HALF_BILLION

    def make_model(self) -> PreTrainedModel:
        return save_random_qwen(self.path)

    def arguments(self, longest: int, prompts: int | None = None, **changes: Any) -> trl.GRPOConfig:
        kwargs = {"dtype": "float32", "attn_implementation": attention()} | changes.pop("model_init_kwargs", {})
        gpu = torch.cuda.is_available()
        fields = {"use_cpu": not gpu, "bf16": gpu, "model_init_kwargs": kwargs, "gradient_checkpointing": True}
        return super().arguments(longest, prompts, **fields | changes)

    def own_arguments(self, longest: int, prompts: int | None = None, **changes: Any) -> trl.GRPOConfig:
        kernel = sharing_attention(attention())
        return self.arguments(longest, prompts, model_init_kwargs={"attn_implementation": kernel}, **changes)


def save_random_qwen(path: Path) -> PreTrainedModel:
    """Qwen2.5-0.5B's shapes with random weights and the embedded tokenizer; returns it."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(QWEN_HALF_BILLION)
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    model.generation_config = GenerationConfig(eos_token_id=ENDS_NEVER, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model


def attention() -> str:
    """Where flash attention is not installed nothing can be packed."""
    return "flash_attention_2" if importlib.util.find_spec("flash_attn") else "sdpa"


def training(rounds: int, steps: int) -> dict[str, Any]:
    """Given rollouts, at most `BUDGETS` tokens to a forward, beside stock TRL's micro-batches."""
    found: dict[str, Any] = {"attention": attention()}
    with tempfile.TemporaryDirectory() as folder, Pool(VERIFIERS, Verify(workers=1)) as pool:
        bench = QwenBench(Path(folder), pool, steps)
        lengths = [len(ids) for group in bench.given.completions.values() for ids in group]
        lengths += map(len, bench.given.completions)  # a prompt is computed once
        for budget in BUDGETS:
            gc.collect()
            torch.cuda.reset_peak_memory_stats()
            clock = bench.ours(bench.longest, given=True, token_budget=budget)
            per_second = sum(lengths) / statistics.median(clock.seconds[1:])
            found[str(budget)] = {
                "tokens_per_second": per_second,
                "peak_share": share_of_peak(operations(lengths) / sum(lengths) * per_second),
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
                "estimated_gib": estimate(bench, budget) / 2**30,
            }
        found["beside_trl"] = compare(
            bench, rounds, bench.longest, True, lambda: bench.ours(bench.longest, True, token_budget=BUDGETS[0])
        )
    return found


def operations(lengths: list[int], shape: Any = QWEN_HALF_BILLION) -> float:
    """Of a forward and a backward pass over sequences: 6 for each parameter and token, and causal attention's.

    What is computed again because activations were not kept does not count.
    """
    parameters = 494_032_768
    attended = 6 * shape.num_hidden_layers * shape.hidden_size * sum(length**2 for length in lengths)
    return 6.0 * parameters * sum(lengths) + attended


def share_of_peak(per_second: float) -> float | None:
    """None where the chip's peak is not known."""
    name = torch.cuda.get_device_name()
    known = next((operations for chip, operations in PEAKS.items() if chip in name), None)
    return known and per_second / known


def estimate(bench: QwenBench, budget: int) -> int:
    """What `--dry_run` says of it, in bytes."""
    tree = {
        "model": {"path": str(bench.path), "dtype": "float32"}, "output_dir": "unused", "bf16": True,
        "data": {"sources": [{"path": "tiny"}]}, "beta": 0.0, "train": {"token_budget": budget},
        "per_device_train_batch_size": bench.micro, "max_completion_length": bench.longest,
        "num_generations": bench.group,
    }  # fmt: skip
    parts = training_memory(build(GRPORun, tree, "bench"), bench.shape, Sharding())
    return peak({name: size for name, size in parts.items() if not name.endswith("(generation)")})


def whole_step(steps: int) -> dict[str, Any]:
    """Median seconds of a step: ours with a server on the same GPU that sleeps, TRL's with vLLM in its process."""
    with tempfile.TemporaryDirectory() as name, Pool(VERIFIERS, Verify(workers=1)) as pool:
        folder = Path(name)
        bench = QwenBench(folder, pool, steps)
        tree = {
            "model": {"path": str(bench.path), "attn_implementation": attention()},
            "data": {"sources": [{"path": "tiny", "limit": 64 * steps}], "template": "chat"},
            "rollout": {"engine": "vllm", "transport": "ipc", "sleep": True, "max_logp_diff": 1e9},
            "train": {"token_budget": BUDGETS[0], "objective": "trl"}, "output_dir": str(folder / "run"),
            "num_generations": bench.group, "per_device_train_batch_size": bench.micro, "bf16": True,
            "max_steps": steps, "gradient_accumulation_steps": bench.prompts * bench.group // bench.micro,
            "max_completion_length": GENERATED,
            "save_strategy": "no", "gradient_checkpointing": True,
        }  # fmt: skip
        config = folder / "run.yaml"
        config.write_text(yaml.safe_dump(tree))
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
        ours = [*launcher, "configs/accelerate/single_gpu.yaml", "launch/grpo.py", "--config", str(config)]
        subprocess.run(ours, cwd=ROOT, check=True, stdout=sys.stderr)
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        mine = [sum(line[key] for key in line if key.startswith("seconds/")) for line in lines if "loss" in line]
        # Beside our own trainers vLLM is kept from TRL.
        theirs = [sys.executable, "bench/trl_colocate.py", str(bench.path), str(steps), str(GENERATED), attention()]
        done = subprocess.run(theirs, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        stock = json.loads(done.stdout.splitlines()[-1])
    seconds = {"ours": statistics.median(mine[1:]), "stock": statistics.median(stock[1:])}
    return {"seconds": seconds, "ratio": seconds["stock"] / seconds["ours"]}
