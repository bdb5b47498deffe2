"""A GRPO step of a real model beside stock TRL's: `python bench/real.py [--rounds 3] [--steps 3]`.

Model, task, prompts and lengths of configs/recipes/smollm2-135m/r1_zero.yaml; the two take turns in one run, each with
its own in-process generation. `real_step_ratio`: generated tokens per second of whole steps, ours over TRL's.
"""

import argparse
import tempfile
from pathlib import Path

from beside_trl import Bench, Given, compare, table
from datasets import Dataset
from result import aim, show
from transformers import AutoModelForCausalLM, PreTrainedModel

from r1dist.config import GRPORun, Verify
from r1dist.config.loader import parse
from r1dist.data.prompts import prompt_dataset
from r1dist.data.templates import load_template
from r1dist.rewards import VERIFIERS
from r1dist.rewards.pool import Pool
from r1dist.run.process import set_up_process

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs/recipes/smollm2-135m/r1_zero.yaml"
LONGEST, CONTEXT = 48, 8192


class RealBench(Bench):
    """`Bench` over the recipe's model; what it asks is in the prompts, chat template and examples included."""

    longest = LONGEST

    def make_model(self) -> PreTrainedModel:
        self.run = parse(GRPORun, ["--config", str(RECIPE)])
        self.path = ROOT / self.run.model.path
        return AutoModelForCausalLM.from_pretrained(self.path)

    def problem(self, prompts: int, longest: int) -> tuple[Dataset, Given]:
        template = load_template(self.run.model, "chat")
        rows = prompt_dataset(self.run.data, template, CONTEXT, longest, self.run.prompting).select(range(prompts))
        texts = [self.tokenizer.decode(ids) for ids in rows["prompt_ids"]]
        columns = [{"prompt": text, "prompt_ids": row["prompt_ids"], "prompt_id": number}
                   for number, (text, row) in enumerate(zip(texts, rows, strict=True))]  # fmt: skip
        return Dataset.from_list(columns), Given(rows["prompt_ids"], len(self.tokenizer), longest, self.group)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    set_up_process()
    with tempfile.TemporaryDirectory() as folder, Pool(VERIFIERS, Verify(workers=1)) as pool:
        bench = RealBench(Path(folder), pool, options.steps)
        part = compare(bench, options.rounds, LONGEST, given=False)
    prompt = sum(map(len, bench.dataset["prompt_ids"])) / bench.prompts
    aims = {"real_step_ratio": aim(part["ratios"], 2, "higher")}
    show("real", aims, parameters=bench.parameters, mean_prompt=prompt, rollouts=bench.prompts * bench.group,
         table=table({"real": part}), **part)  # fmt: skip


if __name__ == "__main__":
    main()
