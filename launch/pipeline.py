"""A whole recipe as one command: `python launch/pipeline.py --config FILE [--until STAGE] [--dry_run]`.

Started again, whatever ended it, it continues. `--slurm job` or `--slurm chain` submits it.
"""

import shlex
import sys

from r1dist.config.loader import config_path, parse
from r1dist.config.pipeline import PipelineRun
from r1dist.errors import run_cli
from r1dist.shipped import LAUNCH, RECIPES

DEFAULT = RECIPES / "tiny" / "pipeline.yaml"


def main(argv: list[str]) -> None:
    run = parse(PipelineRun, argv, DEFAULT)
    from r1dist.pipeline.graph import Graph
    from r1dist.pipeline.runner import Runner

    graph = Graph(run, config_path(argv, DEFAULT).parent)
    if run.slurm is not None:
        return to_slurm(graph, argv)
    runner = Runner(graph)
    if run.dry_run:
        print(runner.plan())
        return
    runner.run()
    print(f"\nWritten to {runner.folder / 'summary.json'}; open {runner.folder / 'report.html'} in a browser.")


def to_slurm(graph, argv: list[str]) -> None:
    """Submit the recipe, or with `--dry_run` print how."""
    from r1dist.pipeline.submit import submissions, submit

    # The job must not submit itself again; its nodes may have another home folder.
    rest = [*argv, "--output_dir", graph.run.output_dir, "--slurm", "null", "--dry_run", "false"]
    script = LAUNCH / "slurm" / "pipeline.slurm"
    if graph.run.dry_run:
        for _, command in submissions(graph, rest, script):
            print(shlex.join(command))
        return
    for name, job in submit(graph, rest, script).items():
        print(f"{name}: job {job}")


if __name__ == "__main__":
    sys.exit(run_cli(main))
