"""The one exception a user's mistake raises, and how a launcher turns it into two lines and exit code 2."""

import difflib
import errno
import sys
from collections.abc import Callable, Iterable

EXIT_BAD_INPUT = 2
EXIT_STOPPED = 3
EXIT_STALLED = 4
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: saved, to be started again


class UserError(Exception):
    """Input that cannot be used. The message names the file, the field and the mend, in one or two lines."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """How a message about an unknown name ends: with the nearest one that is known, or with a full stop."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean `{nearest[0]}`?" if nearest else "."


class RunStopped(Exception):
    """A run that cannot continue, for a reason outside of it. The message gives the reason and what was saved."""

    code = EXIT_STOPPED


class Interrupted(RunStopped):
    """A run that was asked to stop, and has saved a checkpoint."""

    code = EXIT_INTERRUPTED


class VerifiersBroken(RunStopped):
    """Answers cannot be verified at all: the verifier or its sandbox is down. No answer is to blame for it."""


class RewardFailed(RunStopped):
    """A reward function of the user's raised, or returned what is no score. No completion is to blame for it."""


class StageFailed(RunStopped):
    """A stage's command ended with an exit code other than 0, which becomes the pipeline's."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def asks_for_help(argv: list[str]) -> bool:
    return "--help" in argv


def run_cli(main: Callable[[list[str]], None]) -> int:
    """Run `main` on the command line, and give its exit code. `--help` prints the launcher's docstring first.

    A `UserError` (exit code 2), a `RunStopped` (its own code, mostly 3) and a full disk (3) are printed without a
    traceback.
    """
    argv = ["--help" if word == "-h" else word for word in sys.argv[1:]]
    if asks_for_help(argv):
        print(f"{main.__globals__['__doc__']}\n")
    try:
        main(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except RunStopped as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        return stopped.code
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        where = error.filename or "no file is named"
        print(f"stopped: the disk is full ({where}). Make room; the same command continues.", file=sys.stderr)
        return EXIT_STOPPED
    return 0
