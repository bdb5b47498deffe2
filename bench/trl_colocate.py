"""Stock TRL's steps with vLLM in its own process: `python bench/trl_colocate.py MODEL STEPS TOKENS ATTENTION`.

Prints each step's seconds, as JSON, in the last line. A part of bench/gpu_check.py: it imports nothing of r1dist,
beside which TRL finds no vLLM.
"""

import json
import sys
import tempfile
import time

import trl
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback

PROMPTS, GROUP, MICRO = 8, 8, 8


class Seconds(TrainerCallback):
    def __init__(self):
        self.found: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.found.append(time.perf_counter() - self.began)


def reward(completion_ids, **_) -> list[float]:
    return [(sum(ids) % 7) / 6 for ids in completion_ids]


def main() -> None:
    model, steps, tokens, attention = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    rows = [{"prompt": f"What is {n}+{n % 7}?"} for n in range(PROMPTS * steps)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.GRPOConfig(
            output_dir=folder, bf16=True, report_to="none", logging_steps=1, save_strategy="no", disable_tqdm=True,
            max_steps=steps, beta=0.0, num_generations=GROUP, per_device_train_batch_size=MICRO,
            gradient_accumulation_steps=PROMPTS * GROUP // MICRO, max_completion_length=tokens, use_vllm=True,
            vllm_mode="colocate", vllm_enable_sleep_mode=True, vllm_importance_sampling_mode="token_truncate",
            model_init_kwargs={"dtype": "float32", "attn_implementation": attention}, gradient_checkpointing=True,
        )  # fmt: skip
        trainer = trl.GRPOTrainer(model, [reward], arguments, Dataset.from_list(rows))
        seconds = Seconds()
        trainer.add_callback(seconds)
        trainer.remove_callback(PrinterCallback)  # stdout is for the result
        trainer.train()
    print(json.dumps(seconds.found))


if __name__ == "__main__":
    main()
