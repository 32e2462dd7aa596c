"""Names on the Hugging Face hub, its cache on this machine, and its refusals in words."""

import os
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlparse

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from runtime.console import InputError
from runtime.files import existing_part

TIMEOUT_SECONDS = 5  # for what is asked before a run begins
LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md


def split_revision(name: str) -> tuple[str, str | None]:
    """A hub name and, where it comes as NAME@REVISION, the branch, tag or commit that it is pinned to."""
    name, _, revision = name.partition("@")
    return name, revision or None


def check_name(name: str, flag: str, wanted: str) -> None:
    """Refuse a text that can be no hub name, with the name that its user may have meant.

    Args:
        wanted: the kind of folder that could be given instead.
    """
    if "://" in name or name.startswith(("huggingface.co/", "hf.co/")):
        url = urlparse(name if "://" in name else f"https://{name}")
        parts = [part for part in url.path.split("/") if part]
        if url.hostname in ("huggingface.co", "hf.co", urlparse(constants.ENDPOINT).hostname) and len(parts) > 1:
            revision = f"@{parts[3]}" if len(parts) > 3 and parts[2] in ("tree", "blob", "resolve") else ""
            raise InputError(f"{flag}: {name} is a URL; give the hub name {'/'.join(parts[:2])}{revision}")
        raise InputError(f"{flag}: {name} is a URL; give {wanted}, or a hub name OWNER/NAME")
    plain = name.rstrip("/")
    try:
        validate_repo_id(split_revision(plain)[0])
    except HFValidationError as error:
        raise InputError(f"{flag}: {name} does not exist; give {wanted} or a hub name") from error
    if plain != name:
        raise InputError(f"{flag}: {name} is no folder; for the hub's, give {plain} without a slash at its end")
    if name.endswith("@"):
        raise InputError(f"{flag}: {name} names no revision behind @; give one, or leave the @ out")


def of_disk(error: OSError) -> bool:
    """Return True for an error of this machine's file system, False for one of the network."""
    return error.errno is not None and not isinstance(error, ConnectionError | TimeoutError)


def unwritable_cache(name: str, flag: str, reason: str) -> InputError:
    """The error that says that the hub's cache cannot take what `name` would be downloaded to."""
    return InputError(
        f"{flag}: {name} cannot be downloaded to the hub's cache {constants.HF_HUB_CACHE} ({reason}); set HF_HOME to a "
        "folder that can be written to and has room"
    )


def check_cache(name: str, flag: str) -> None:
    """Raise InputError where `name` would have to be downloaded to a cache that this user cannot write to."""
    existing = existing_part(Path(constants.HF_HUB_CACHE))
    if not existing.is_dir():
        raise unwritable_cache(name, flag, f"{existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise unwritable_cache(name, flag, f"no permission to write in {existing}")


def refuse_pointers(paths: Iterable[Path], flag: str) -> None:
    """Raise InputError where a file is what Git leaves of it without Git LFS: a few lines that point to it."""
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
    return "no status" if error.response is None else f"HTTP {error.response.status_code}"
