"""`report_to`: the trackers that transformers knows, and the packages that they need. Imports no torch."""

import ast
import functools
import importlib.util
from typing import Any

from ..errors import UserError, did_you_mean
from .trl_fields import module_body

# Tracker -> (modules of which one is needed, the package that has it). For the others transformers' message serves.
PACKAGES = {
    "wandb": (("wandb",), "wandb"),
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
    "trackio": (("trackio",), "trackio"),
    "mlflow": (("mlflow",), "mlflow"),
}


def trackers_of(report_to: str | list[str] | None) -> list[str]:
    """The trackers that `report_to` names; `all` are those that are installed, so none is named by it."""
    names = [report_to] if isinstance(report_to, str) else report_to or []
    return [name for name in names if name not in ("none", "all")]


@functools.cache
def known_trackers() -> tuple[str, ...]:
    """transformers' names."""
    for node in module_body("transformers", "integrations/integration_utils.py"):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "INTEGRATION_TO_CALLBACK":
            return tuple(ast.literal_eval(key) for key in node.value.keys)  # type: ignore[attr-defined]
    raise RuntimeError("transformers has no INTEGRATION_TO_CALLBACK")


def check_trackers(trl: dict[str, Any], where: str) -> None:
    """Raises `UserError` for a name in `report_to` that transformers does not know."""
    for name in trackers_of(trl.get("report_to")):
        if name not in known_trackers():
            nearest = did_you_mean(name, [*known_trackers(), "none", "all"])
            raise UserError(
                f"{where}: `report_to`: there is no tracker `{name}`{nearest}\n"
                f"There are {', '.join(known_trackers())}; `none`; and `all` that are installed."
            )


def missing_tracker(trl: dict[str, Any]) -> str | None:
    """What to tell if a package that `report_to` needs is not installed."""
    for name in trackers_of(trl.get("report_to")):
        modules, package = PACKAGES.get(name, ((), ""))
        if modules and not any(importlib.util.find_spec(module) for module in modules):
            return (
                f"`report_to`: {name} is not installed in this environment.\n"
                f"`pip install {package}` adds it; `report_to: none` does without."
            )
    return None
