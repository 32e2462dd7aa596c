"""Finds the files behind `--dataset`: a local file or folder, or the name of a data set on the Hugging Face hub.

Nothing but names and sizes is read here. `SourceFile.rows` and `SourceFile.documents` read a file, which is downloaded
first where it is not on this machine.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from corpus.hub import (
    CONVERTED,
    RemoteFile,
    Repository,
    Unreachable,
    download,
    fetch,
    has_converted_branch,
    is_offline,
    list_repository,
    read_url_lists,
    recall,
    remember,
    remote_files,
    writing_home,
)
from corpus.rows import FILE_SUFFIXES, STATE, WHOLE, Span, read_rows, refuse_pointer
from corpus.splits import (
    CARD_FILES,
    Card,
    Choice,
    NotFound,
    Request,
    choose,
    first_name,
    has_card,
    is_data,
    named,
    read_card,
    refuse_unreadable,
    slice_of_path,
    unpacking,
)
from runtime import hub
from runtime.console import InputError, say

REDPAJAMA_SAMPLE = "togethercomputer/RedPajama-Data-1T-Sample"
SLICE_COLUMN = "red_pajama_subset"
TEXT_TO_JSONL = """jq -Rsc 'split("\\n\\n")[] | {text: .}' FILE > FILE.jsonl"""
HUB_PAGE = re.compile(r"https?://[^/]+/datasets/([^/?#]+/[^/?#]+)(?:/(?:tree|blob|resolve|raw)/([^/?#]+))?")


class Document(NamedTuple):
    """A document, its slice, and how many bytes of the file are read by then; `text` is whatever the row has there."""

    text: Any
    slice: str
    position: int


class SourceFile(NamedTuple):
    """A file of a data set.

    Attributes:
        path: within the folder or the data set, or the whole path within a URL.
        slice: the part of the data set that its documents are counted under, unless they name another.
        size: bytes, as stored; 0 if unknown.
        version: differs when the content does: time of change, content hash, or ETag; of a selection of rows, also
            those of the files selected from, after commas.
        origin: its folder, `OWNER/NAME@COMMIT` on the hub, or its URL.
    """

    path: str
    slice: str
    size: int
    version: str
    origin: str

    def fetch(self) -> Path:
        """Return the file's path on this machine; download it first if needed, one process at a time."""
        if os.path.isabs(self.origin):
            return self._unchanged(Path(self.origin, self.path))
        with writing_home():
            if self.origin.startswith(("http://", "https://")):
                return download(RemoteFile(self.origin, self.size, self.version))
            name, _, commit = self.origin.rpartition("@")
            return fetch(name, commit, self.path)

    def _unchanged(self, path: Path) -> Path:
        """The path of a file on this machine, if it is the one that was found: what is read must be of one version."""
        try:
            status = path.stat()
        except OSError as error:
            raise InputError(f"--dataset: {path} cannot be read ({error.strerror}); restore or remove it") from error
        if (status.st_size, str(status.st_mtime_ns)) != (self.size, self.version.partition(",")[0]):
            raise InputError(f"--dataset: {path} has changed since it was found; start again")
        return path

    def rows(self, columns: Sequence[str] = (), start_row: int = 0) -> Iterator[dict]:
        """Its rows with all their columns, from the row of index `start_row` on.

        Raises:
            InputError: one of `columns` is missing, or the file is damaged or cannot be had.
        """
        for row in read_rows(self.fetch(), columns, start_row=start_row):
            yield row.columns

    def documents(self, start_row: int = 0, span: Span = WHOLE) -> Iterator[Document]:
        """Its rows as documents of pretraining, from the row of index `start_row` on. Raises as `rows`."""
        only = ("text", SLICE_COLUMN, f"meta.{SLICE_COLUMN}")
        for columns, position in read_rows(self.fetch(), only[:1], only=only, span=span, start_row=start_row):
            yield Document(columns.get("text"), _slice_of_row(columns) or self.slice, position)


@dataclass(frozen=True)
class Source:
    """All files of a data set in the order in which they are read.

    Attributes:
        name: what the user called it.
        commit: of the hub's repository; None for local files.
        remark: what was found and left out, for people; may be empty.
    """

    name: str
    files: list[SourceFile]
    commit: str | None = None
    remark: str = ""

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def fingerprint(self) -> str:
        """SHA-256 that changes when a file is added, removed, moved or changed."""
        return hashlib.sha256(json.dumps(self.files).encode()).hexdigest()

    def to_json(self) -> dict:
        return {"name": self.name, "commit": self.commit, "remark": self.remark, "files": self.files}

    @classmethod
    def from_json(cls, content: dict) -> "Source":
        return cls(**{**content, "files": [SourceFile(*file) for file in content["files"]]})


