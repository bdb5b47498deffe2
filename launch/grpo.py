"""R1-Zero and every later RL stage: `accelerate launch launch/grpo.py --config FILE [--field value ...]`."""

import os
import sys

from r1dist.config import GRPORun
from r1dist.config.loader import config_path, parse
from r1dist.errors import asks_for_help, run_cli
from r1dist.logs import set_up_logging
from r1dist.shipped import RECIPES


def main(argv: list[str]) -> None:
    default = None
    if config_path(argv) is None and not asks_for_help(argv):
        from r1dist.cluster.recipes import r1_zero_by_memory
        from r1dist.run.process import choose_default

        default = choose_default(r1_zero_by_memory(RECIPES), RECIPES / "tiny" / "r1_zero.yaml")
    set_up_logging()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    run = parse(GRPORun, argv, default, processes)
    from r1dist.rewards.registry import check_rewards

    check_rewards(run, processes)
    from r1dist.cluster.plan import check_machine, print_plan

    if run.dry_run:
        return print_plan(run)
    check_machine(run)
    from r1dist.rl.train import train

    train(run)


if __name__ == "__main__":
    sys.exit(run_cli(main))
