"""The account of the Hugging Face hub that uploads, and the repository of a run. Imports no torch."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from ..errors import UserError
from ..files import CARD

TOKENS = "https://huggingface.co/settings/tokens"


def require_account() -> str:
    """The name of the account that the token belongs to.

    Raises `UserError` where the hub cannot be asked, or refuses the token, or the token may only read.
    """
    try:
        account = HfApi().whoami()
    except OfflineModeIsEnabled as error:
        raise UserError(
            "`push_to_hub`: HF_HUB_OFFLINE is set, with which nothing is uploaded.\n"
            "Unset it, or leave `push_to_hub` out."
        ) from error
    except LocalTokenNotFoundError as error:
        raise UserError(
            "`push_to_hub`: there is no token for the hub.\n"
            f"`hf auth login` stores one, HF_TOKEN names one; it needs write access: {TOKENS}."
        ) from error
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise UserError(
                f"`push_to_hub`: {constants.ENDPOINT} refuses the token (401): it is wrong, or was revoked.\n"
                f"`hf auth login --force` stores another, HF_TOKEN goes before it; it needs write access: {TOKENS}."
            ) from error
        raise UserError(f"`push_to_hub`: {constants.ENDPOINT} did not answer: {one_line(error)}") from error
    except HTTPError as error:
        raise UserError(
            f"`push_to_hub`: {constants.ENDPOINT} cannot be reached ({one_line(error)}).\n"
            "Check the network, or leave `push_to_hub` out; `hf upload` does it afterwards."
        ) from error
    token = account.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise UserError(
            f"`push_to_hub`: the token {token.get('displayName', '')} of {account['name']} may only read.\n"
            f"Make one with write access: {TOKENS}."
        )
    return account["name"]


def repository_id(trl: dict[str, Any]) -> str:
    """The id of the repository that a run with these fields of TRL's is uploaded to: without a namespace, the
    account's.
    """
    name = _name(trl)
    return name if "/" in name else f"{HfApi().whoami()['name']}/{name}"


def _name(trl: dict[str, Any]) -> str:
    return trl.get("hub_model_id") or Path(trl["output_dir"]).absolute().name


def make_repository(trl: dict[str, Any]) -> str:
    """The id of the repository for a run with these fields of TRL's, made where there is none.

    Raises `UserError` as `require_account`, and where the hub refuses it.
    """
    account = require_account()
    name = _name(trl)
    api, revision = HfApi(), trl.get("hub_revision")
    try:
        repository = api.create_repo(name, private=trl.get("hub_private_repo"), exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
    except (HfHubHTTPError, HFValidationError) as error:
        raise UserError(
            f"`hub_model_id`: the hub does not let {account} have a repository `{name}`: {one_line(error)}\n"
            "Choose another name, or a token that may write there."
        ) from error
    return repository


def upload_card(repository: str, card: ModelCard, revision: str | None) -> None:
    """Replace the card of a model that was uploaded."""
    HfApi().upload_file(
        path_or_fileobj=str(card).encode(), path_in_repo=CARD, repo_id=repository, revision=revision,
        commit_message="Model card with the recipe's results",
    )  # fmt: skip


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())
