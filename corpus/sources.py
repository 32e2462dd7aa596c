"""Finds the files behind `--dataset`: a local file or folder, or the name of a data set on the Hugging Face hub.

Only names and sizes are read here. `SourceFile.fetch` downloads a file if it is not on this machine; `corpus/rows.py`
reads it.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import stat
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from huggingface_hub import constants

from corpus import downloads
from corpus.downloads import CONVERTED, NoRevision, RemoteFile, Repository, Unreachable
from corpus.rows import FILE_SUFFIXES, STATE
from corpus.splits import (
    CARD_FILES,
    Card,
    Choice,
    NotFound,
    Request,
    card_of_folders,
    choose,
    find_named,
    first_name,
    has_card,
    is_data,
    read_card,
    slice_of_path,
    unpacking,
    unreadable_kind,
)
from runtime.console import InputError, say
from runtime.hub import check_name, refuse_pointers, split_revision

REDPAJAMA_SAMPLE = "togethercomputer/RedPajama-Data-1T-Sample"
TEXT_TO_JSONL = """jq -Rsc 'split("\\n\\n")[] | {text: .}' FILE > FILE.jsonl"""


class SourceFile(NamedTuple):
    """A file of a data set.

    Attributes:
        path: within the folder or the data set; of a URL, the end that tells it apart from others.
        slice: the part of the data set that its documents belong to, unless they name another.
        size: bytes, as stored; 0 if unknown.
        version: time of change, content hash, ETag or date: another one if the content is other. A selection of rows
            has also those of the files that it selects from, after commas.
        origin: its folder, `OWNER/NAME@COMMIT` on the hub, or its URL.
    """

    path: str
    slice: str
    size: int
    version: str
    origin: str

    def fetch(self) -> Path:
        """Return the file's path on this machine; download it first if needed, one process at a time.

        Raises:
            InputError: the file is not available, or is not the version that was found.
        """
        if self.origin.startswith(("http://", "https://")):
            return downloads.download(RemoteFile(self.origin, self.size, self.version))
        if not os.path.isabs(self.origin):
            name, _, commit = self.origin.rpartition("@")
            return downloads.fetch(name, commit, self.path)
        path = Path(self.origin, self.path)
        status = _status(path)
        if (status.st_size, str(status.st_mtime_ns)) != (self.size, self.version.partition(",")[0]):
            raise InputError(f"--dataset: {path} has changed since it was found; start again")
        return path


@dataclass(frozen=True)
class Source:
    """All files of a data set in the order in which they are read.

    Attributes:
        name: as the user gave it.
        commit: of the repository on the hub; None for local files.
        remark: the files found and left out, in words; may be empty.
    """

    name: str
    files: list[SourceFile]
    commit: str | None = None
    remark: str = ""

    @property
    def size(self) -> int:
        """Size of all files in bytes, as stored."""
        return sum(file.size for file in self.files)

    @property
    def fingerprint(self) -> str:
        """SHA-256 that changes when a file is added, removed, moved or changed."""
        return hashlib.sha256(json.dumps(self.files).encode()).hexdigest()

    def to_json(self) -> dict:
        """Return the content for JSON, which `from_json` takes."""
        return {"name": self.name, "commit": self.commit, "remark": self.remark, "files": self.files}

    @classmethod
    def from_json(cls, content: dict) -> "Source":
        """Return the source whose content `to_json` gave."""
        return cls(**{**content, "files": [SourceFile(*file) for file in content["files"]]})


def resolve_source(
    name: str,
    *,
    revision: str | None = None,
    slices: Sequence[str] = (),
    configuration: str | None = None,
    split: str = "train",
    used: Sequence[str] = (),
    flag: str = "--dataset_slices",
) -> Source:
    """Find the files behind `--dataset`, as `datasets` would read them: by the data set's card, else by their names.

    Args:
        name: a local file or folder, else a name on the hub, perhaps as NAME@REVISION.
        revision: branch, tag or commit on the hub.
        slices: the slices to read, by default all; the configurations, if the card lists several.
        configuration: the part of the data set to read: of its card, of its converted branch, else a folder or file.
        split: the split to read; files of other splits are left out.
        used: other splits, whose files the remark does not count as left out.
        flag: the flag by which the user chooses a configuration.

    Raises:
        InputError: there is nothing to read; the line says what was found and what to do.
    """
    request = Request(tuple(slices), configuration, split, tuple(used), flag)
    root = Path(os.path.abspath(name))
    if root.exists():
        if revision:
            raise InputError(f"--dataset_revision: {name} is on this machine and has no revisions; leave the flag out")
        source = _pick(_local_source(name, root, request), slices)
        _refuse_copies(source)
        return source
    check_name(name.rstrip("/"), "--dataset", "a file, a folder")
    hub_name, pinned = split_revision(name.rstrip("/"))
    if pinned and revision and pinned != revision:
        raise InputError(f"--dataset_revision: {revision} is not the revision in --dataset {name}; give one of them")
    return _pick(_hub_source(hub_name, revision or pinned, request), slices)


def _pick(source: Source, slices: Sequence[str]) -> Source:
    """Return the source with the files of these slices alone; the name of a file or top folder counts as a slice."""
    if not slices:
        return source
    files = [file for file in source.files if {file.slice, first_name(file.path)} & set(slices)]
    found = {name for file in files for name in (file.slice, first_name(file.path))}
    _require_slices(source.name, slices, found, sorted({file.slice for file in source.files}))
    return replace(source, files=files)


def _require_slices(name: str, slices: Sequence[str], found: Collection[str], there: Collection[str]) -> None:
    if missing := [slice for slice in slices if slice not in found]:
        raise InputError(f"--dataset_slices: {name} has no slice {', '.join(missing)}; it has {', '.join(there)}")


# ------------------------------------------------------------------------------------------------ files on this machine


def _local_source(name: str, root: Path, request: Request) -> Source:
    if root.is_file():
        return _single_file(name, root, request)
    texts = {path: _read_text(root / path) for path in CARD_FILES if (root / path).is_file()}
    card = read_card(name, texts)
    if request.configuration and not card:
        folder = Path(name, request.configuration)
        if folder.is_dir():
            return _local_source(str(folder), Path(os.path.abspath(folder)), request._replace(configuration=None))
        paths = find_named(name, _walk(root), request)
    else:
        root = _folder_of_split(name, root, request.split)
        if saved := _saved_files(root.parent, root.name):
            return Source(name, saved)
        paths = _walk(root, hidden=card is not None)
    choice = choose(name, paths, card, has_card(texts), request)
    if choice.unreadable:
        raise unreadable_kind(name, choice.unreadable)
    if not choice.files:
        found = f", only {choice.remark}" if choice.remark else ""
        raise NotFound(
            f"--dataset: {name} holds no file of a known kind: {', '.join(FILE_SUFFIXES)}{found}{unpacking(paths)}"
        )
    files = dict.fromkeys(
        file._replace(slice=slice) for path, slice in choice.files.items() for file in _files_at(root, path)
    )
    return Source(name, list(files), remark=choice.remark and f"left out in {name}: {choice.remark}")


def _refuse_copies(source: Source) -> None:
    """Raise InputError if a file is there packed and unpacked, as `gzip -k` and `zstd -d` leave it."""
    seen: dict[tuple[str, str], SourceFile] = {}
    for file in source.files:
        plain = re.sub(r"\.(gz|zst)$", "", file.path, flags=re.IGNORECASE)
        if other := seen.get((file.origin, plain)):
            raise InputError(
                f"--dataset: {source.name} has both {other.path} and {file.path}, which seem to be one file packed "
                "and unpacked; remove one of them, rename it if they differ, or give one of them"
            )
        seen[file.origin, plain] = file


def _single_file(name: str, path: Path, request: Request) -> Source:
    if request.configuration:
        raise InputError(f"{request.flag}: {name} is one file and has no configurations; leave the flag out")
    if not path.name.lower().endswith(FILE_SUFFIXES):
        remedy = unpacking([path.name])
        if path.suffix.lower() in (".txt", ".md"):
            remedy = f"; make each part between blank lines a document: {TEXT_TO_JSONL}"
        raise InputError(f"--dataset: {name} is not of a known kind: {', '.join(FILE_SUFFIXES)}{remedy}")
    return Source(name, [_local_file(path.parent, path.name)])


def _folder_of_split(name: str, root: Path, split: str) -> Path:
    """Return the folder of a split in a folder that `datasets` saved with its splits; `root` of any other folder."""
    splits = _saved_list(root / "dataset_dict.json", "splits")
    if not splits:
        return root
    if split not in splits and (len(splits) > 1 or split != "train"):
        raise NotFound(f"--dataset: {name} has no split '{split}'; give the folder of one of: {', '.join(splits)}")
    return root / (split if split in splits else splits[0])


def _saved_list(path: Path, key: str) -> list | None:
    """Return a list in a JSON file that `datasets` saved; None for any other file of that name."""
    try:
        found = json.loads(path.read_bytes())[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, list) else None


def _saved_files(root: Path, folder: str) -> list[SourceFile]:
    """Return the Arrow files that `datasets` saved in a folder of `root`: the data, or selections of their rows."""

    def listed(key: str) -> list[SourceFile]:
        names = [file["filename"] for file in _saved_list(root / folder / STATE, key) or []]
        return [_local_file(root, f"{folder}/{name}") for name in names]

    data, selections = listed("_data_files"), listed("_indices_data_files")
    versions = [file.version for file in data]
    return [file._replace(version=",".join([file.version, *versions])) for file in selections] or data


def _files_at(root: Path, path: str) -> list[SourceFile]:
    """Return the file at a path in `root`; for an Arrow file in a folder that `datasets` saved, all files of that."""
    saved = _saved_files(root, os.path.dirname(path)) if path.lower().endswith(".arrow") else []
    return saved or [_local_file(root, path)]


def _walk(root: Path, hidden: bool = False) -> list[str]:
    """List every file below `root`, once even if several links lead to it. Only a card may name `hidden` ones."""

    def refuse(error: OSError) -> None:
        raise _unreadable(Path(error.filename), error)

    def visible(names: list[str]) -> list[str]:
        return sorted(name for name in names if hidden or not name.startswith("."))

    folders, paths = set(), []
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=refuse):
        if (place := os.path.realpath(folder)) in folders:
            subfolders.clear()
            continue
        folders.add(place)
        subfolders[:] = visible(subfolders)
        paths += [os.path.join(folder, name) for name in visible(names)]
    files: dict[str | tuple[int, int], str] = {}  # the file itself comes before symbolic links to it
    for path in sorted(paths, key=lambda path: (os.path.islink(path), path)):
        files.setdefault(_identity(path), path)
    return sorted(os.path.relpath(path, root) for path in files.values())


def _identity(path: str) -> str | tuple[int, int]:
    """Return what all links to a file have in common: its real path, or its inode if it has several names."""
    with contextlib.suppress(OSError):  # a broken link
        status = os.stat(path)
        if status.st_nlink > 1:  # else never by inode, which some network file systems make up
            return status.st_dev, status.st_ino
    return os.path.realpath(path)


def _local_file(root: Path, path: str) -> SourceFile:
    status = _status(root / path)
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"--dataset: {root / path} is no regular file; remove it")
    if status.st_size == 0:
        raise InputError(f"--dataset: {root / path} is empty; copy it again or remove it")
    refuse_pointers([root / path], "--dataset")
    return SourceFile(path, slice_of_path(path), status.st_size, str(status.st_mtime_ns), str(root))


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"--dataset: {path} cannot be read ({error.strerror}); make it readable or remove it")


# ----------------------------------------------------------------------------------------------------- files on the hub


def _hub_source(name: str, revision: str | None, request: Request) -> Source:
    """List a data set of the hub.

    The last listing is used again if the hub cannot be reached, and if the files are behind URLs and the repository has
    not changed, since each URL would be one more request.
    """
    key = json.dumps([name, revision, request.slices, request.configuration, request.split])
    known = downloads.recall(key)
    try:
        repository = downloads.list_repository(name, revision)
        if known and known["head"] == repository.commit and known["source"]["files"][0][-1].startswith("http"):
            return Source.from_json(known["source"])
        source = _repository_source(repository, revision, request)
    except Unreachable as error:
        if known:
            if not constants.HF_HUB_OFFLINE:
                say(f"the hub cannot be reached ({error}); {name} is read as it was listed the last time")
            return Source.from_json(known["source"])
        raise NotFound(
            f"--dataset: {name} is no file or folder here, and the hub cannot be reached ({error}); "
            "download it where there is a network, or give a local file or folder"
        ) from error
    downloads.remember(key, {"head": repository.commit, "source": source.to_json()})
    return source


def _repository_source(repository: Repository, revision: str | None, request: Request) -> Source:
    """Return the files of the card's configuration, or all; else those in lists of URLs, or on the converted branch."""
    name, paths = repository.name, sorted(repository.files)
    if revision == CONVERTED:
        return _converted_source(repository, request)
    texts = {path: _read_text(downloads.fetch(name, repository.commit, path)) for path in CARD_FILES if path in paths}
    card = read_card(name, texts)

    @functools.cache
    def converted() -> Repository | None:
        with contextlib.suppress(NoRevision):
            return None if revision else downloads.list_repository(name, CONVERTED)

    if request.configuration and not card:
        branch = converted()
        elsewhere = card_of_folders(branch.files).configurations if branch else {}
        if branch and (request.configuration in elsewhere or not any(map(is_data, paths))):
            return _converted_source(branch, request)
        paths = find_named(name, paths, request, list(elsewhere))
    url_lists = {PurePosixPath(path).stem: path for path in paths if re.fullmatch(r"urls/[^/]+\.txt", path)}
    if url_lists and not card and not any(map(is_data, paths)):
        return _url_source(repository, url_lists, request.slices)
    choice = choose(name, paths, card, True, request)
    if choice.files and not choice.unreadable:
        return _chosen_source(repository, choice)
    if branch := converted():
        return _converted_source(branch, request, card)
    if choice.unreadable:
        raise unreadable_kind(name, choice.unreadable)
    script = f"{name.rpartition('/')[2]}.py" in repository.files
    raise NotFound(
        f"--dataset: {name} has no {', '.join(FILE_SUFFIXES)} of split '{request.split}' and no branch {CONVERTED}, "
        f"only {', '.join(paths[:8]) or 'nothing'}{', ...' if len(paths) > 8 else ''}"
        f"{' (its loading script is not run)' if script else ''}{unpacking(paths) or '; convert it to JSONL'} and give "
        "that folder"
    )


