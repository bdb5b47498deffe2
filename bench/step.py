"""A GRPO step beside stock TRL's: `python bench/step.py [--rounds 3] [--steps 4]`.

`trl.GRPOTrainer` and ours take turns in one run, on the same random model of 5M parameters, prompts, group size,
seeds and loss. `train_ratio`: the rollouts are given, their lengths log-normal, the mean a quarter of the longest;
trained tokens per second, ours over theirs. Loss and gradient norm of each step are compared. `step_ratio`: whole
steps, each with its own in-process generation. Progress goes to stderr, one JSON object to stdout.

Not measured: `overlap_ratio` and `growth`. There is no asynchronous training here yet.
"""

import argparse
import json
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
import trl
from datasets import Dataset
from rollout import random_model
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback

from r1dist.config import Verify
from r1dist.process import set_up_process
from r1dist.reward_fields import Reward
from r1dist.rewards import VERIFIERS, Rewards
from r1dist.rewards.pool import Pool
from r1dist.rollout.protocol import Request, Rollout
from r1dist.train.grpo import GRPOTrainer, in_process_engine

PROMPTS, GROUP, MICRO = 8, 8, 8
LONGEST = 512
ENDS = 6
"""Token ids that end a completion of the random model: a mean of about 60 tokens."""


class Clock(TrainerCallback):
    """Seconds of each optimizer step, and what it logged."""

    def __init__(self):
        self.seconds: list[float] = []
        self.logs: list[dict] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.began)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.logs.append(logs)


class Given:
    """The same completions for a prompt, whoever asks: TRL's vLLM client, and our engine, both by this."""

    def __init__(self, prompts: list[list[int]], vocabulary: int):
        draw = random.Random(0)
        spread = 0.8
        centre = math.log(LONGEST / 4) - spread**2 / 2
        self.completions = {
            tuple(prompt): [
                [draw.randrange(20, vocabulary - 8) for _ in range(max(1, min(LONGEST, round(length))))]
                for length in (draw.lognormvariate(centre, spread) for _ in range(GROUP))
            ]
            for prompt in prompts
        }
        self.tokens = sum(len(ids) for group in self.completions.values() for ids in group)

    def of(self, prompts: list[list[int]]) -> list[list[int]]:
        seen: Counter = Counter()
        found = []
        for prompt in map(tuple, prompts):
            found.append(self.completions[prompt][seen[prompt]])
            seen[prompt] += 1
        return found

    # As TRL's `vllm_generation`, and as an `Engine`.
    def sync_weights(self, version: int | None = None) -> None:
        pass

    def generate(self, prompts, images, num_generations, profiler) -> tuple:
        completions = self.of(prompts)
        return prompts, completions, [[[0.0]] * len(ids) for ids in completions], None

    def stream(self, requests: list[Request], sampling):
        given = self.of([request.prompt_ids for request in requests])
        for place, (request, ids) in enumerate(zip(requests, given, strict=True)):
            yield place, Rollout(request, ids, [0.0] * len(ids), "stop", 0)

    def rest(self) -> None:
        pass

    def metrics(self) -> dict:
        return {}

    def close(self) -> None:
        pass


def reward(completion_ids, **_) -> list[float]:
    """Something that differs within a group and takes no time."""
    return [(sum(ids) % 7) / 6 for ids in completion_ids]


