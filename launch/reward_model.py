"""A reward model: `accelerate launch launch/reward_model.py --config FILE [--field value ...]`."""

import sys
from pathlib import Path

from r1dist.config import RewardModelRun
from r1dist.errors import run_cli
from r1dist.parse import parse

DEFAULT = Path(__file__).resolve().parents[1] / "configs" / "recipes" / "tiny" / "reward_helpfulness.yaml"


def main(argv: list[str]) -> None:
    run = parse(RewardModelRun, argv, DEFAULT)
    if run.dry_run:
        from r1dist.report.plan import print_plan

        return print_plan(run)
    from r1dist.train.reward_model import train

    train(run)


if __name__ == "__main__":
    sys.exit(run_cli(main))
