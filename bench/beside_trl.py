"""Our GRPO trainer and stock TRL's in turns in one run, on the same model, prompts, group size, seeds and loss."""

import functools
import math
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import trl
from datasets import Dataset
from rollout import random_model
from transformers import AutoTokenizer, PreTrainedModel, PrinterCallback, TrainerCallback

from r1dist.config import Model, TrainRL
from r1dist.config import Rollout as RolloutSettings
from r1dist.config.rewards import Reward
from r1dist.data.templates import load_template
from r1dist.generation.engine import Request, Rollout
from r1dist.generation.trainer_engines import local_engine, server_engine
from r1dist.rewards import Rewards
from r1dist.rewards.pool import Pool
from r1dist.rl.shared_attention import ATTENTION as SHARED_PROMPTS
from r1dist.rl.trainer import GRPOTrainer

LONGEST = 512
ENDS = 6
"""Token ids that end a completion of the random model: a mean of about 60 tokens."""


class Clock(TrainerCallback):
    """Seconds of each optimizer step, those that processors worked in it, and what it logged."""

    def __init__(self):
        self.seconds: list[float] = []
        self.worked: list[float] = []
        self.logs: list[dict] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.began, self.before = time.perf_counter(), processor_seconds()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.began)
        self.worked.append(processor_seconds() - self.before)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.logs.append(logs)


def processor_seconds() -> float:
    """Of all that runs below the process that started this one's launcher, if it has one, else below this one."""
    top = psutil.Process()
    if "LOCAL_RANK" in os.environ:
        top = top.parent()
    times = [process.cpu_times() for process in (top, *top.children(recursive=True))]
    return sum(t.user + t.system for t in times)


