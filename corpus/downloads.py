"""Lists and downloads data sets of the Hugging Face hub, and files whose URLs a data set lists.

huggingface_hub does the work, so `HF_TOKEN`, `HF_HOME`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` mean what they always mean.
A data set's loading script is never run.
"""

import contextlib
import errno
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.parse import unquote, urlparse

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import http_backoff, logging

from runtime import hub
from runtime.console import InputError, say
from runtime.files import exclusive_lock, write_json

logging.set_verbosity_error()  # else it prints several lines for each attempt of a request
CONVERTED = "refs/convert/parquet"  # the branch on which the hub keeps a data set as Parquet, if it can read it
TIMEOUT_SECONDS = 10
HEAD_REQUESTS = 16  # at a time
PAUSES_SECONDS = (1, 2, 4, 8, 16)  # between attempts at a download
BUSY = (429, 500, 502, 503, 504)
IDENTITY = {"Accept-Encoding": "identity"}  # files and their sizes as they are stored
T = TypeVar("T")


class Repository(NamedTuple):
    """A data set at one commit: size in bytes and content hash of every file, by path."""

    name: str
    commit: str
    files: dict[str, tuple[int, str]]


class RemoteFile(NamedTuple):
    """A file behind a URL: its size in bytes, 0 if unknown, and its ETag or date, empty if unknown."""

    url: str
    size: int
    version: str


class Unreachable(Exception):
    """The hub gave no answer."""


class NoRevision(InputError):
    """The data set has no such branch, tag or commit."""


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """Turn an error of the disk into an InputError that names HF_HOME; a caller would name its output folder."""
    try:
        yield
    except OSError as error:
        if not hub.of_disk(error):
            raise
        remedy = "set HF_HOME to a folder that can be written to, with enough room"
        if error.errno == errno.ENOSPC:
            remedy = "make room there and start again to go on, or set HF_HOME to a folder with more"
        raise InputError(
            f"HF_HOME: cannot write downloads to {error.filename or constants.HF_HOME} ({error.strerror}); {remedy}"
        ) from error


@_disk_errors()
def list_repository(name: str, revision: str | None) -> Repository:
    """List the files of a data set at a branch, tag or commit.

    Raises:
        InputError: there is no such data set, or this user may not read it.
        NoRevision: there is no such revision.
        Unreachable: the hub cannot be reached.
    """
    api = HfApi()
    try:
        info = api.dataset_info(name, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS)
        if info.gated:
            api.auth_check(name, repo_type="dataset")
    except HfHubHTTPError as error:
        raise _refusal(name, revision, error) from error
    except OSError as error:
        if hub.of_disk(error):  # the token is read from HF_HOME
            raise
        offline = isinstance(error, OfflineModeIsEnabled)
        raise Unreachable("HF_HUB_OFFLINE is set" if offline else type(error).__name__) from error
    files = {
        sibling.rfilename: (sibling.size or 0, sibling.lfs.sha256 if sibling.lfs else sibling.blob_id or "")
        for sibling in info.siblings or []
    }
    return Repository(name, str(info.sha), files)


def _refusal(name: str, revision: str | None, error: HfHubHTTPError) -> InputError:
    if isinstance(error, GatedRepoError):
        return InputError(
            f"--dataset: {name} is gated; accept its terms on its page of the hub, then log in with `hf auth login` "
            "or set HF_TOKEN"
        )
    if isinstance(error, RevisionNotFoundError):
        return NoRevision(f"--dataset_revision: {name} has no branch, tag or commit '{revision}' on the hub")
    if isinstance(error, RepositoryNotFoundError):
        return InputError(
            f"--dataset: {name} is no file or folder here, and the hub has no such data set that you may read; check "
            "the name, or set HF_TOKEN if it is private"
        )
    if isinstance(error, EntryNotFoundError):
        return InputError(f"--dataset: {name} has lost a file since it was listed; start again")
    return InputError(f"--dataset: the hub refuses {name} ({hub.status_of(error)}); try again later, or check HF_TOKEN")


@_disk_errors()
def fetch(repository: str, commit: str, path: str) -> Path:
    """Return the local path of a data set's file; download it, or resume its download, first."""

    def request() -> str:
        return hf_hub_download(repository, path, repo_type="dataset", revision=commit)

    try:
        return Path(_persistently(request, f"{path} of {repository}"))
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"--dataset: {path} of {repository} is not on this machine, and the hub cannot be reached; download it "
            "where there is a network, into the same HF_HOME"
        ) from error
    except HfHubHTTPError as error:
        raise _refusal(repository, commit, error) from error


