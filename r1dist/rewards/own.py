"""Reward functions of the user's: found by their key, told apart by their parameters, and what they return checked.

`completion, row`: of one completion. `completions, rows`: of all completions of a prompt. `completions` without
`rows`, as TRL has them: of completions of a prompt, with `prompts` and the rows' columns as lists.
"""

import asyncio
import importlib
import importlib.util
import inspect
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from inspect import Parameter
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import RewardFailed, UserError, did_you_mean

GIVEN = {
    "completion": ("completion", "row"),
    "group": ("completions", "rows"),
    "trl": ("prompts", "completions", "completion_ids"),
}
"""Form of a function -> what it is given."""
FORMS = "`completion, row`, or `completions, rows`, or TRL's `prompts, completions`"


def is_own(key: str) -> bool:
    """Whether a reward's name in the YAML is `module:function` or `file.py:function`."""
    return ":" in key


class OwnReward:
    """The function that `key` names. Pickled as `key`: a worker imports it itself, before its limits count.

    Raises `UserError` for what is not there, cannot be imported, or takes other parameters than a reward does.
    """

    def __init__(self, key: str):
        self.key = key
        self.name = key.rpartition(":")[2]
        self.function, self.file = _load(key)
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

    def __reduce__(self):
        return OwnReward, (self.key,)

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

    def failed(self, rows: list[dict], error: BaseException) -> RewardFailed:
        """What to raise for an error of the function's."""
        return RewardFailed(f"{self._about(rows)}: {_said(error)}.")

    def _about(self, rows: list[dict]) -> str:
        return f"rewards.{self.key}, row of prompt_id {rows[0].get('prompt_id')}"


def _load(key: str) -> tuple[Callable, Path]:
    """The function, and the file that its source is in."""
    place, _, name = key.rpartition(":")
    try:
        module = _module(key, place)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever a file does where it is imported
        raise UserError(f"rewards.{key}: {place} cannot be imported: {_said(error)}.") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [known for known, value in vars(module).items() if callable(value)]
        raise UserError(f"rewards.{key}: {place} has no function `{name}`{did_you_mean(name, known)}")
    source = inspect.unwrap(function)
    return function, Path(inspect.getsourcefile(source if inspect.isfunction(source) else module) or "")


def _module(key: str, place: str) -> ModuleType:
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)  # last: a file of the user's hides no package
    if not place.endswith(".py"):
        if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", place):
            raise UserError(f"rewards: `{key}` is neither `module:function` nor `path/to/file.py:function`.")
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                raise  # it is there, and imports what is not
            raise UserError(
                f"rewards.{key}: there is no module `{error.name}` in the working directory or on PYTHONPATH."
            ) from error
    path = Path(place).expanduser()
    if not path.is_file():
        raise UserError(f"rewards.{key}: there is no file {place}; paths are relative to the working directory.")
    name = "own_reward_" + re.sub(r"\W", "_", str(path.resolve()))
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _said(error: BaseException) -> str:
    """An error in one line, with the place where it was raised."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"
