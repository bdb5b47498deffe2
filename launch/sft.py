"""Supervised fine-tuning: `accelerate launch launch/sft.py --config FILE [--field value ...]`."""

import sys

from r1dist.config import SFTRun
from r1dist.config.loader import config_path, parse
from r1dist.errors import asks_for_help, run_cli
from r1dist.shipped import RECIPES


def main(argv: list[str]) -> None:
    default = None
    if config_path(argv) is None and not asks_for_help(argv):
        from r1dist.cluster.recipes import least_gib
        from r1dist.run.process import choose_default

        by_memory = {least_gib(): RECIPES / "qwen2.5-0.5b" / "sft.yaml"}
        default = choose_default(by_memory, RECIPES / "tiny" / "sft.yaml")
    run = parse(SFTRun, argv, default)
    from r1dist.cluster.plan import check_machine, print_plan

    if run.dry_run:
        return print_plan(run)
    check_machine(run)
    from r1dist.sft.train import train

    train(run)


if __name__ == "__main__":
    sys.exit(run_cli(main))
