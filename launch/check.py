"""What this machine has for a run, what a run would use, and what is missing: `python launch/check.py`.

Exit code 0 if a run can start here, 2 if not.
"""

import sys

from r1dist.errors import UserError, asks_for_help, run_cli
from r1dist.shipped import RECIPES


def main(argv: list[str]) -> None:
    if asks_for_help(argv):
        return
    if argv:
        raise UserError(f"check.py takes no arguments; got `{argv[0]}`.")
    from r1dist.cluster.check import check

    check(RECIPES)


if __name__ == "__main__":
    sys.exit(run_cli(main))