def unusable(text: object) -> str | None:
    """Why a document cannot be used, or None."""
    if text is None:
        return "text missing or null"
    if not isinstance(text, str):
        return "text not a string"
    if not text:
        return "text empty"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "text with unpaired surrogates"


def _slice_of_row(row: dict) -> str | None:
    """The slice that a row names, itself or in `meta`, which may be an object or the JSON of one."""
    name, meta = row.get(SLICE_COLUMN), row.get("meta")
    if not name and isinstance(meta, str) and SLICE_COLUMN in meta:
        with contextlib.suppress(ValueError, RecursionError):
            meta = json.loads(meta)
    if not name and isinstance(meta, dict):
        name = meta.get(SLICE_COLUMN)
    return name if name and isinstance(name, str) else None


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
        slices: leave out all others; configurations where the card lists several.
        configuration: the part of a data set to take: of its card, of its converted branch, else a folder or file.
        split: files that are marked as of another split are left out.
        used: other splits, whose files are not among those that the remark counts as left out.
        flag: the one by which the user chooses a configuration.

    Raises:
        InputError: there is nothing to read; the line says what was found and what to do.
    """
    request = Request(tuple(slices), configuration, split, tuple(used), flag)
    root = Path(os.path.abspath(name))
    if root.exists():
        if revision:
            raise InputError(f"--dataset_revision: {name} is on this machine and has no revisions; leave the flag out")
        return _pick(_local_source(name, root, request), slices)
    hub_name, pinned = hub.split_revision(name.rstrip("/"))
    if name.startswith(("http://", "https://")):
        page = HUB_PAGE.match(name)
        remedy = f"give its name: -d {page[1]}" if page else "download it, and give the file"
        remedy += f"@{page[2]}" if page and page[2] else ""
        raise InputError(f"--dataset: {name} is a URL; {remedy}")
    if os.path.isabs(name) or name.startswith((".", "~")) or hub_name.count("/") > 1:
        raise InputError(f"--dataset: {name} is neither a file nor a folder here; check the path")
    if pinned and revision and pinned != revision:
        raise InputError(f"--dataset_revision: {revision} is not the revision in --dataset {name}; give one of them")
    return _pick(_hub_source(hub_name, revision or pinned, request), slices)


def _pick(source: Source, slices: Sequence[str]) -> Source:
    """The files of these slices; a slice also goes by the name of its file or folder."""
    if not slices:
        return source
    files = [file for file in source.files if {file.slice, first_name(file.path)} & set(slices)]
    found = {name for file in files for name in (file.slice, first_name(file.path))}
    missing = [name for name in slices if name not in found]
    if missing:
        there = sorted({file.slice for file in source.files})
        raise InputError(
            f"--dataset_slices: {source.name} has no slice {', '.join(missing)}; it has {', '.join(there)}"
        )
    return Source(source.name, files, source.commit, source.remark)


def _local_source(name: str, root: Path, request: Request) -> Source:
    split = request.split
    if root.is_file():
        if request.configuration:
            raise InputError(f"{request.flag}: {name} is one file and has no configurations; leave the flag out")
        if not root.name.lower().endswith(FILE_SUFFIXES):
            remedy = (
                f"; make each part between blank lines a document: {TEXT_TO_JSONL}"
                if root.suffix.lower() in (".txt", ".md")
                else unpacking([root.name])
            )
            raise InputError(f"--dataset: {name} is not of a known kind: {', '.join(FILE_SUFFIXES)}{remedy}")
        return Source(name, [_local_file(root.parent, root.name)])
    texts = {path: _text(root / path) for path in CARD_FILES if (root / path).is_file()}
    card = read_card(name, texts)
    if request.configuration and not card:
        folder = Path(name, request.configuration)
        if folder.is_dir():
            return _local_source(str(folder), Path(os.path.abspath(folder)), request._replace(configuration=None))
        paths = named(name, _walk(root), request)
        return _listed_source(name, root, paths, None, request, has_card(texts))
    splits = _saved(root / "dataset_dict.json", "splits")
    if splits:
        if split not in splits and (len(splits) > 1 or split != "train"):
            raise NotFound(f"--dataset: {name} has no split '{split}'; give the folder of one of: {', '.join(splits)}")
        root /= split if split in splits else splits[0]
    if saved := _saved_files(root.parent, root.name):
        return Source(name, saved)
    return _listed_source(name, root, _walk(root, hidden=card is not None), card, request, has_card(texts))


def _listed_source(
    name: str, root: Path, paths: Sequence[str], card: Card | None, request: Request, as_hub: bool
) -> Source:
    choice = choose(name, paths, card, as_hub, request)
    if choice.unreadable:
        raise refuse_unreadable(name, choice.unreadable)
    if not choice.files:
        found = f", only {choice.remark}" if choice.remark else ""
        raise NotFound(
            f"--dataset: {name} holds no file of a known kind: {', '.join(FILE_SUFFIXES)}{found}{unpacking(paths)}"
        )
    files = {
        file._replace(slice=slice): None for path, slice in choice.files.items() for file in _data_files(root, path)
    }
    return Source(name, list(files), remark=choice.remark and f"left out in {name}: {choice.remark}")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"--dataset: {path} cannot be read ({error.strerror}); permit it or move it away") from error


def _saved(path: Path, key: str) -> list | None:
    """A list in a file of a folder that `datasets` saved; None for whatever else has such a name."""
    try:
        found = json.loads(path.read_bytes())[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, list) else None


def _data_files(root: Path, path: str) -> list[SourceFile]:
    """Return the file of a path in `root`; of an Arrow file in a folder that `datasets` saved all files of that."""
    saved = _saved_files(root, os.path.dirname(path)) if path.lower().endswith(".arrow") else []
    return saved or [_local_file(root, path)]


def _saved_files(root: Path, folder: str) -> list[SourceFile]:
    """Return the Arrow files that `datasets` saved in a folder of `root`: the data, or selections of their rows."""

    def listed(key: str) -> list[SourceFile]:
        names = [file["filename"] for file in _saved(root / folder / STATE, key) or []]
        return [_local_file(root, f"{folder}/{name}") for name in names]

    data, selections = listed("_data_files"), listed("_indices_data_files")
    versions = [file.version for file in data]
    return [file._replace(version=",".join([file.version, *versions])) for file in selections] or data


def _walk(root: Path, hidden: bool = False) -> list[str]:
    """List every file below `root`; hidden ones only for a card, which may name them.

    What links lead to twice, or in a circle, counts once.
    """

    def refuse(error: OSError) -> None:
        raise InputError(f"--dataset: {error.filename} cannot be read ({error.strerror}); permit it or move it away")

    seen, paths, links = set(), [], []
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=refuse):
        if (place := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(place)
        subfolders[:] = sorted(name for name in subfolders if hidden or not name.startswith("."))
        for path in (os.path.join(folder, name) for name in names if hidden or not name.startswith(".")):
            (links if os.path.islink(path) else paths).append(path)
    seen = set(map(os.path.realpath, paths))
    for path in sorted(links):
        if (place := os.path.realpath(path)) not in seen:
            seen.add(place)
            paths.append(path)
    return sorted(os.path.relpath(path, root) for path in paths)


def _local_file(root: Path, path: str) -> SourceFile:
    try:
        status = (root / path).stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"--dataset: {root / path} is no regular file; remove it")
        refuse_pointer(root / path)
    except OSError as error:
        raise InputError(f"--dataset: {root / path} cannot be read ({error.strerror}); restore or remove it") from error
    if status.st_size == 0:
        raise InputError(f"--dataset: {root / path} is empty; copy it again or remove it")
    return SourceFile(path, slice_of_path(path), status.st_size, str(status.st_mtime_ns), str(root))


def _hub_source(name: str, revision: str | None, request: Request) -> Source:
    """Lists the data set; takes the last listing if the hub is out of reach, or if the same lists of URLs are there."""
    key = json.dumps([name, revision, request.slices, request.configuration, request.split])
    known = recall(key)
    try:
        with writing_home():
            repository = list_repository(name, revision)
            if known and known["head"] == repository.commit and known["source"]["files"][0][-1].startswith("http"):
                return Source.from_json(known["source"])
            source = _list_hub_source(repository, revision, request)
    except Unreachable as error:
        if known:
            if not is_offline():
                say(f"the hub cannot be reached ({error}); {name} is read as it was listed the last time")
            return Source.from_json(known["source"])
        raise NotFound(
            f"--dataset: {name} is no file or folder here, and the hub cannot be reached ({error}); "
            "download it where there is a network, or give a local file or folder"
        ) from error
    remember(key, {"head": repository.commit, "source": source.to_json()})
    return source


def _list_hub_source(repository: Repository, revision: str | None, request: Request) -> Source:
    """The files of the card's configuration, or all; else those in lists of URLs, or on the converted branch."""
    name, paths = repository.name, sorted(repository.files)
    if revision == CONVERTED:
        return _converted_source(repository, request)
    texts = {path: _text(fetch(name, repository.commit, path)) for path in CARD_FILES if path in paths}
    card = read_card(name, texts)

    @functools.cache
    def converted() -> Repository | None:
        there = not revision and has_converted_branch(name)
        return list_repository(name, CONVERTED) if there else None

    if request.configuration and not card:
        branch = converted()
        elsewhere = _converted_card(branch).configurations if branch else {}
        if branch and (request.configuration in elsewhere or not any(map(is_data, paths))):
            return _converted_source(branch, request)
        paths = named(name, paths, request, list(elsewhere))
    url_lists = [path for path in paths if re.fullmatch(r"urls/[^/]+\.txt", path)]
    if url_lists and not card and not any(map(is_data, paths)):
        return _url_source(repository, url_lists, request.slices)
    choice = choose(name, paths, card, True, request)
    if choice.files and not choice.unreadable:
        return _repository_source(repository, choice)
    if branch := converted():
        return _converted_source(branch, request, card.default if card else None)
    if choice.unreadable:
        raise refuse_unreadable(name, choice.unreadable)
    script = f"{name.rpartition('/')[2]}.py" in repository.files
    raise NotFound(
        f"--dataset: {name} has no {', '.join(FILE_SUFFIXES)} of split '{request.split}' and no branch {CONVERTED}, "
        f"only {', '.join(paths[:8]) or 'nothing'}{', ...' if len(paths) > 8 else ''}"
        f"{' (its loading script is not run)' if script else ''}{unpacking(paths) or '; convert it to JSONL'} and give "
        "that folder"
    )


