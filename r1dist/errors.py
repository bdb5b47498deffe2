"""The one exception a user's mistake raises, and how a launcher turns it into two lines and exit code 2."""

import sys
from collections.abc import Callable

EXIT_BAD_INPUT = 2


class UserError(Exception):
    """Input that cannot be used. The message names the file, the field and the mend, in one or two lines."""


def run_cli(main: Callable[[list[str]], None]) -> int:
    """Run `main` on the command line; a `UserError` is printed without a traceback and gives exit code 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0
