"""Finds the files behind `--dataset`: a local file or folder, or the name of a data set on the Hugging Face hub.

Nothing but names and sizes is read here. `SourceFile.rows` and `SourceFile.documents` read a file, which is downloaded
first where it is not on this machine.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import dataset_hub
from console import InputError, say
from dataset_files import FILE_SUFFIXES, STATE, WHOLE, Span, read_rows
from dataset_hub import CONVERTED, RemoteFile, Repository

REDPAJAMA_SAMPLE = "togethercomputer/RedPajama-Data-1T-Sample"
SLICE_COLUMN = "red_pajama_subset"
DESCRIPTIONS = ("manifest.json", "dataset_infos.json", "dataset_info.json", "dataset_dict.json", STATE)
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
TEXT_TO_JSONL = """jq -Rsc 'split("\\n\\n")[] | {text: .}' FILE > FILE.jsonl"""
SHARD_NUMBER = re.compile(r"[-_.]?\d{4,}(-of-\d+)?$")
COMMON_CRAWL_DUMP = re.compile(r"cc_\d{4}-\d\d$")


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
        version: differs when the content does: time of change, content hash, or ETag.
        origin: its folder, `OWNER/NAME@COMMIT` on the hub, or its URL.
    """

    path: str
    slice: str
    size: int
    version: str
    origin: str

    def fetch(self) -> Path:
        """Where the file lies on this machine. Downloads it if need be; whoever else needs it then waits."""
        if self.origin.startswith(("http://", "https://")):
            return dataset_hub.download(RemoteFile(self.origin, self.size, self.version))
        if os.path.isabs(self.origin):
            return Path(self.origin, self.path)
        name, _, commit = self.origin.rpartition("@")
        return dataset_hub.fetch(name, commit, self.path)

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


def add_source_args(parser: argparse._ActionsContainer) -> None:
    """The flags that go with `--dataset`."""
    parser.add_argument("--dataset_revision", help="branch, tag or commit of a data set on the hub (default: its main)")
    parser.add_argument(
        "--dataset_slices",
        nargs="+",
        default=(),
        metavar="NAME",
        help="read these slices alone, such as arxiv or wikipedia: files or folders, or a configuration on the hub "
        "(default: all)",
    )


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
) -> Source:
    """The files behind `--dataset`.

    Args:
        name: a local file or folder, else a name on the hub.
        revision: branch, tag or commit on the hub.
        slices: leave out all others.
        configuration: the part of a data set on the hub to take where it has several.
        split: files that are marked as of another split are left out.
        used: other splits, whose files are not among those that the remark counts as left out.

    Raises:
        InputError: there is nothing to read; the line says what was found and what to do.
    """
    root = Path(os.path.abspath(name))
    if root.exists():
        if revision:
            raise InputError(f"--dataset_revision: {name} is on this machine and has no revisions; leave the flag out")
        source = _local_source(name, root, split, used)
    elif os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1:
        raise InputError(f"--dataset: {name} is neither a file nor a folder here; check the path")
    else:
        source = _hub_source(name, revision, tuple(slices), configuration, split)
    source = _pick(source, slices)
    found = {_split_of_path(file.path) or "train" for file in source.files}
    if split == "train" and split not in found and not root.is_file():
        say(f"--dataset: {name} has only files of split {', '.join(sorted(found))}; training on them")
    return source


def _pick(source: Source, slices: Sequence[str]) -> Source:
    """The files of these slices; a slice also goes by the name of its file or folder."""
    if not slices:
        return source
    files = [file for file in source.files if {file.slice, _first_name(file.path)} & set(slices)]
    found = {name for file in files for name in (file.slice, _first_name(file.path))}
    missing = [name for name in slices if name not in found]
    if missing:
        there = sorted({file.slice for file in source.files})
        raise InputError(
            f"--dataset_slices: {source.name} has no slice {', '.join(missing)}; it has {', '.join(there)}"
        )
    return Source(source.name, files, source.commit, source.remark)


def _first_name(path: str) -> str:
    return PurePosixPath(path).parts[0].partition(".")[0].removesuffix("_sample")


