"""The licences of models and data, as far as a card on this disk or the hub names them."""

import functools
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, RepoCard
from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

from ..config.gym import PATH as GYM
from ..files import CARD
from ..tiny import EMBEDDED

NOT_KNOWN = "not known"
OURS = "mit"
REASONING_GYM = "apache-2.0"
SECONDS = 10.0  # that the hub may take for an answer


def model_licence(path: str) -> str:
    """Of a folder, a hub id or an embedded model."""
    return OURS if path in EMBEDDED else _licence(path, "model")


def data_licence(path: str) -> str:
    """Of a source's `path`."""
    if is_generated(path):
        return REASONING_GYM if path == GYM else OURS
    return _licence(path, "dataset")


def is_generated(path: str) -> bool:
    """Whether a source's `path` names rows that are generated."""
    return path in ("tiny", GYM) or path.startswith("tiny_")


def card_data(folder: Path) -> dict[str, Any]:
    """The metadata of the card in `folder`; empty without one."""
    path = folder / CARD
    try:
        return RepoCard.load(path, ignore_metadata_errors=True).data.to_dict() if path.is_file() else {}
    except ValueError:  # no metadata, or some that are not YAML
        return {}


@functools.cache
def _licence(path: str, kind: Literal["model", "dataset"]) -> str:
    if Path(path).exists():
        licence = card_data(Path(path)).get("license")
    else:
        try:
            api = HfApi()
            data = (api.model_info if kind == "model" else api.dataset_info)(path, timeout=SECONDS).card_data
        except (HTTPError, HFValidationError, OfflineModeIsEnabled):
            return NOT_KNOWN
        licence = None if data is None else data.get("license")
    return ", ".join([licence] if isinstance(licence, str) else licence or [NOT_KNOWN])
