"""A reward's function: told apart by its parameters, called with what they name, and what it returns checked.

`completion, row`: of one completion. `completions, rows`: of all completions of a prompt. `completions` without
`rows`, as TRL has them: of completions of a prompt, with `prompts` and the rows' columns as lists.
"""

import asyncio
import inspect
import math
import traceback
from collections.abc import Callable, Iterable
from inspect import Parameter
from numbers import Real
from pathlib import Path
from typing import Any

from ..errors import RewardFailed, UserError

GIVEN = {
    "completion": ("completion", "row"),
    "group": ("completions", "rows"),
    "trl": ("prompts", "completions", "completion_ids"),
}
"""Form of a function -> what it is given."""
FORMS = "`completion, row`, or `completions, rows`, or TRL's `prompts, completions`"


class RewardFunction:
    """`function`, which the YAML names `key` and the log `name`.

    Raises `UserError` if it takes other parameters than a reward does.
    """

    retries = 2
    """Times that a call in the trainer's process is made again, where the YAML does not say."""
    otherwise = "give the parameter a default"
    """What to do about a column that rows do not have."""

    def __init__(self, key: str, name: str, function: Callable):
        self.key = key
        self.name = name
        self.function = function
        self.is_async = inspect.iscoroutinefunction(self.function)
        try:
            found = inspect.signature(self.function, eval_str=True).parameters
        except (TypeError, ValueError, NameError) as error:
            raise UserError(f"rewards.{key}: its parameters cannot be read: {error}.") from error
        several = "group" if "rows" in found else "trl"
        form = "completion" if "completion" in found else several if "completions" in found else None
        if form is None or any(each.kind is Parameter.POSITIONAL_ONLY for each in found.values()):
            raise UserError(f"rewards.{key}: it takes ({', '.join(found)}).\nA reward takes {FORMS}, by name.")
        self.form = form
        self.takes_any = any(each.kind is Parameter.VAR_KEYWORD for each in found.values())
        named = [
            each for each in found.values() if each.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
        ]
        self.takes = {each.name for each in named}
        others = [each for each in named if each.name not in GIVEN[self.form]]
        self.columns = {each.name for each in others if self.form == "trl" and each.default is Parameter.empty}
        """The rows' columns that it cannot do without (TRL's form)."""
        self.fields = [each for each in others if each.name not in self.columns]
        """The parameters that the YAML gives."""

    def __call__(self, completions: list[str], rows: list[dict], /, **parameters: Any) -> list[float | None]:
        """The scores of one call. Raises `RewardFailed`, which names the reward and the row."""
        arguments = self.arguments(completions, rows, parameters)
        try:
            made = self.function(**arguments)
            returned = asyncio.run(made) if self.is_async else made
        except (MemoryError, RecursionError):  # for the pool
            raise
        except Exception as error:  # whatever it is, it is named
            raise self.failed(rows, error) from error
        return self.scores(returned, rows)

    def arguments(self, completions: list[str], rows: list[dict], parameters: dict[str, Any]) -> dict[str, Any]:
        """What the function is called with. Raises `RewardFailed` if the rows lack a column that it takes."""
        if self.form == "completion":
            given = {"completion": completions[0], "row": rows[0]}
        elif self.form == "group":
            given = {"completions": completions, "rows": rows}
        else:
            if missing := self.columns - rows[0].keys():
                raise RewardFailed(f"{self._about(rows)}: there is no column `{missing.pop()}`.")
            given = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
            prompts = [row["prompt"] for row in rows]
            plain = isinstance(prompts[0], str)
            replies = completions if plain else [[{"role": "assistant", "content": text}] for text in completions]
            given |= {"prompts": prompts, "completions": replies}
        return {name: value for name, value in given.items() if self.takes_any or name in self.takes} | parameters

    def scores(self, returned: Any, rows: list[dict]) -> list[float | None]:
        """What the function returned, as a number or None for each of `rows`. Raises `RewardFailed` if it is not."""
        if self.form == "completion":
            returned = [returned]
        elif isinstance(returned, str) or not isinstance(returned, Iterable):
            raise RewardFailed(f"{self._about(rows)}: it returned {returned!r:.80}, not a list of scores.")
        scores = list(returned)
        if len(scores) != len(rows):
            raise RewardFailed(f"{self._about(rows)}: it returned {len(scores)} scores for {len(rows)} completions.")
        for score in scores:
            if score is not None and not (isinstance(score, Real) and math.isfinite(score)):
                what = f"{score!r:.80} ({type(score).__name__})"
                raise RewardFailed(f"{self._about(rows)}: it returned {what}, neither a finite number nor None.")
        return [None if score is None else float(score) for score in scores]

    def failed(self, rows: list[dict], error: BaseException) -> Exception:
        """What to raise for an error of the function's."""
        return RewardFailed(f"{self._about(rows)}: {said(error)}.")

    def _about(self, rows: list[dict]) -> str:
        return f"rewards.{self.key}, row of prompt_id {rows[0].get('prompt_id')}"


def said(error: BaseException) -> str:
    """An error in one line, with the place where it was raised."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"
