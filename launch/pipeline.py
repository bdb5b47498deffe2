"""A whole recipe as one command: `python launch/pipeline.py --config FILE [--seed N] [--dry_run]`."""

import shlex
import sys
from pathlib import Path

from r1dist.config import PipelineRun
from r1dist.errors import run_cli
from r1dist.parse import config_path, parse
from r1dist.recipe.runner import Runner

LAUNCH = Path(__file__).resolve().parent
DEFAULT = LAUNCH.parent / "configs" / "recipes" / "tiny" / "pipeline.yaml"


def main(argv: list[str]) -> None:
    run = parse(PipelineRun, argv, DEFAULT)
    runner = Runner(run, config_path(argv, DEFAULT).parent, LAUNCH)
    if run.dry_run:
        print("\n".join(shlex.join(command) for command in runner.commands()))
        return
    runner.go()
    print(f"\nWritten to {runner.folder / 'summary.json'}; rollouts and metrics lie in the stages' folders beside it.")


if __name__ == "__main__":
    sys.exit(run_cli(main))