def _repository_source(repository: Repository, choice: Choice) -> Source:
    origin = f"{repository.name}@{repository.commit}"
    files = [SourceFile(path, slice, *repository.files[path], origin) for path, slice in choice.files.items()]
    size = sum(file.size for file in files)
    found = f"{origin}: {len(files)} files, {size / 1e9:.2f} GB"
    left_out = f"; left out: {choice.remark}" if choice.remark else ""
    return Source(repository.name, files, repository.commit, found + left_out)


def _converted_card(repository: Repository) -> Card:
    """The configurations and splits of a converted branch, by its files `CONFIGURATION/SPLIT/0000.parquet`."""
    from datasets.utils.metadata import MetadataConfigs

    splits: dict[str, set[str]] = {}
    for path in repository.files:
        folders = PurePosixPath(path).parts[:-1]
        if path.endswith(".parquet") and len(folders) == 2:
            splits.setdefault(folders[0], set()).add(folders[1])
    configurations = MetadataConfigs(
        {
            name: {"data_files": [{"split": split, "path": f"{name}/{split}/*.parquet"} for split in sorted(of_name)]}
            for name, of_name in sorted(splits.items())
        }
    )
    return Card(configurations, configurations.get_default_config_name())


def _converted_source(repository: Repository, request: Request, default: str | None = None) -> Source:
    """The files of a configuration on the converted branch; of `default`, the card's, where none is chosen."""
    card = _converted_card(repository)
    if default in card.configurations:
        card = card._replace(default=default)
    return _repository_source(repository, choose(repository.name, sorted(repository.files), card, True, request))


