"""What a checkpoint costs: `python bench/checkpoint.py [--rounds 8]`.

A 50M model of Qwen2.5's class with AdamW's state, float32. TRL's own trainer and ours save it in turn, in one run;
of ours, how long training waits and when the checkpoint is whole. Then how long it takes to check every byte of it.
Prints JSON as its last line.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
import trl
from datasets import Dataset
from result import aim, show
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from r1dist.run.checkpoints import checkpoints, damage
from r1dist.run.process import set_up_process
from r1dist.sft.train import SFTTrainer
from r1dist.tiny import BASE_DIR


def main() -> None:
    set_up_process()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        theirs, ours = (prepared(kind, Path(folder) / kind.__module__) for kind in (trl.SFTTrainer, SFTTrainer))
        step = statistics.median(line["seconds"] for line in ours.steps)
        seconds = {"trl": [], "waited": [], "whole": []}
        for number in range(1, rounds + 1):
            seconds["trl"].append(saved(theirs, number))
            began = time.monotonic()
            seconds["waited"].append(saved(ours, number))
            ours.finish_saving()
            seconds["whole"].append(time.monotonic() - began)
            # What is left for the disk to write must not fall into the other's time.
            os.sync()
        newest = max(checkpoints(Path(ours.args.output_dir)), key=lambda path: path.stat().st_mtime)
        size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
        began = time.monotonic()
        assert damage(newest) is None
        checked = time.monotonic() - began
    parameters = sum(p.numel() for p in ours.model.parameters())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = [ours / theirs for ours, theirs in zip(seconds["waited"], seconds["trl"], strict=True)]
    show(
        "checkpoint",
        {"save_ratio": aim(ratios, 1.1, "lower")},
        parameters=parameters,
        bytes_per_parameter=size / parameters,
        rounds=rounds,
        seconds=medians,
        seconds_to_check=checked,
        step_seconds=step,
        share_of_a_step=medians["waited"] / step,
    )


def prepared(kind: type, folder: Path) -> trl.SFTTrainer:
    """A trainer after two steps, whose optimizer has a state; `steps` holds their seconds."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    config = Qwen2Config(
        vocab_size=32000, hidden_size=512, intermediate_size=1536, num_hidden_layers=10, num_attention_heads=8,
        num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    rows = Dataset.from_dict({"prompt": ["1+1"] * 16, "completion": ["2 " * 100] * 16})
    arguments = trl.SFTConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, max_steps=2, per_device_train_batch_size=4,
        save_strategy="no", save_total_limit=2, report_to="none", gradient_checkpointing=False,
    )  # fmt: skip
    more = {"stall_timeout": 3600} if kind is SFTTrainer else {}
    trainer = kind(
        model=Qwen2ForCausalLM(config), args=arguments, train_dataset=rows, processing_class=tokenizer, **more
    )
    took = []
    plain = trainer.training_step

    def timed(*args, **kwargs):
        began = time.monotonic()
        loss = plain(*args, **kwargs)
        took.append({"seconds": time.monotonic() - began})
        return loss

    trainer.training_step = timed
    trainer.train()
    trainer.steps = took
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return trainer


def saved(trainer: trl.SFTTrainer, step: int) -> float:
    trainer.state.global_step = step
    began = time.monotonic()
    trainer._save_checkpoint(trainer.model, trial=None)
    return time.monotonic() - began


if __name__ == "__main__":
    main()