def _slice_of_path(path: str) -> str:
    """The slice that a file's name or top folder names: `arxiv_sample.jsonl` and `arxiv/0.jsonl` are of `arxiv`."""
    name = SHARD_NUMBER.sub("", _first_name(path))
    return "common_crawl" if COMMON_CRAWL_DUMP.match(name) else name or "data"


def _split_of_path(path: str) -> str | None:
    for part in reversed(PurePosixPath(path).parts):
        words = re.split(r"[\W_]+", part.lower())
        for split, names in SPLITS.items():
            if set(names) & set(words):
                return split


def _readable(paths: list[str], split: str, used: Sequence[str] = ()) -> tuple[list[str], str]:
    """The data files of a split among all files of a data set, and a remark on those left out."""
    paths = [path for path in paths if PurePosixPath(path).name not in DESCRIPTIONS]
    data = [path for path in paths if path.lower().endswith(FILE_SUFFIXES)]
    chosen = [path for path in data if _split_of_path(path) in (split, None if split == "train" else split)]
    if not chosen and split == "train":
        chosen = data
    others = Counter(PurePosixPath(path).suffix or PurePosixPath(path).name for path in set(paths) - set(data))
    unused = sorted(path for path in set(data) - set(chosen) if _split_of_path(path) not in used)
    remarks = [f"{len(unused)} of other splits ({unused[0]}{', ...' * (len(unused) > 1)})"] if unused else []
    remarks += [f"{count} {suffix}" for suffix, count in sorted(others.items())]
    return chosen, ", ".join(remarks)


# On this machine


def _local_source(name: str, root: Path, split: str, used: Sequence[str] = ()) -> Source:
    if root.is_file():
        if not root.name.lower().endswith(FILE_SUFFIXES):
            remedy = (
                f"; make each part between blank lines a document: {TEXT_TO_JSONL}"
                if root.suffix.lower() in (".txt", ".md")
                else ""
            )
            raise InputError(f"--dataset: {name} is not of a known kind: {', '.join(FILE_SUFFIXES)}{remedy}")
        return Source(name, [_local_file(root.parent, root.name)])
    splits = _saved(root / "dataset_dict.json", "splits")
    if splits:
        if split not in splits and (len(splits) > 1 or split != "train"):
            raise InputError(
                f"--dataset: {name} has no split '{split}'; give the folder of one of: {', '.join(splits)}"
            )
        root /= split if split in splits else splits[0]
    if saved := _saved_files(root.parent, root.name):
        return Source(name, saved)
    paths, remark = _readable(_walk(root), split, used)
    if not paths:
        found = f", only {remark}" if remark else ""
        raise InputError(f"--dataset: {name} holds no file of a known kind: {', '.join(FILE_SUFFIXES)}{found}")
    files = dict.fromkeys(file for path in paths for file in _data_files(root, path))
    return Source(name, list(files), remark=remark and f"left out in {name}: {remark}")


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
    version = ",".join(file.version for file in (*selections, *data))
    return [file._replace(version=version) for file in selections] or data


