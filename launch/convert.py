"""A Hugging Face folder from a GGUF file: `python launch/convert.py --gguf FILE --output_dir DIR [--sha256 HEX]`."""

import json
import sys

from r1dist.config import ConvertRun
from r1dist.config.loader import parse
from r1dist.errors import run_cli
from r1dist.logs import set_up_logging


def main(argv: list[str]) -> None:
    set_up_logging()
    run = parse(ConvertRun, argv)
    from r1dist.gguf import convert

    print(json.dumps(convert(run), indent=2))


if __name__ == "__main__":
    sys.exit(run_cli(main))
