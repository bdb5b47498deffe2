"""r1dist runs the launcher of a name: `r1dist grpo --config tiny/r1_zero`, `r1dist grpo --help`.

`python -m r1dist` is the same, so that Accelerate can start it in many processes: `accelerate launch -m r1dist grpo`.
`eval "$(r1dist completion)"` completes commands, recipes and fields in bash and zsh.
"""

import ast
import runpy
import sys

from .errors import EXIT_BAD_INPUT, did_you_mean
from .shipped import LAUNCH


def main() -> int:
    """Run the command of `sys.argv`, and give its exit code: 2 for one that is not known."""
    command, *words = sys.argv[1:] or ["--help"]
    commands = sorted(path.stem for path in LAUNCH.glob("*.py"))
    if command in ("-h", "--help"):
        print(f"{__doc__}\n")
        for name in commands:
            print(f"  {name:<14}{_docstring(name).splitlines()[0]}")
        return 0
    if command == "completion":
        from .config.completion import script

        print(script(commands))
        return 0
    if command not in commands:
        known = ", ".join(commands)
        print(f"error: `{command}` is no command{did_you_mean(command, commands)} There are {known}.", file=sys.stderr)
        return EXIT_BAD_INPUT
    sys.argv = [f"r1dist {command}", *words]
    runpy.run_path(str(LAUNCH / f"{command}.py"), run_name="__main__")
    return 0  # not reached: a launcher ends by itself


def _docstring(command: str) -> str:
    return ast.get_docstring(ast.parse((LAUNCH / f"{command}.py").read_text(encoding="utf-8"))) or ""


if __name__ == "__main__":
    sys.exit(main())