def _url_source(repository: Repository, url_lists: list[str], slices: tuple[str, ...]) -> Source:
    names = {PurePosixPath(path).stem: path for path in url_lists}
    missing = [name for name in slices if name not in names]
    if missing:
        raise InputError(
            f"--dataset_slices: {repository.name} has no slice {', '.join(missing)}; it has {', '.join(names)}"
        )
    chosen = {name: path for name, path in names.items() if not slices or name in slices}
    lists = read_url_lists(repository, list(chosen.values()))
    files = []
    for name, path in chosen.items():
        for remote in remote_files(lists[path]):
            place = f"{name}/{_url_tail(remote.url, name)}"
            files.append(SourceFile(place, name, remote.size, remote.version, remote.url))
    size = sum(file.size for file in files)
    unknown = sum(not file.size for file in files)
    found = f"{repository.name}@{repository.commit}: {len(files)} files behind URLs, {size / 1e9:.2f} GB"
    if unknown:
        found += f" and {unknown} of unknown size"
    return Source(repository.name, files, repository.commit, found)


def _url_tail(url: str, slice: str) -> str:
    """The end of a URL that tells the files of a slice apart: what follows the slice's name, or the whole path."""
    path = url.partition("://")[2].partition("/")[2].partition("?")[0]
    return path.partition(f"{slice}/")[2] or path
