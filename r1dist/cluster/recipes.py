"""Which recipe is made for which GPU."""

import re
from pathlib import Path

LEAST_GIB = {12: 11.5, 16: 15.4, 24: 22.0, 48: 44.3, 80: 79.0}
"""GB that GPUs are sold with -> the least GiB that one of them reports (error correction takes some of 24 and 48)."""
OF_FOLDER = {"qwen2.5-0.5b": 24, "qwen2.5-7b": 80}
"""GB that a folder's recipes are made for, where their file names do not say another number."""
R1_ZERO = {
    12: "qwen2.5-0.5b/r1_zero_12gb.yaml",
    16: "qwen2.5-0.5b/r1_zero_16gb.yaml",
    24: "qwen2.5-0.5b/r1_zero.yaml",
    48: "qwen2.5-0.5b/r1_zero_48gb.yaml",
    80: "qwen2.5-0.5b/r1_zero_80gb.yaml",
}
"""GB of one GPU -> R1-Zero's recipe."""


def made_for(recipe: Path) -> int | None:
    """GB of the GPUs that a recipe is made for; None: it needs no GPU."""
    named = re.search(r"_(\d+)gb", recipe.stem)
    return int(named[1]) if named else OF_FOLDER.get(recipe.parent.name)


def nearest(gib: float) -> str | None:
    """R1-Zero's recipe for the largest GPU that has no more than `gib`; None: all are made for more."""
    fitting = [gb for gb in R1_ZERO if LEAST_GIB[gb] <= gib]
    return f"configs/recipes/{R1_ZERO[max(fitting)]}" if fitting else None


def least_gib() -> float:
    """Of the smallest GPU that a recipe is made for."""
    return min(LEAST_GIB.values())


def r1_zero_by_memory(recipes: Path) -> dict[float, Path]:
    """Least GiB of a GPU -> R1-Zero's recipe for it, in the folder of a checkout's `recipes`."""
    return {LEAST_GIB[gb]: recipes / name for gb, name in R1_ZERO.items()}
