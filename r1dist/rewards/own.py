"""Reward functions of the user's, found by their key."""

import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from ..errors import UserError, did_you_mean
from .function import RewardFunction, said


def is_own(key: str) -> bool:
    """Whether a reward's name in the YAML is `module:function` or `file.py:function`."""
    return ":" in key


class OwnReward(RewardFunction):
    """The function that `key` names. Pickled as `key`: a worker imports it itself, before its limits count.

    Raises `UserError` for what is not there, cannot be imported, or takes other parameters than a reward does.
    """

    def __init__(self, key: str):
        function, self.file = _load(key)
        super().__init__(key, key.rpartition(":")[2], function)

    def __reduce__(self):
        return OwnReward, (self.key,)


def _load(key: str) -> tuple[Callable, Path]:
    """The function, and the file that its source is in."""
    place, _, name = key.rpartition(":")
    try:
        module = _module(key, place)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever a file does where it is imported
        raise UserError(f"rewards.{key}: {place} cannot be imported: {said(error)}.") from error
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
