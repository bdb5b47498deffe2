"""A whole recipe as one command: `python launch/pipeline.py --config FILE [--until STAGE] [--dry_run]`.

Started again after whatever ended it, it goes on where it was.
"""

import sys
from pathlib import Path

from r1dist.errors import run_cli
from r1dist.parse import config_path, parse
from r1dist.recipe_fields import PipelineRun

LAUNCH = Path(__file__).resolve().parent
DEFAULT = LAUNCH.parent / "configs" / "recipes" / "tiny" / "pipeline.yaml"


def main(argv: list[str]) -> None:
    run = parse(PipelineRun, argv, DEFAULT)
    from r1dist.recipe.graph import Graph
    from r1dist.recipe.runner import Runner

    runner = Runner(Graph(run, config_path(argv, DEFAULT).parent, LAUNCH))
    if run.dry_run:
        print(runner.plan())
        return
    runner.go()
    print(f"\nWritten to {runner.folder / 'summary.json'}; open {runner.folder / 'report.html'} in a browser.")


if __name__ == "__main__":
    sys.exit(run_cli(main))
