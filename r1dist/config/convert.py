"""What to convert, and into which folder."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from .rewards import STRICT
from .values import PathText


@dataclass(config=STRICT, kw_only=True)
class ConvertRun:
    """`launch/convert.py`: a Hugging Face folder from a GGUF file."""

    gguf: PathText
    """The file."""
    output_dir: PathText
    """The folder to write. It must not exist, or be empty."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """The digest that the file must have."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of the weights written."""
