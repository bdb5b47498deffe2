"""Rejection sampling and cold start: `python launch/sample.py --config FILE [--field value ...]`.

Started again after whatever ended it, it goes on where it was.
"""

import json
import sys
from pathlib import Path

from r1dist.config import SampleRun
from r1dist.errors import run_cli
from r1dist.parse import parse

DEFAULT = Path(__file__).resolve().parents[1] / "configs" / "recipes" / "tiny" / "rejection_sampling.yaml"


def main(argv: list[str]) -> None:
    run = parse(SampleRun, argv, DEFAULT)
    if run.dry_run:
        from r1dist.report.plan import print_plan

        return print_plan(run)
    from r1dist.curate.run import sample

    print(json.dumps(sample(run), indent=2))


if __name__ == "__main__":
    sys.exit(run_cli(main))
