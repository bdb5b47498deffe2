"""Scores of a model: `python launch/evaluate.py --model.path DIR --benchmarks gsm8k,math500 [--output FILE]`.

Or with `--config FILE`. Without either, those of a model on the embedded base's problems.
"""

import json
import sys

from r1dist.config import EvaluateRun
from r1dist.config.loader import parse
from r1dist.errors import run_cli
from r1dist.logs import set_up_logging
from r1dist.shipped import RECIPES

TINY = RECIPES / "tiny" / "evaluate.yaml"


def main(argv: list[str]) -> None:
    set_up_logging()
    named = any(word.startswith("--benchmarks") for word in argv)
    run = parse(EvaluateRun, argv, None if named else TINY)
    if run.dry_run:
        from r1dist.cluster.plan import print_plan

        return print_plan(run)
    from r1dist.evaluation.evaluate import evaluate

    print(json.dumps(evaluate(run), indent=2))


if __name__ == "__main__":
    sys.exit(run_cli(main))
