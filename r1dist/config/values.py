"""Types of fields, beyond pydantic's own."""

import os
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from pydantic_core import ErrorDetails

TAGS = ("int", "float", "bool", "str", "dict", "list")


def expanded(text: Any) -> Any:
    """A text with a leading `~`, `$NAME` and `${NAME}` replaced as a shell would; what is no text stays as it is.

    Raises `ValueError` where the environment has no such variable or user.
    """
    if not isinstance(text, str):
        return text
    full = os.path.expanduser(os.path.expandvars(text))
    if unset := re.search(r"\$(?:[A-Za-z_]\w*|\{\w+\})", full):
        raise ValueError(f"the environment has no variable {unset[0]}")
    if full.startswith("~"):
        raise ValueError(f"there is no home folder {full.split('/')[0]}")
    return full


def refusal(error: ErrorDetails) -> tuple[list[str], str]:
    """Where a value stands that pydantic refuses, and why."""
    # Tags of a union ("float", "function-after[...]") are no part of the field's name. A colon is in a reward's.
    parts = [str(part) for part in error["loc"]]
    location = [part for part in parts if part.isidentifier() or part.isdigit() or (":" in part and "[" not in part)]
    got, what = error["input"], error["msg"].removeprefix("Value error, ")
    shown = "nothing (null)" if got is None else f"{got!r} ({type(got).__name__})"
    return [part for part in location if part not in TAGS], f"{what}; got {shown}."


def _path(text: str) -> str:
    if not text.strip():
        raise ValueError("it is empty")
    return expanded(text)


def _paths(text: str) -> str:
    return ",".join(_path(part.strip()) for part in text.split(","))


Expanded = Annotated[str, AfterValidator(expanded)]
"""A word for a command line that no shell reads."""
PathText = Annotated[str, AfterValidator(_path)]
"""A path, or what may be one (a model, a dataset): `~` and variables of the environment are replaced."""
PathTexts = Annotated[str, AfterValidator(_paths)]
"""Several, with commas between them."""
Identifier = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]
"""The name of a variable."""
TemplateName = Literal["chat", "r1_zero", "r1_zero_chat"]
"""How a question becomes a prompt; described at `data.template`."""
Bounds = Annotated[list[float], Field(min_length=2, max_length=2)]
"""[least, most]."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""What Python, NumPy and torch all take."""
