"""Rejection sampling and cold start: `python launch/sample.py --config FILE [--field value ...]`.

Started again, whatever ended it, it continues.
"""

import json
import sys

from r1dist.config import SampleRun
from r1dist.config.loader import parse
from r1dist.errors import run_cli
from r1dist.logs import set_up_logging
from r1dist.shipped import RECIPES

DEFAULT = RECIPES / "tiny" / "rejection_sampling.yaml"


def main(argv: list[str]) -> None:
    set_up_logging()
    run = parse(SampleRun, argv, DEFAULT)
    if run.dry_run:
        from r1dist.cluster.plan import print_plan

        return print_plan(run)
    from r1dist.sampling.run import sample

    print(json.dumps(sample(run), indent=2))


if __name__ == "__main__":
    sys.exit(run_cli(main))