def _walk(root: Path) -> list[str]:
    """Every file below `root` but hidden ones. What links lead to twice, or in a circle, counts once."""

    def refuse(error: OSError) -> None:
        raise InputError(f"--dataset: {error.filename} cannot be read ({error.strerror}); permit it or move it away")

    seen, paths, links = set(), [], []
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=refuse):
        if (place := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(place)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for path in (os.path.join(folder, name) for name in names if not name.startswith(".")):
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
        with open(root / path, "rb"):
            pass
    except OSError as error:
        raise InputError(f"--dataset: {root / path} cannot be read ({error.strerror}); restore or remove it") from error
    if status.st_size == 0:
        raise InputError(f"--dataset: {root / path} is empty; copy it again or remove it")
    return SourceFile(path, _slice_of_path(path), status.st_size, str(status.st_mtime_ns), str(root))


# On the hub


def _hub_source(
    name: str, revision: str | None, slices: tuple[str, ...], configuration: str | None, split: str
) -> Source:
    """Lists the data set; takes the last listing if the hub is out of reach, or if the same lists of URLs are there."""
    key = json.dumps([name, revision, slices, configuration, split])
    known = dataset_hub.recall(key)
    try:
        repository = dataset_hub.list_repository(name, revision)
        if known and known["head"] == repository.commit and known["source"]["files"][0][-1].startswith("http"):
            return Source.from_json(known["source"])
        source = _list_hub_source(repository, revision, slices, configuration, split)
    except dataset_hub.Unreachable as error:
        if known:
            return Source.from_json(known["source"])
        raise InputError(
            f"--dataset: {name} is no file or folder here, and the hub cannot be reached ({error}); "
            "download it where there is a network, or give a local file or folder"
        ) from error
    dataset_hub.remember(key, {"head": repository.commit, "source": source.to_json()})
    return source


def _list_hub_source(
    repository: Repository, revision: str | None, slices: tuple[str, ...], configuration: str | None, split: str
) -> Source:
    """The converted branch for a named configuration; else the files themselves, or those they list, or that branch."""
    name, paths = repository.name, sorted(repository.files)
    if configuration and not revision and dataset_hub.has_converted_branch(name):
        return _converted_source(dataset_hub.list_repository(name, CONVERTED), configuration, split)
    if revision == CONVERTED:
        return _converted_source(repository, configuration or "".join(slices[:1]) or None, split)
    data, remark = _readable(paths, split)
    url_lists = [path for path in paths if re.fullmatch(r"urls/[^/]+\.txt", path)]
    if configuration:
        data = [path for path in data if configuration in PurePosixPath(path).parts[:-1]] or data
    if data:
        return _repository_source(repository, data, remark)
    if url_lists:
        return _url_source(repository, url_lists, slices)
    if not revision and dataset_hub.has_converted_branch(name):
        return _converted_source(dataset_hub.list_repository(name, CONVERTED), "".join(slices[:1]) or None, split)
    script = f"{name.rpartition('/')[2]}.py" in repository.files
    raise InputError(
        f"--dataset: {name} has no {', '.join(FILE_SUFFIXES)} of split '{split}' and no branch {CONVERTED}, only "
        f"{', '.join(paths[:8]) or 'nothing'}{', ...' if len(paths) > 8 else ''}"
        f"{' (its loading script is not run)' if script else ''}; convert it to JSONL and give that folder"
    )


def _repository_source(repository: Repository, paths: list[str], remark: str) -> Source:
    origin = f"{repository.name}@{repository.commit}"
    files = [SourceFile(path, _slice_of_path(path), *repository.files[path], origin) for path in paths]
    size = sum(file.size for file in files)
    found = f"{origin}: {len(files)} files, {size / 1e9:.2f} GB"
    return Source(repository.name, files, repository.commit, found + (f"; left out: {remark}" if remark else ""))


def _converted_source(repository: Repository, configuration: str | None, split: str) -> Source:
    """Files `CONFIGURATION/SPLIT/0000.parquet`, as the hub's converter names them."""
    folders = {tuple(PurePosixPath(path).parts[:2]) for path in repository.files if path.endswith(".parquet")}
    configurations = sorted({folder[0] for folder in folders})
    chosen = configuration or (configurations[0] if len(configurations) == 1 else "default")
    if chosen not in configurations:
        flag = "--task_name" if configuration else "--dataset_slices"
        raise InputError(
            f"{flag}: {repository.name} has no '{chosen}' on the hub; choose of {', '.join(configurations)}"
        )
    if (chosen, split) not in folders:
        splits = sorted(folder[1] for folder in folders if folder[0] == chosen)
        raise InputError(
            f"--dataset: {repository.name} has no whole split '{split}' of {chosen} in {CONVERTED}, only "
            f"{', '.join(splits)} (partial: the hub converts no more of it); give its original files as a folder"
        )
    paths = sorted(path for path in repository.files if path.startswith(f"{chosen}/{split}/"))
    return _repository_source(repository, paths, "")


def _url_source(repository: Repository, url_lists: list[str], slices: tuple[str, ...]) -> Source:
    names = {PurePosixPath(path).stem: path for path in url_lists}
    missing = [name for name in slices if name not in names]
    if missing:
        raise InputError(
            f"--dataset_slices: {repository.name} has no slice {', '.join(missing)}; it has {', '.join(names)}"
        )
    chosen = {name: path for name, path in names.items() if not slices or name in slices}
    lists = dataset_hub.read_url_lists(repository, list(chosen.values()))
    files = []
    for name, path in chosen.items():
        for remote in dataset_hub.remote_files(lists[path]):
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
