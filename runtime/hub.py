"""Names on the Hugging Face hub, its cache on this machine, and its errors in words."""

import os
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlparse

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from runtime.console import InputError
from runtime.files import existing_part

TIMEOUT_SECONDS = 5  # for requests before a run begins
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
HOSTS = ("huggingface.co", "hf.co")


def split_revision(name: str) -> tuple[str, str | None]:
    """Split NAME@REVISION into the name and the branch, tag or commit; None if there is no revision."""
    name, _, revision = name.partition("@")
    return name, revision or None


def check_name(name: str, flag: str, wanted: str) -> None:
    """Refuse a text that cannot be a hub name; suggest the name that the user may have meant.

    Args:
        wanted: the kind of file or folder that could be given instead.
    """
    if "://" in name or name.startswith(tuple(f"{host}/" for host in HOSTS)):
        remedy = f"the hub name {page}" if (page := _name_in_url(name)) else f"{wanted}, or a hub name OWNER/NAME"
        raise InputError(f"{flag}: {name} is a URL; give {remedy}")
    plain = name.rstrip("/")
    try:
        validate_repo_id(split_revision(plain)[0])
    except HFValidationError as error:
        raise InputError(f"{flag}: {name} does not exist; give {wanted} or a hub name") from error
    if plain != name:
        raise InputError(f"{flag}: {name} is no folder; for the hub's, give {plain} without a slash at its end")
    if name.endswith("@"):
        raise InputError(f"{flag}: {name} names no revision behind @; give one, or leave the @ out")


def _name_in_url(url: str) -> str | None:
    """Return OWNER/NAME or OWNER/NAME@REVISION for the URL of a page on the hub or a mirror, else None."""
    parsed = urlparse(url if "://" in url else f"https://{url}")
    parts = [part for part in parsed.path.split("/") if part]
    if parts[:1] == ["datasets"]:
        parts = parts[1:]
    elif parsed.hostname not in (*HOSTS, urlparse(constants.ENDPOINT).hostname):
        return None
    if len(parts) < 2:
        return None
    has_revision = len(parts) > 3 and parts[2] in ("tree", "blob", "resolve", "raw")
    return "/".join(parts[:2]) + (f"@{parts[3]}" if has_revision else "")


def of_disk(error: OSError) -> bool:
    """Return True for an error of this machine's file system, False for one of the network."""
    return error.errno is not None and not isinstance(error, ConnectionError | TimeoutError)


def unwritable_cache(name: str, flag: str, reason: str) -> InputError:
    """Return the error for a download that the hub's cache has no room or no permission for."""
    return InputError(
        f"{flag}: {name} cannot be downloaded to the hub's cache {constants.HF_HUB_CACHE} ({reason}); set HF_HOME to a "
        "folder that can be written to and has room"
    )


def check_cache(name: str, flag: str) -> None:
    """Raise InputError if this user may not write to the hub's cache, to which `name` would be downloaded."""
    existing = existing_part(Path(constants.HF_HUB_CACHE))
    if not existing.is_dir():
        raise unwritable_cache(name, flag, f"{existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise unwritable_cache(name, flag, f"no permission to write in {existing}")


def refuse_pointers(paths: Iterable[Path], flag: str) -> None:
    """Raise InputError for a file that cannot be read or is a Git LFS pointer: a few lines in place of the data."""
    for path in paths:
        try:
            with open(path, "rb") as file:
                pointer = file.read(len(LFS_POINTER)) == LFS_POINTER
        except OSError as error:
            raise InputError(f"{flag}: {path} cannot be read ({error.strerror}); restore it") from error
        if pointer:
            raise InputError(
                f"{flag}: {path} is a Git LFS pointer, not the file itself; run `git lfs pull` in {path.parent}"
            )


def status_of(error: HfHubHTTPError) -> str:
    """Return the HTTP status of an answer, for a message."""
    return "no status" if error.response is None else f"HTTP {error.response.status_code}"
