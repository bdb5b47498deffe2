"""Which weights to start from."""

from typing import Any, Literal

from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass

from .resumable import MayChange
from .rewards import STRICT
from .values import Identifier, PathText


@dataclass(config=STRICT, kw_only=True)
class Lora:
    """Low-rank adapters (arXiv 2106.09685)."""

    r: PositiveInt = 16
    """Rank of the update."""
    alpha: PositiveInt = 32
    """The update is scaled by alpha / r."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the adapters."""
    targets: str | list[str] = "all-linear"
    """Names of the layers to adapt; `all-linear` is all but the head."""
    save: MayChange[Literal["adapters", "merged"]] = "adapters"
    """What the run leaves at its end: the adapters, or the whole model with the adapters merged into it."""


@dataclass(config=STRICT, kw_only=True)
class Model:
    """Which weights to start from."""

    path: PathText
    """A hub id, a local folder, or one of the embedded base models, `tiny` and `tiny-small`. Adapters found there are
    merged into their base model."""
    tokenizer: PathText | None = None
    """Where the tokenizer is. Unset: with the weights."""
    chat_template_kwargs: dict[Identifier, Any] = Field(default_factory=dict)
    """Arguments of the tokenizer's chat template (`enable_thinking: false`). They are saved with the model."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The dtype of the weights held by the trainer. Mixed precision is `bf16`, TRL's field."""
    attn_implementation: MayChange[str] = "auto"
    """The attention kernel of transformers: `sdpa`, `eager`, `flash_attention_2`, ... `auto`: flash attention on a GPU
    where it is installed, else `sdpa`. With either, a Llama, Mistral, Qwen2 or Qwen3 is trained on rollouts without
    padding, and computes a prompt once for them; with flash attention other models do without padding, too."""
    lora: Lora | None = None
    """Train low-rank adapters instead of the weights (needs `peft`)."""