def _persistently(request: Callable[[], T], file: str) -> T:
    """Call `request` again if the connection breaks off within a file, at which huggingface_hub gives up.

    Raises:
        HfHubHTTPError: the server refuses.
        OSError: of the disk.
        InputError: the connection broke off in every attempt.
    """
    pauses = iter(PAUSES_SECONDS)
    while True:
        try:
            return request()
        except OSError as error:
            if isinstance(error, HfHubHTTPError) or hub.of_disk(error):
                raise
            pause = next(pauses, None)
            answered = getattr(error, "response", None) is not None
            if answered or pause is None or isinstance(error, OfflineModeIsEnabled):
                raise InputError(
                    f"--dataset: {file} cannot be downloaded ({_reason(error)}); start again to resume it"
                ) from error
            time.sleep(pause)


def _reason(error: OSError) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def read_url_list(repository: Repository, path: str) -> list[str]:
    """Return the URLs in a text file of a data set, which has one a line."""
    lines = fetch(repository.name, repository.commit, path).read_text(encoding="utf-8").split()
    others = [line for line in lines if urlparse(line).scheme not in ("http", "https")]
    if others or not lines:
        raise InputError(f"--dataset: {path} of {repository.name} is no list of URLs ({[*others, 'empty'][0]!r})")
    return lines


def remote_files(urls: Sequence[str]) -> list[RemoteFile]:
    """Ask for size and version of every file. Raises InputError for the first one that is not available."""
    with ThreadPoolExecutor(HEAD_REQUESTS) as pool:
        files = list(pool.map(_head, urls))
    if unversioned := [file.url for file in files if not file.version]:
        say(
            f"--dataset: the server tells neither ETag nor date of {len(unversioned)} files ({unversioned[0]}, ...): "
            f"new content of the same size is not seen; delete what changed in {_downloads_folder()}"
        )
    return files


def _head(url: str) -> RemoteFile:
    try:
        response = http_backoff(
            "HEAD", url, retry_on_status_codes=BUSY, headers=IDENTITY, allow_redirects=True, timeout=TIMEOUT_SECONDS
        )
        response.raise_for_status()
    except OSError as error:
        raise _unavailable(url, error) from error
    version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
    return RemoteFile(url, int(response.headers.get("Content-Length", 0)), version)


def _unavailable(url: str, error: OSError) -> InputError:
    return InputError(f"--dataset: {url} is not available ({_reason(error)}); leave its slice out: --dataset_slices")


@_disk_errors()
def download(file: RemoteFile) -> Path:
    """Return the local path of this version of a file; download it, or resume its download, first.

    Versions are kept beside one another, so that a run ends with the one that it began with.

    Raises:
        InputError: the file is not available, or the server has another version by now.
    """
    url = urlparse(file.url)
    parts = [part for part in unquote(url.path).split("/") if part not in ("", ".", "..")]
    *folders, name = parts or ["file"]
    folder = _downloads_folder().joinpath(url.netloc.replace(":", "_"), *folders)
    folder.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256((file.version + url.query).encode()).hexdigest()[:12]
    target = folder / f"{key}.{name}"
    with exclusive_lock(folder / f"{name}.lock"):
        if not target.is_file() or file.size not in (0, target.stat().st_size):
            partial = folder / f"{name}.{key}.part"
            _download_to(partial, file)
            partial.replace(target)
            if (folder / name).is_file():
                (folder / name).unlink()  # kept by earlier versions of this program, of unknown content
    return target


def _download_to(partial: Path, file: RemoteFile) -> None:
    def append() -> None:
        with open(partial, "ab" if file.size else "wb") as output:  # of unknown size, it might be whole already
            if not file.size or output.tell() < file.size:
                http_get(file.url, output, resume_size=output.tell(), headers=IDENTITY)

    try:
        _persistently(append, file.url)
    except HfHubHTTPError as error:
        raise _unavailable(file.url, error) from error
    problem, found = "", partial.stat().st_size
    if file.size and found != file.size:
        problem = f"has {found} bytes instead of {file.size}; start again"
    elif _head(file.url).version != file.version:
        problem = f"has changed since it was listed; delete {_listings_folder()} and start again"
    if problem:
        partial.unlink()
        raise InputError(f"--dataset: {file.url} {problem}")


def recall(key: str) -> dict | None:
    """Return the listing that `remember` saved under `key`, or None."""
    try:
        return json.loads(_listing_path(key).read_bytes())
    except (OSError, ValueError):
        return None


def remember(key: str, listing: dict) -> None:
    """Save a listing, so that what was downloaded can be used without a network.

    huggingface_hub's cache does not know which files of a commit are missing from it.
    """
    with contextlib.suppress(OSError):  # a run with a network does not need it
        _listings_folder().mkdir(parents=True, exist_ok=True)
        write_json(_listing_path(key), listing)


def _downloads_folder() -> Path:
    """Return the folder, beside the hub's cache, of files downloaded from other servers."""
    return Path(constants.HF_HOME, "downloads")


def _listings_folder() -> Path:
    return _downloads_folder() / "listings"


def _listing_path(key: str) -> Path:
    return _listings_folder() / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