class Bench:
    """Builds trainers over one model; `steps` steps each."""

    def __init__(self, folder: Path, pool: Pool, steps: int):
        self.folder = folder
        self.pool = pool
        self.steps = steps
        self.path = folder / "model"
        model = random_model(self.path)
        self.parameters = sum(p.numel() for p in model.parameters())
        model.generation_config.eos_token_id = list(range(20, 20 + ENDS))
        model.generation_config.save_pretrained(self.path)
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        rows = [{"prompt": "".join(chr(97 + (7 * p + k) % 26) for k in range(24 + p)), "prompt_id": p}
                for p in range(PROMPTS)]  # fmt: skip
        self.dataset = Dataset.from_list(rows)
        self.given = Given([self.tokenizer(row["prompt"])["input_ids"] for row in rows], len(self.tokenizer))

    def arguments(self, longest: int) -> trl.GRPOConfig:
        return trl.GRPOConfig(
            output_dir=str(self.folder / "out"), use_cpu=True, bf16=False, report_to="none", logging_steps=1, seed=0,
            save_strategy="no", disable_tqdm=True, max_steps=self.steps, learning_rate=1e-5, loss_type="dapo",
            beta=0.0, num_generations=GROUP, per_device_train_batch_size=MICRO,
            gradient_accumulation_steps=PROMPTS * GROUP // MICRO, max_completion_length=longest,
            gradient_checkpointing=False, vllm_importance_sampling_correction=False, remove_unused_columns=False,
            dataloader_pin_memory=False,
        )  # fmt: skip

    def stock(self, longest: int, given: bool) -> Clock:
        trainer = trl.GRPOTrainer(str(self.path), [reward], self.arguments(longest), self.dataset,
                                  processing_class=self.tokenizer)  # fmt: skip
        if given:
            trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, self.given, -1
        return self._timed(trainer)

    def ours(self, longest: int, given: bool) -> Clock:
        trainer = GRPOTrainer(
            make_engine=(lambda _: self.given)
            if given
            else lambda trainer: in_process_engine(PROMPTS * GROUP, trainer),
            rewards=Rewards({"repetition": Reward()}, self.pool),
            traces=None,
            stall_timeout=1800,
            model=str(self.path),
            reward_funcs=[reward],
            args=self.arguments(longest),
            train_dataset=self.dataset,
            processing_class=self.tokenizer,
        )
        return self._timed(trainer)

    def _timed(self, trainer) -> Clock:
        clock = Clock()
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)  # stdout is for the result
        torch.manual_seed(0)
        trainer.train()
        return clock


def compare(bench: Bench, rounds: int, longest: int, given: bool) -> dict:
    """Alternating; the median of the rounds' ratios, and the rates. The first step of each is left out."""
    ratios, rates = [], {"stock": [], "ours": []}
    apart = {"loss": 0.0, "grad_norm": 0.0}
    for number in range(rounds):
        clocks = {"stock": bench.stock(longest, given), "ours": bench.ours(longest, given)}
        for name, clock in clocks.items():
            tokens = statistics.fmean(log["completions/mean_length"] for log in clock.logs[1:]) * PROMPTS * GROUP
            rates[name].append(tokens / statistics.median(clock.seconds[1:]))
        ratios.append(rates["ours"][-1] / rates["stock"][-1])
        if given:
            for field in apart:
                pairs = zip(clocks["stock"].logs, clocks["ours"].logs, strict=True)
                apart[field] = max(apart[field], *(abs(a[field] - b[field]) / abs(a[field]) for a, b in pairs))
        print(f"round {number + 1}: {rates}", file=sys.stderr)
    found = {"ratio": statistics.median(ratios), "rounds": ratios,
             "tokens_per_second": {name: statistics.median(values) for name, values in rates.items()}}  # fmt: skip
    return found | ({"largest_relative_difference": apart} if given else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    wish = parser.parse_args()
    set_up_process()
    with tempfile.TemporaryDirectory() as folder, Pool(VERIFIERS, Verify(workers=1)) as pool:
        bench = Bench(Path(folder), pool, wish.steps)
        train = compare(bench, wish.rounds, LONGEST, given=True)
        step = compare(bench, wish.rounds, LONGEST // 2, given=False)
    result = {
        "bench": "step",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "parameters": bench.parameters,
        "mean_length": bench.given.tokens / (PROMPTS * GROUP),
        "train_ratio": train["ratio"],
        "step_ratio": step["ratio"],
        "train": train,
        "step": step,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
