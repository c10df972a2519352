"""Why the hub did not deliver, in one sentence each."""

import json
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sana.cards import CARDS
from sana.errors import ModelNotFound, did_you_mean


def not_served(repo: str, title: str, revision: str | None, endpoint: str | None, error: Exception) -> ModelNotFound:
    """Say in one sentence why the hub did not deliver, and what to do."""
    hub = endpoint or constants.ENDPOINT
    if isinstance(error, GatedRepoError):
        page = f"{hub}/{repo}"
        return ModelNotFound(f"'{repo}' is gated: accept its terms at {page} and run `hf auth login`.")
    if isinstance(error, RevisionNotFoundError):
        return ModelNotFound(f"'{repo}' has no revision '{revision}': leave it out for the newest one.")
    if isinstance(error, RepositoryNotFoundError):
        hint = did_you_mean(repo, [card.hub_id for card in CARDS.values() if card.hub_id])
        text = f"There is no folder '{repo}' here, and {hub} has no model of that name that it may show"
        return ModelNotFound(f"{text}: check the name, or `hf auth login` if it is private.{hint}")
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    if isinstance(cause, HfHubHTTPError):
        reason = f"answered with status {cause.response.status_code}"
    elif isinstance(cause, json.JSONDecodeError):
        reason = "was answered for by something else, perhaps the login page of this network,"
    else:
        reason = f"could not be used ({type(cause).__name__})"
    advice = "try again later (finished files are kept) or pass a folder"
    text = f"{hub} {reason} and {title} is not complete in the cache: {advice}."
    return ModelNotFound(text + folder_hint(repo))


def folder_hint(repo: str) -> str:
    """Help with a mistyped relative path, which looks like a hub id, when its first half is a folder here."""
    parent, _, name = repo.partition("/")
    if not Path(parent).is_dir():
        return ""
    siblings = [entry.name for entry in Path(parent).iterdir() if entry.is_dir()]
    return f" (There is no folder '{repo}' here either.{did_you_mean(name, siblings)})"
