"""Sampling and evaluation against the engine that they stand on: `python bench/sample.py [--prompts 256]`.

One vLLM server with the embedded base model, the same prompts, seeds and bounds, alternating in one run: the
engine's own tokens per second, those of `launch/sample.py`'s loop, which also verifies every sample and writes it to
the journal, and those of `launch/evaluate.py`'s, which computes all scores, too. Progress goes to stderr; the last
line on stdout is JSON.
"""

import argparse
import dataclasses
import functools
import statistics
import sys
import tempfile
import time
from pathlib import Path

from result import aim, show

from r1dist.config import Data, Generator, Model, Prompting, Rollout, SampleRun, Source
from r1dist.config import Sampling as SamplingSettings
from r1dist.evaluation.scores import measures, scores_of
from r1dist.files import read_lines
from r1dist.generation.engine import Sampling, generate
from r1dist.generation.inference import fixed_engine
from r1dist.generation.vllm.limits import Demand
from r1dist.rewards import VERIFIERS
from r1dist.rewards.pool import Pool
from r1dist.run.process import set_up_process
from r1dist.sampling.draw import draw
from r1dist.sampling.run import sampling_job
from r1dist.sampling.shards import shards

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
    job = sampling_job(run, 0)
    requests = [request for row in job.prompts for request in job.requests(row)]
    demand = Demand(generator.model, job.template.tokenizer, job.longest, 256, trains=False)
    evaluated = dataclasses.replace(job, measure=functools.partial(measures, target="en"))
    rates: dict[str, list[float]] = {"engine": [], "sampling": [], "evaluation": []}
    with (
        tempfile.TemporaryDirectory() as name,
        fixed_engine(run.rollout, demand, job.template, Path(name)) as engine,
        Pool(VERIFIERS, run.verify) as pool,
    ):
        generate(engine, requests, Sampling(MAX_TOKENS))  # the first one warms up
        for number in range(options.rounds):
            began = time.perf_counter()
            rollouts = generate(engine, requests, Sampling(MAX_TOKENS))
            rates["engine"].append(sum(len(r.token_ids) for r in rollouts) / (time.perf_counter() - began))
            for kind, asked in (("sampling", job), ("evaluation", evaluated)):
                began = time.perf_counter()
                parts = shards(Path(name), f"{kind}{number}", len(job.prompts), None)
                (journal,) = draw(asked, parts, run.rollout, lambda engine=engine: engine, pool)
                lines = list(read_lines(journal))
                if kind == "evaluation":
                    scores_of(lines, pool)
                seconds = time.perf_counter() - began
                rates[kind].append(sum(sample["tokens"] for line in lines for sample in line["samples"]) / seconds)
            print({key: round(values[-1]) for key, values in rates.items()}, file=sys.stderr)
    speeds = {key: statistics.median(values) for key, values in rates.items()}
    aims = {
        figure: aim([ours / own for ours, own in zip(rates[kind], rates["engine"], strict=True)], 0.9, "higher")
        for figure, kind in (("throughput_ratio", "sampling"), ("evaluation_ratio", "evaluation"))
    }
    show("sample", aims, samples=len(requests), tokens_per_second=speeds)


if __name__ == "__main__":
    main()
