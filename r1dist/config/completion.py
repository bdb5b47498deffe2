"""Completion of `r1dist`'s command line in a shell."""

from collections.abc import Sequence

from ..shipped import recipes
from .reference import LAUNCHERS, own_fields, trl_fields

SCRIPT = """\
if [ -n "$ZSH_VERSION" ]; then autoload -U +X compinit bashcompinit && compinit && bashcompinit; fi
_r1dist() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" command="${{COMP_WORDS[1]}}" at=1 words=""
  if [ "$command" = job ]; then command="${{COMP_WORDS[2]}}"; at=2; fi
  if [ "$COMP_CWORD" -le "$at" ]; then words="{commands}"
  elif [ "${{COMP_WORDS[COMP_CWORD-1]}}" = --config ]; then words="{recipes}"
  else
    case "$command" in
{fields}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _r1dist r1dist"""


def script(commands: Sequence[str]) -> str:
    """For bash and zsh: completes `commands`, the recipes after `--config`, and each launcher's fields."""
    fields = []
    for launcher, run_class in LAUNCHERS.items():
        names = [field.name.replace(".N.", ".0.") for field in (*own_fields(run_class), *trl_fields(run_class))]
        fields.append(f'      {launcher}) words="--config --help {" ".join(f"--{name}" for name in names)}";;')
    return SCRIPT.format(commands=" ".join(commands), recipes=" ".join(recipes()), fields="\n".join(fields))
