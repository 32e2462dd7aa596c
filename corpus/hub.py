"""Lists and fetches what a data set holds on the Hugging Face hub, and files that it names by URL.

A data set's loading script is never run. The client is huggingface_hub, so `HF_TOKEN`, `HF_HOME`, `HF_ENDPOINT` and
`HF_HUB_OFFLINE` mean what they mean everywhere.
"""

import contextlib
import errno
import hashlib
import json
import os
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
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import http_backoff, logging

from runtime import hub
from runtime.console import InputError, say
from runtime.files import exclusive_lock

CONVERTED = "refs/convert/parquet"  # the branch to which the hub's own converter writes every data set it can read
logging.set_verbosity_error()  # it reports every attempt of a request that it repeats in several lines
TIMEOUT_SECONDS = 10
HEAD_REQUESTS = 16  # at a time
PAUSES_SECONDS = (1, 2, 4, 8, 16)  # between attempts at a download
BUSY = (429, 500, 502, 503, 504)
IDENTITY = {"Accept-Encoding": "identity"}  # a file is wanted as it is stored, and its size so
T = TypeVar("T")


class Repository(NamedTuple):
    """A data set at one commit: size in bytes and content hash of every file by its path."""

    name: str
    commit: str
    files: dict[str, tuple[int, str]]


class RemoteFile(NamedTuple):
    """A file behind a URL; `version` is its ETag or date."""

    url: str
    size: int
    version: str


class Unreachable(Exception):
    """The hub gave no answer."""


def downloads_folder() -> Path:
    """Return the folder, beside the hub's cache, of files downloaded from other servers."""
    return Path(constants.HF_HOME, "downloads")


def list_repository(name: str, revision: str | None) -> Repository:
    """List the files of a data set at a branch, tag or commit.

    Raises:
        InputError: there is no such data set or revision, or this user may not read it.
        Unreachable: there is no way to the hub.
    """
    api = HfApi()
    try:
        info = api.dataset_info(name, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS)
        if info.gated:
            api.auth_check(name, repo_type="dataset")
    except (HfHubHTTPError, HFValidationError) as error:
        raise _refusal(name, revision, error) from error
    except OSError as error:
        if hub.of_disk(error):  # as HF_HOME's token is read
            raise
        raise Unreachable(_reason(error)) from error
    files = {
        sibling.rfilename: (sibling.size or 0, sibling.lfs.sha256 if sibling.lfs else sibling.blob_id or "")
        for sibling in info.siblings or []
    }
    return Repository(name, str(info.sha), files)


def is_offline() -> bool:
    """Tell if the user has chosen to do without the hub."""
    return constants.HF_HUB_OFFLINE


def has_converted_branch(name: str) -> bool:
    """Return True if the hub's converter has made Parquet files of a data set. Raises Unreachable."""
    try:
        branches = HfApi().list_repo_refs(name, repo_type="dataset").converts
    except HfHubHTTPError:
        return False
    except OSError as error:
        if hub.of_disk(error):
            raise
        raise Unreachable(_reason(error)) from error
    return any(branch.ref == CONVERTED for branch in branches)


def _refusal(name: str, revision: str | None, error: HfHubHTTPError | HFValidationError) -> InputError:
    if isinstance(error, GatedRepoError):
        return InputError(
            f"--dataset: {name} is gated; accept its terms on its page of the hub, then log in with `hf auth login` "
            "or set HF_TOKEN"
        )
    if isinstance(error, RevisionNotFoundError):
        return InputError(f"--dataset_revision: {name} has no branch, tag or commit '{revision}' on the hub")
    if isinstance(error, RepositoryNotFoundError):
        return InputError(
            f"--dataset: {name} is no file or folder here, and the hub has no such data set that you may read; check "
            "the name, or set HF_TOKEN if it is private"
        )
    if isinstance(error, HFValidationError):
        return InputError(f"--dataset: {name} is neither a file nor a folder here, nor a name of the form OWNER/NAME")
    if isinstance(error, EntryNotFoundError):
        return InputError(f"--dataset: {name} has lost a file since it was listed; start again")
    return InputError(f"--dataset: the hub refuses {name} ({hub.status_of(error)}); try again later, or check HF_TOKEN")


def fetch(repository: str, commit: str, path: str) -> Path:
    """Return the local path of a data set's file; download it, or resume its download, first."""
    try:
        with _in_one_line(f"{path} of {repository}"):
            return Path(_persistently(lambda: hf_hub_download(repository, path, repo_type="dataset", revision=commit)))
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"--dataset: {path} of {repository} is not on this machine, and the hub cannot be reached; download it "
            "where there is a network, into the same HF_HOME"
        ) from error
    except HfHubHTTPError as error:
        raise _refusal(repository, commit, error) from error


@contextlib.contextmanager
def writing_home() -> Iterator[None]:
    """Turns a failure to write what is downloaded into an InputError that names HF_HOME, not an output folder."""
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


def _persistently(request: Callable[[], T]) -> T:
    """Calls `request`, and again while the connection breaks off. What the client has given up itself is passed on."""
    for pause in PAUSES_SECONDS:
        try:
            return request()
        except OSError as error:
            if not _may_pass(error):
                raise
            time.sleep(pause)
    return request()