class Given:
    """The same completions for a prompt, whoever asks: TRL's vLLM client, and our engine, both by this."""

    def __init__(self, prompts: list[list[int]], vocabulary: int, longest: int, group: int):
        draw = random.Random(0)
        spread = 0.8
        centre = math.log(longest / 4) - spread**2 / 2
        self.completions = {
            tuple(prompt): [
                [draw.randrange(20 + ENDS, vocabulary - 8) for _ in range(max(1, min(longest, round(length))))]
                for length in (draw.lognormvariate(centre, spread) for _ in range(group))
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

    def end_generation(self) -> None:
        pass

    def metrics(self) -> dict:
        return {}

    def close(self) -> None:
        pass


def reward(completions, **_) -> list[float]:
    """Something that differs within a group and takes no time."""
    return [(sum(map(ord, text)) % 7) / 6 for text in completions]


class OneReward(Rewards):
    """`reward`, as our trainer asks for it."""

    def __init__(self, pool: Pool):
        super().__init__({"format": Reward()}, pool)
        self.rewards = {"reward": Reward()}

    def score(self, rollout_ids, step, texts, rows, heartbeat) -> dict[str, list[float]]:
        return {"reward": reward(texts)}


class Bench:
    """Builds trainers over one model; `steps` steps each."""

    longest = LONGEST
    prompts, group, micro = 8, 8, 8
    """Prompts of a step, rollouts of a prompt, and rollouts of a micro-batch."""
    prompt_tokens = 24
    """Of the shortest prompt."""

    def __init__(self, folder: Path, pool: Pool, steps: int):
        self.folder = folder
        self.pool = pool
        self.steps = steps
        self.path = folder / "model"
        model = self.make_model()
        self.parameters = sum(p.numel() for p in model.parameters())
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        self.dataset, self.given = self.problem(self.prompts, self.longest)

    def make_model(self) -> PreTrainedModel:
        """Saved to `path` with its tokenizer."""
        model = random_model(self.path, positions=4 * LONGEST + 64)
        model.generation_config.eos_token_id = list(range(20, 20 + ENDS))
        model.generation_config.save_pretrained(self.path)
        return model

    def problem(self, prompts: int, longest: int) -> tuple[Dataset, Given]:
        rows = [
            {
                "prompt": "".join(
                    chr(97 + (7 * p + k * (1 + p // 26)) % 26) for k in range(self.prompt_tokens + p % 8)
                ),
                "prompt_id": p,
            }
            for p in range(prompts)
        ]
        for row in rows:
            row["prompt_ids"] = self.tokenizer(row["prompt"])["input_ids"]
        ids = [row["prompt_ids"] for row in rows]
        return Dataset.from_list(rows), Given(ids, len(self.tokenizer), longest, self.group)

    def arguments(self, longest: int, prompts: int | None = None, **changes: Any) -> trl.GRPOConfig:
        prompts = self.prompts if prompts is None else prompts
        accumulated = prompts * self.group // self.micro // int(os.environ.get("WORLD_SIZE", "1"))
        fields = dict(
            output_dir=str(self.folder / "out"), use_cpu=True, bf16=False, report_to="none", logging_steps=1, seed=0,
            save_strategy="no", disable_tqdm=True, max_steps=self.steps, learning_rate=1e-5, loss_type="dapo",
            beta=0.0, num_generations=self.group, per_device_train_batch_size=self.micro,
            gradient_accumulation_steps=accumulated, max_completion_length=longest,
            gradient_checkpointing=False, vllm_importance_sampling_correction=False, remove_unused_columns=False,
            dataloader_pin_memory=False,
        )  # fmt: skip
        return trl.GRPOConfig(**fields | changes)

    def own_arguments(self, longest: int, prompts: int | None = None, **changes: Any) -> trl.GRPOConfig:
        """What a run of ours sets beside `arguments`."""
        kwargs = {"dtype": "float32", "attn_implementation": SHARED_PROMPTS}
        return self.arguments(longest, prompts, model_init_kwargs=kwargs, **changes)

    def stock(self, longest: int, given: bool) -> Clock:
        trainer = trl.GRPOTrainer(str(self.path), [reward], self.arguments(longest), self.dataset,
                                  processing_class=self.tokenizer)  # fmt: skip
        if given:
            trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, self.given, -1
        return self._timed(trainer)

    def ours(self, longest: int, given: bool, **settings: Any) -> Clock:
        def make_engine(trainer):
            return self.given if given else local_engine(self.prompts * self.group, trainer)

        return self._ours(make_engine, self.own_arguments(longest), self.dataset, **settings)

    def of_size(self, prompts: int, longest: int) -> tuple[Clock, Given]:
        dataset, given = self.problem(prompts, longest)
        return self._ours(lambda _: given, self.own_arguments(longest, prompts), dataset), given

    def ahead(self, longest: int, rollout: RolloutSettings) -> Clock:
        """Trainer and server each on a core of their own."""
        cores = os.sched_getaffinity(0)
        threads = torch.get_num_threads()
        os.sched_setaffinity(0, {max(cores)})
        torch.set_num_threads(1)
        try:
            engine = functools.partial(server_engine, rollout, "float32", [20, 21])
            corrected = {
                "vllm_importance_sampling_correction": True,
                "vllm_importance_sampling_mode": "token_truncate",
            }
            arguments = self.own_arguments(longest, **corrected)
            return self._ours(engine, arguments, self.dataset, max_staleness=rollout.max_staleness)
        finally:
            os.sched_setaffinity(0, cores)
            torch.set_num_threads(threads)

    def _ours(
        self, make_engine, arguments: trl.GRPOConfig, dataset: Dataset, max_staleness: int = 0, **settings
    ) -> Clock:
        trainer = GRPOTrainer(
            make_engine=make_engine,
            rewards=OneReward(self.pool),
            settings=TrainRL(**settings),
            max_staleness=max_staleness,
            template=load_template(Model(path=str(self.path)), "r1_zero"),
            model=str(self.path),
            args=arguments,
            train_dataset=dataset,
        )
        clock = self._timed(trainer)
        trainer.close()
        return clock

    def _timed(self, trainer) -> Clock:
        clock = Clock()
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)  # stdout is for the result
        torch.manual_seed(0)
        trainer.train()
        return clock


def compare(bench: Bench, rounds: int, longest: int, given: bool, ours: Callable[[], Clock] | None = None) -> dict:
    """Alternating; the median of the rounds' ratios, and the rates. The first step of each is left out."""
    ratios, rates, idle = [], {"stock": [], "ours": []}, {"stock": [], "ours": []}
    apart = {"loss": 0.0, "grad_norm": 0.0}
    for number in range(rounds):
        clocks = {"stock": bench.stock(longest, given), "ours": ours() if ours else bench.ours(longest, given)}
        for name, clock in clocks.items():
            tokens = (
                statistics.fmean(log["completions/mean_length"] for log in clock.logs[1:])
                * bench.prompts
                * bench.group
            )
            rates[name].append(tokens / statistics.median(clock.seconds[1:]))
            idle[name].append(1 - sum(clock.worked[1:]) / sum(clock.seconds[1:]) / os.cpu_count())
        ratios.append(rates["ours"][-1] / rates["stock"][-1])
        if given:
            for field in apart:
                pairs = zip(clocks["stock"].logs, clocks["ours"].logs, strict=True)
                apart[field] = max(apart[field], *(abs(a[field] - b[field]) / abs(a[field]) for a, b in pairs))
        print(f"round {number + 1}: {rates}", file=sys.stderr)
    found = {
        "ratios": ratios,
        "tokens_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "idle": {name: statistics.median(values) for name, values in idle.items()},
        "seconds_by_phase": phases(clocks["ours"]),
    }
    return found | ({"largest_relative_difference": apart} if given else {})


def phases(clock: Clock) -> dict[str, float]:
    names = {name for log in clock.logs for name in log if name.startswith("seconds/")}
    return {
        name.removeprefix("seconds/"): statistics.median(log.get(name, 0.0) for log in clock.logs[1:])
        for name in sorted(names)
    }


def table(parts: dict[str, dict]) -> list[list[str]]:
    """Of what ran beside TRL: rates, idle processors, and where our steps' seconds go."""
    rows = []
    for name, part in parts.items():
        if "ratios" in part:
            rates = [f"{part['tokens_per_second'][side]:.0f}" for side in ("stock", "ours")]
            idle = [f"{part['idle'][side]:.0%}" for side in ("stock", "ours")]
            seconds = ", ".join(
                f"{phase} {took:.2f}" for phase, took in part["seconds_by_phase"].items() if took > 0.005
            )
            rows.append([name, *rates, f"{statistics.median(part['ratios']):.2f}", *idle, seconds])
    return [["part", "TRL's tokens/s", "ours", "ratio", "TRL's idle", "ours", "our seconds by phase"], *rows]
