"""What `launch/job.py` would start for each recipe on machines that are not here."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from conftest import ROOT

from r1dist.cluster.allocation import Cluster
from r1dist.cluster.job_launcher import JobLauncher
from r1dist.cluster.placement import GIB, Machines
from r1dist.config import ServeRun
from r1dist.config.loader import parse, split_arguments
from r1dist.generation.vllm.devices import GPU
from r1dist.pipeline.graph import KINDS

CARD = GPU(free=79 * GIB, total=80 * GIB)


def _recipes() -> Iterator[tuple[str, list[str]]]:
    """(kind, arguments) of each stage of each pipeline. Models that earlier stages make are replaced by their base."""
    for file in sorted((ROOT / "configs" / "recipes").glob("*/pipeline.yaml")):
        stages = yaml.safe_load(file.read_text())["stages"]
        base = next(stage["model"] for stage in stages if stage["kind"] == "base")
        for stage in stages:
            if stage["kind"] == "base":
                continue
            arguments = ["--config", str(file.with_name(stage["config"]))]
            if stage["kind"] == "sample":
                generators = yaml.safe_load(Path(arguments[1]).read_text())["generators"]
                for number in range(len(generators)):
                    arguments += [f"--generators.{number}.model.path", base]
            else:
                arguments += ["--model.path", base]
            yield stage["kind"], arguments


RECIPES = list(_recipes())


def placed(monkeypatch, kind: str, arguments: list[str], nodes: int, gpus: int) -> JobLauncher:
    """The job on `nodes` nodes with `gpus` GPUs of 80 GiB each."""
    monkeypatch.setattr(Cluster, "machines", lambda self, config: Machines(nodes, gpus, 80.0 if gpus else 0.0))
    return JobLauncher(kind, arguments, Cluster.here({}), [])


def parsed(job: JobLauncher) -> Iterator[tuple[Any, list[str]]]:
    """Each command of the job's plan, as its launcher parses it; for launch/serve.py with the arguments for vLLM."""
    for line in job.plan().splitlines()[len(job.placement.why) + 1 :]:
        words = shlex.split(line)
        if words[-2] == "-c":  # a shell that adds the node's number
            words = shlex.split(words[-1])
        [place] = [i for i, word in enumerate(words) if word.endswith(".py") and "/launch/" in word]
        script, arguments = Path(words[place]).name, words[place + 1 :]
        if script == "serve.py":
            ours, others = split_arguments(ServeRun, arguments)
            yield parse(ServeRun, ours), others
        else:
            run_class = next(kind.run_class for kind in KINDS.values() if kind.script == script)
            yield parse(run_class, arguments, processes=job.placement.world or None), []
