"""A reward model: `accelerate launch launch/reward_model.py --config FILE [--field value ...]`."""

import sys

from r1dist.config import RewardModelRun
from r1dist.config.loader import parse
from r1dist.errors import run_cli
from r1dist.shipped import RECIPES

DEFAULT = RECIPES / "tiny" / "reward_helpfulness.yaml"


def main(argv: list[str]) -> None:
    run = parse(RewardModelRun, argv, DEFAULT)
    from r1dist.cluster.plan import check_machine, print_plan

    if run.dry_run:
        return print_plan(run)
    check_machine(run)
    from r1dist.reward_models.train import train

    train(run)


if __name__ == "__main__":
    sys.exit(run_cli(main))