def _chosen_source(repository: Repository, choice: Choice) -> Source:
    origin = f"{repository.name}@{repository.commit}"
    files = [SourceFile(path, slice, *repository.files[path], origin) for path, slice in choice.files.items()]
    return _described(repository, files, "files", f"; left out: {choice.remark}" if choice.remark else "")


def _described(repository: Repository, files: list[SourceFile], kind: str, more: str) -> Source:
    size = sum(file.size for file in files) / 1e9
    remark = f"{repository.name}@{repository.commit}: {len(files)} {kind}, {size:.2f} GB{more}"
    return Source(repository.name, files, repository.commit, remark)


def _converted_source(repository: Repository, request: Request, own: Card | None = None) -> Source:
    """Return the files of a configuration on the converted branch; by default that of the data set's `own` card."""
    card = card_of_folders(repository.files)
    if own and own.default in card.configurations:
        card = card._replace(default=own.default)
    return _chosen_source(repository, choose(repository.name, sorted(repository.files), card, True, request))


def _url_source(repository: Repository, url_lists: dict[str, str], slices: Sequence[str]) -> Source:
    """Return the files in lists of URLs, which are one for each slice, by its name."""
    _require_slices(repository.name, slices, url_lists, url_lists)
    chosen = [slice for slice in url_lists if not slices or slice in slices]
    urls = {slice: downloads.read_url_list(repository, url_lists[slice]) for slice in chosen}
    files = [
        SourceFile(f"{slice}/{_url_tail(remote.url, slice)}", slice, remote.size, remote.version, remote.url)
        for slice in chosen
        for remote in downloads.remote_files(urls[slice])
    ]
    unknown = sum(not file.size for file in files)
    return _described(repository, files, "files behind URLs", f" and {unknown} of unknown size" if unknown else "")


def _url_tail(url: str, slice: str) -> str:
    """Return the end of a URL that tells the files of a slice apart: the part after the slice's name, else the path."""
    path = url.partition("://")[2].partition("/")[2].partition("?")[0]
    return path.partition(f"{slice}/")[2] or path
