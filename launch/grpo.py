"""R1-Zero and every later RL stage: `accelerate launch launch/grpo.py --config FILE [--field value ...]`."""

import sys
from pathlib import Path

from r1dist.config import GRPORun
from r1dist.errors import run_cli
from r1dist.parse import check_groups, choose_default, config_path, parse

RECIPES = Path(__file__).resolve().parents[1] / "configs" / "recipes"


def main(argv: list[str]) -> None:
    default = None
    if config_path(argv) is None:
        default = choose_default(RECIPES / "qwen2.5-0.5b" / "r1_zero.yaml", RECIPES / "tiny" / "r1_zero.yaml")
    run = parse(GRPORun, argv, default)
    check_groups(run)
    if run.dry_run:
        from r1dist.report.plan import print_plan

        return print_plan(run)
    from r1dist.train.grpo import train

    train(run)


if __name__ == "__main__":
    sys.exit(run_cli(main))
