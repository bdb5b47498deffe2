"""Rejection sampling against the engine that it stands on: `python bench/sample.py [--rounds 3] [--prompts 256]`.

One vLLM server with the embedded base model, the same prompts, seeds and bounds, alternating in one run: the
engine's own tokens per second, and those of `launch/sample.py`'s loop, which also verifies every sample and
writes it to the journal. Progress goes to stderr; the last line on stdout is JSON.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from result import aim, show

from r1dist.config import Data, Generator, Model, Prompting, Rollout, SampleRun, Source
from r1dist.config import Sampling as SamplingSettings
from r1dist.files import read_lines
from r1dist.generation.engine import Sampling, generate
from r1dist.generation.inference import fixed_engine
from r1dist.rewards import VERIFIERS
from r1dist.rewards.pool import Pool
from r1dist.run.process import set_up_process
from r1dist.sampling.draw import fill, generator_prompts, generator_template, requests_of

SAMPLES, MAX_TOKENS = 8, 112


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=256)
    options = parser.parse_args()
    set_up_process()
    generator = Generator(
        name="bench",
        model=Model(path="tiny"),
        data=Data(sources=[Source(path="tiny", limit=options.prompts)]),
        prompting=Prompting(prefill="<think>"),
        sampling=SamplingSettings(samples=SAMPLES, max_tokens=MAX_TOKENS),
    )
    run = SampleRun(output_dir="unused", generators=[generator], rollout=Rollout(engine="vllm"))
    template = generator_template(generator)
    prompts = generator_prompts(run, generator, template)
    requests = requests_of(run, 0, prompts)
    rates: dict[str, list[float]] = {"engine": [], "sampling": []}
    with (
        tempfile.TemporaryDirectory() as name,
        fixed_engine(run.rollout, generator.model, template, 256, Path(name)) as engine,
        Pool(VERIFIERS, run.verify) as pool,
    ):
        generate(engine, requests, Sampling(MAX_TOKENS))  # the first one warms up
        for number in range(options.rounds):
            began = time.perf_counter()
            rollouts = generate(engine, requests, Sampling(MAX_TOKENS))
            rates["engine"].append(sum(len(r.token_ids) for r in rollouts) / (time.perf_counter() - began))
            journal = Path(name) / f"{number}.jsonl"
            began = time.perf_counter()
            fill(run, 0, prompts, engine, template, journal, set(), pool)
            seconds = time.perf_counter() - began
            rates["sampling"].append(
                sum(s["tokens"] for line in read_lines(journal) for s in line["samples"]) / seconds
            )
            print({key: round(values[-1]) for key, values in rates.items()}, file=sys.stderr)
    ratios = [ours / engines for ours, engines in zip(rates["sampling"], rates["engine"], strict=True)]
    speeds = {key: statistics.median(values) for key, values in rates.items()}
    aims = {"throughput_ratio": aim(ratios, 0.9, "higher")}
    show("sample", aims, samples=len(requests), tokens_per_second=speeds)


if __name__ == "__main__":
    main()
