"""Whether a field may differ between two starts of the same run.

A field annotated `MayChange[...]` may: it concerns speed, memory, waiting or logging. Any other field decides what is
learnt, and a resume with another value is refused.
"""

from typing import Annotated, TypeVar

T = TypeVar("T")
MAY_CHANGE = "may change on resume"
MayChange = Annotated[T, MAY_CHANGE]
