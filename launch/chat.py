"""Talk to any stage's model: `python launch/chat.py --model.path DIR [--prompt TEXT] [--fold]`.

With `--prompt` it answers once; fed by a pipe, it answers each line.
"""

import sys

from r1dist.config import ChatRun
from r1dist.config.loader import parse
from r1dist.errors import run_cli
from r1dist.evaluation.chat import converse


def main(argv: list[str]) -> None:
    run = parse(ChatRun, ["--model.path", "tiny", *argv])
    converse(run)


if __name__ == "__main__":
    sys.exit(run_cli(main))