def _may_pass(error: OSError) -> bool:
    answered = getattr(error, "response", None) is not None
    return not (answered or isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError) or hub.of_disk(error))


@contextlib.contextmanager
def _in_one_line(what: str) -> Iterator[None]:
    """Has a download that failed for good end as an InputError; what the hub refuses and the disk are passed on."""
    try:
        yield
    except HfHubHTTPError:
        raise
    except OSError as error:
        if hub.of_disk(error):
            raise
        raise InputError(
            f"--dataset: {what} cannot be downloaded ({_in_words(error)}); start again to resume it"
        ) from error


def _in_words(error: OSError) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _reason(error: OSError) -> str:
    return "HF_HUB_OFFLINE is set" if isinstance(error, OfflineModeIsEnabled) else type(error).__name__


def read_url_lists(repository: Repository, paths: Sequence[str]) -> dict[str, list[str]]:
    """The URLs in the text files `paths` of a data set, one a line."""
    lists = {}
    for path in paths:
        lines = fetch(repository.name, repository.commit, path).read_text(encoding="utf-8").split()
        strange = [line for line in lines if urlparse(line).scheme not in ("http", "https")]
        if strange or not lines:
            raise InputError(f"--dataset: {path} of {repository.name} is no list of URLs ({[*strange, 'empty'][0]!r})")
        lists[path] = lines
    return lists


def remote_files(urls: Sequence[str]) -> list[RemoteFile]:
    """Asks for size and version of every file. Raises InputError that names the first one that cannot be had."""
    with ThreadPoolExecutor(HEAD_REQUESTS) as pool:
        try:
            files = list(pool.map(_head, urls))
        finally:
            pool.shutdown(cancel_futures=True)
    if unversioned := [file.url for file in files if not file.version]:
        say(
            f"--dataset: the server tells neither ETag nor date of {len(unversioned)} files ({unversioned[0]}, ...): "
            f"new content of the same size is not seen; delete what changed in {downloads_folder()}"
        )
    return files


def _head(url: str) -> RemoteFile:
    try:
        response = http_backoff(
            "HEAD",
            url,
            retry_on_status_codes=BUSY,
            headers=IDENTITY,
            allow_redirects=True,
            timeout=TIMEOUT_SECONDS,
        )
        response.raise_for_status()
    except OSError as error:
        raise InputError(
            f"--dataset: {url} cannot be had ({_in_words(error)}); leave its slice out: --dataset_slices"
        ) from error
    version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
    return RemoteFile(url, int(response.headers.get("Content-Length", 0)), version)


def download(file: RemoteFile) -> Path:
    """Return the local path of this version of the file; download it, or resume its download, first.

    Versions lie beside each other, so that a run goes on with the one it began with. Raises InputError if the server
    has another by now.
    """
    place = urlparse(file.url)
    parts = [part for part in unquote(place.path).split("/") if part not in ("", ".", "..")]
    *folders, name = parts or ["file"]
    folder = downloads_folder().joinpath(place.netloc.replace(":", "_"), *folders)
    folder.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256((file.version + place.query).encode()).hexdigest()[:12]
    target = folder / f"{key}.{name}"
    partial = folder / f"{name}.{key}.part"
    with exclusive_lock(folder / f"{name}.lock"):
        if target.is_file() and file.size in (0, target.stat().st_size):
            return target
        try:
            with _in_one_line(file.url):
                _persistently(lambda: _append(file, partial))
        except HfHubHTTPError as error:
            raise InputError(
                f"--dataset: {file.url} cannot be had ({_in_words(error)}); leave its slice out: --dataset_slices"
            ) from error
        found = partial.stat().st_size
        if file.size and found != file.size:
            partial.unlink()
            raise InputError(f"--dataset: {file.url} has {found} bytes instead of {file.size}; start again")
        if _head(file.url).version != file.version:
            partial.unlink()
            raise InputError(
                f"--dataset: {file.url} has changed since it was listed; delete {_listings_folder()} and start again"
            )
        partial.replace(target)
        if (folder / name).is_file():
            (folder / name).unlink()  # earlier versions of this program kept one, of whichever content
    return target


def _append(file: RemoteFile, partial: Path) -> None:
    with open(partial, "ab" if file.size else "wb") as output:  # of unknown size, it might be whole already
        if not file.size or output.tell() < file.size:
            http_get(file.url, output, resume_size=output.tell(), headers=IDENTITY)


def recall(key: str) -> dict | None:
    """Return the listing that `remember` saved under `key`, or None."""
    try:
        return json.loads(_record(key).read_bytes())
    except (OSError, ValueError):
        return None


def remember(key: str, listing: dict) -> None:
    """Keeps a listing beside the downloads, so that what is downloaded can be used on a machine without a network."""
    path = _record(key)
    temporary = path.with_name(f"{path.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(listing), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        return  # a cache that cannot be written serves those who have a network


def _listings_folder() -> Path:
    return downloads_folder() / "listings"


def _record(key: str) -> Path:
    return _listings_folder() / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
