"""`launch/pipeline.py --slurm`: the `sbatch` commands of a recipe, as one job or as a chain of them."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from ..config.pipeline import PipelineRun
from ..errors import RunStopped, UserError
from ..files import write_json
from .graph import Graph, missing_packages

JOBS = "slurm.json"


def submissions(graph: Graph, arguments: list[str], script: Path) -> list[tuple[str, list[str]]]:
    """(name, command) for each job, in order; each but the first waits for the one before to succeed.

    A chain's job runs up to its stage: what is done already is skipped, and what an earlier job left undone is done.

    Args:
        arguments: Those of `launch/pipeline.py`.
    """
    run = graph.run
    stages = list(dict.fromkeys(step.stage.name for step in graph.chosen()))
    if run.slurm == "job":
        return [("pipeline", _sbatch(run, {}, "pipeline", [str(script), *arguments]))]
    ordered = sorted(stages, key=lambda name: max(i for i, s in enumerate(graph.chosen()) if s.stage.name == name))
    return [
        (name, _sbatch(run, graph.stages[name].sbatch, name, [str(script), *arguments, "--until", name]))
        for name in ordered
    ]


def submit(graph: Graph, arguments: list[str], script: Path) -> dict[str, str]:
    """Submit; gives each job's id, which are also in `<output_dir>/slurm.json`.

    Raises `RunStopped`, and `UserError` where a package is missing.
    """
    if missing := missing_packages(graph.chosen()):
        raise UserError(missing)
    jobs: dict[str, str] = {}
    (graph.folder / "logs").mkdir(parents=True, exist_ok=True)  # sbatch makes no folders
    for name, command in submissions(graph, arguments, script):
        if jobs:
            before = list(jobs.values())[-1]
            command = [command[0], f"--dependency=afterok:{before}", "--kill-on-invalid-dep=yes", *command[1:]]
        print(shlex.join(command), flush=True)
        environment = {"R1DIST_PYTHON": sys.executable} | os.environ
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RunStopped(f"sbatch refused `{name}`; submitted before it: {jobs or 'none'}.\n{done.stderr.strip()}")
        jobs[name] = done.stdout.strip().partition(";")[0]  # `id;cluster` where there are several clusters
        write_json(graph.folder / JOBS, jobs)
    return jobs


def _sbatch(run: PipelineRun, own: dict, name: str, words: list[str]) -> list[str]:
    log = Path(run.output_dir) / "logs" / f"slurm-{name}-%j.log"
    options = {"job-name": f"r1dist-{name}", "output": str(log), **run.sbatch, **own}
    return ["sbatch", "--parsable", *(f"--{option}={value}" for option, value in options.items()), *words]
