"""`map` and `filter` of `datasets`, whose cached results are of this code.

`datasets` names a result by the function that made it, but takes what that function imports for unchanged as long as
its name is: an edit would not reach rows that are cached already.
"""

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..files import versions

PACKAGE = Path(__file__).resolve().parents[1]


def mapped(rows: Dataset, function: Callable[..., dict], **options: Any) -> Dataset:
    """`rows.map(function, **options)`."""
    return rows.map(functools.partial(_call, function, _code()), desc=None, **options)


def kept(rows: Dataset, condition: Callable[[dict], bool]) -> Dataset:
    """`rows.filter(condition)`."""
    return rows.filter(functools.partial(_call, condition, _code()), desc=None)


def _call(function: Callable, code: str, *row: Any) -> Any:
    return function(*row)


@functools.cache
def _code() -> str:
    """A digest of this package's source and of the libraries' versions."""
    digest = hashlib.sha256(json.dumps(versions()).encode())
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
