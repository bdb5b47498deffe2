"""The launchers and recipes that come with r1dist, in a checkout as in an installation."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
LAUNCH = (PACKAGE / "launch").resolve()
CONFIGS = (PACKAGE / "configs").resolve()
RECIPES = CONFIGS / "recipes"


def located(path: str) -> str:
    """`path` as it is where there is such a file, else what r1dist has under that name.

    A name is that of a recipe, with or without its suffix (`tiny/r1_zero`), or begins with `configs/`. A path of
    neither kind is given back as it is.
    """
    if Path(path).exists():
        return path
    shipped = (CONFIGS.parent if path.startswith("configs/") else RECIPES) / path
    return next((str(file) for file in (shipped, Path(f"{shipped}.yaml")) if file.is_file()), path)


def recipes() -> list[str]:
    """The names of the recipes."""
    return sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.glob("*/*.yaml"))
