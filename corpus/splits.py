"""Chooses the files of a data set's configuration and split as `datasets` does: by its card, else by their names.

Only the list of files and the card are needed, so a data set on the hub is read as its clone in a local folder.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from glob import has_magic
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import fsspec
from fsspec.spec import AbstractFileSystem
from huggingface_hub import DatasetCard, DatasetCardData

from corpus.rows import FILE_SUFFIXES
from runtime.console import InputError, first_line, say

if TYPE_CHECKING:
    from datasets.utils.metadata import MetadataConfigs  # importing `datasets` takes a second, so only when it is used


CARD_FILES = ("README.md", ".huggingface.yaml")  # the second adds to the first and overrides it
ROOT = "listing://data"
READABLE_MODULES = ("json", "parquet", "arrow")  # by which `datasets` reads what we read
CHANGES_ROWS = ("field", "filters", "encoding", "encoding_errors")  # settings of these modules
DESCRIPTIONS = (  # of data sets, tokenizers and models: no data, unless a card names them
    "manifest.json",
    "dataset_infos.json",
    "dataset_info.json",
    "dataset_dict.json",
    "state.json",
    "stats.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
SHARD_NUMBER = re.compile(r"[-_.]?\d{4,}(-of-\d+)?$")
UNPACK = {  # kinds of files that hold data, but are not read
    ".xz": "xz -d FILE",
    ".bz2": "bzip2 -d FILE",
    ".lz4": "lz4 -d FILE",
    ".lzma": "xz -d FILE",
    ".br": "brotli -d FILE",
    ".zip": "unzip FILE",
    ".7z": "7z x FILE",
    ".tar": "tar -xf FILE",
    ".tgz": "tar -xf FILE",
}
PACKED_SUFFIXES = tuple(f".{rows}{packed}" for rows in ("jsonl", "json", "ndjson", "parquet") for packed in UNPACK)
NAMES_A_SPLIT = re.compile(r"train|val|dev|test|-of-")  # all that `datasets` looks for has one of these in it
COMMON_CRAWL_DUMP = re.compile(r"cc_\d{4}-\d\d$")


class NotFound(InputError):
    """The data set is not there, or has nothing of the split."""


class Card(NamedTuple):
    """The configurations that a card lists, by name, and the one to read where none is chosen."""

    configurations: "MetadataConfigs"
    default: str | None


class Request(NamedTuple):
    """The part of a data set that is asked for: see `resolve_source`."""

    slices: tuple[str, ...]
    configuration: str | None
    split: str
    used: tuple[str, ...]
    flag: str


class Choice(NamedTuple):
    """The files of a data set to read, in order, each with its slice, and those of the same split that cannot be read.

    `remark` says which files are left out.
    """

    files: dict[str, str]
    unreadable: list[str]
    remark: str


def has_card(texts: Mapping[str, str]) -> bool:
    """Tell a data set of the hub, or its clone, from a folder that merely has a README."""
    return texts.get(CARD_FILES[0], "").lstrip().startswith("---") or CARD_FILES[1] in texts


def read_card(name: str, texts: Mapping[str, str]) -> Card | None:
    """Read the configurations in the card of data set `name`; None if it lists none.

    Args:
        texts: those of CARD_FILES that are there, by name.

    Raises:
        InputError: the card is damaged, or `datasets` would not accept its configurations.
    """
    if not any("configs" in text for text in texts.values()):
        return None
    from datasets.utils.metadata import MetadataConfigs

    settings: dict[str, Any] = {}
    try:
        for path in CARD_FILES:
            if path in texts:
                text = texts[path] if path == CARD_FILES[0] else f"---\n{texts[path]}\n---\n"
                settings |= DatasetCard(text).data.to_dict()
        configurations = MetadataConfigs.from_dataset_card_data(DatasetCardData(**settings))
        if unnamed := [key for key in configurations if not isinstance(key, str)]:
            raise TypeError(f"the name {unnamed[0]} is no text without quotes")
        default = configurations.get_default_config_name()
    except Exception as error:  # of yaml, huggingface_hub or datasets, which share no class
        raise InputError(
            f"--dataset: the configurations in {CARD_FILES[0]} of {name} cannot be read ({first_line(error)}); correct "
            "them, or give the data files alone"
        ) from error
    return Card(configurations, default) if configurations else None


def split_files(
    name: str, paths: Sequence[str], settings: Mapping[str, Any], *, any_name: bool = False
) -> dict[str, list[str]]:
    """Sort the files of a data set by split, each once; no split where there are no files.

    Args:
        paths: of all files.
        settings: of a configuration of the card; empty: by the names of files and folders.
        any_name: keep files whose names `datasets` does not know, such as A.JSONL.

    Raises:
        InputError: the configuration names a file that is not there.
    """
    if not settings and any_name and not any(map(NAMES_A_SPLIT.search, paths)):
        found = [path for path in paths if not _is_hidden(path)]
        return {"train": found} if found else {}  # as below, without importing `datasets`
    from datasets import DownloadConfig
    from datasets.data_files import EmptyDatasetError, get_data_patterns, resolve_pattern, sanitize_patterns
    from datasets.packaged_modules import _ALL_ALLOWED_EXTENSIONS

    if changes := [key for key in CHANGES_ROWS if settings.get(key)]:
        raise InputError(
            f"--dataset: the card of {name} sets {', '.join(changes)}, which is not supported; convert the data to "
            "JSONL and give that folder"
        )
    fsspec.register_implementation("listing", _Listing, clobber=True)
    extensions = None if any_name else _ALL_ALLOWED_EXTENSIONS
    config = DownloadConfig(storage_options={"listing": {"files": _Files(paths), "skip_instance_cache": True}})
    base = f"{ROOT}/{_within(name, settings.get('data_dir') or '')}".removesuffix("/.")
    try:
        if settings.get("data_files") is None:
            patterns = get_data_patterns(base, config)
        else:
            patterns = sanitize_patterns(settings["data_files"])
    except EmptyDatasetError:
        return {}
    except ValueError as error:
        raise InputError(f"--dataset: the files of {name} cannot be sorted by split ({first_line(error)})") from error
    splits: dict[str, set[str]] = {}  # while `datasets` repeats a file that two patterns match
    for split, of_split in patterns.items():
        for pattern in of_split:
            try:
                files = resolve_pattern(_within(name, pattern), base, extensions, config)
                splits.setdefault(str(split), set()).update(path.removeprefix(f"{ROOT}/") for path in files)
            except FileNotFoundError:
                if not has_magic(str(pattern)):
                    raise InputError(
                        f"--dataset: the card of {name} names {pattern}, which is not there or of no known kind; "
                        "correct the card, or give the data files alone"
                    ) from None
    return {split: sorted(files) for split, files in splits.items()}


def readable_files(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part what `datasets` would read of a split into what we read, and what we cannot.

    `datasets` reads only the most common kind of files: both lists are empty where that is another than ours.
    """
    from datasets.data_files import DataFilesList
    from datasets.load import infer_module_for_data_files_list
    from datasets.packaged_modules import _MODULE_TO_EXTENSIONS

    unpacked = [path for path in paths if not path.endswith(".zip")]  # it would look into archives
    module, _ = infer_module_for_data_files_list(DataFilesList(unpacked, []))
    if module not in READABLE_MODULES:
        return [], []
    files = DataFilesList(list(paths), []).filter(extensions=_MODULE_TO_EXTENSIONS[module])
    readable = [path for path in files if path.lower().endswith(FILE_SUFFIXES)]
    return readable, sorted(set(files) - set(readable))


def choose(name: str, paths: Sequence[str], card: Card | None, as_hub: bool, request: Request) -> Choice:
    """Choose the files of a split of the wanted configurations.

    Args:
        as_hub: of a split, take only the most common kind of files, as `datasets` does; else all kinds that are read.
    """
    files: dict[str, str] = {}
    unreadable: list[str] = []
    other_splits, used, other_kinds = set(), set(), set()
    for configuration in _wanted(name, card, request) if card else [""]:
        settings = card.configurations[configuration] if card else {}
        candidates = list(paths)
        if settings.get("data_files") is None:
            candidates = [path for path in paths if PurePosixPath(path).name not in DESCRIPTIONS]
        if not as_hub:
            candidates = [path for path in candidates if path.lower().endswith(FILE_SUFFIXES + PACKED_SUFFIXES)]
        splits = split_files(name, candidates, settings, any_name=not as_hub)
        found = splits.get(request.split, [])
        if not found and card:
            there = f"only {', '.join(splits)}" if splits else "and no data"
            if any(split.startswith("partial-") for split in splits):
                there += " (partial: the hub converts no more of it)"
            remedy = "give its files as a folder"
            if others := [other for other in card.configurations if other != configuration]:
                remedy = f"choose of {', '.join(others)} by {request.flag}, or {remedy}"
            raise NotFound(
                f"--dataset: configuration {configuration} of {name} has no split '{request.split}', {there}; {remedy}"
            )
        if not found and request.split == "train":
            found = _in_place_of_train(name, candidates, splits)
        if as_hub:
            readable, others = readable_files(found)
        else:
            readable = [path for path in found if path.lower().endswith(FILE_SUFFIXES)]
            others = sorted(set(found) - set(readable))
        unreadable += others
        by_name = configuration in request.slices
        files = {path: configuration if by_name else slice_of_path(path) for path in readable} | files
        other_kinds.update(found)
        for split, of_split in splits.items():
            if split in request.used:
                used.update(of_split)
            elif split != request.split:
                other_splits.update(of_split)
    groups = {
        "of other splits": other_splits,
        "hidden": set(filter(_is_hidden, paths)),
        "of another kind than most": other_kinds,
        "of other configurations" if card else "of no split": set(paths),
    }
    return Choice(dict(sorted(files.items())), unreadable, _left_out(paths, {*files, *used}, groups))


def _in_place_of_train(name: str, paths: Sequence[str], splits: dict[str, list[str]]) -> list[str]:
    """Choose what to train on where no file is named after the split `train`: files of no split, else all."""
    known = {path for of_split in splits.values() for path in of_split}
    data = list(filter(is_data, paths))
    if unnamed := [path for path in data if path not in known]:
        return unnamed
    if data:
        say(f"--dataset: {name} has only files of split {', '.join(sorted(splits))}; training on them")
    return data


def _left_out(paths: Sequence[str], read: set[str], groups: dict[str, set[str]]) -> str:
    """Say which files are not read: data by the first group that holds them, others by their kind."""
    data = {path for path in paths if path.lower().endswith(FILE_SUFFIXES)}
    data = {path for path in data if path in read or PurePosixPath(path).name not in DESCRIPTIONS}
    remarks, rest = [], data - read
    for title, group in groups.items():
        if left_out := sorted(rest & group):
            remarks.append(f"{len(left_out)} {title} ({left_out[0]}{', ...' * (len(left_out) > 1)})")
        rest -= group
    others = [PurePosixPath(path) for path in set(paths) - data if not _is_hidden(path)]
    kinds = Counter(path.name if path.name in DESCRIPTIONS else path.suffix or path.name for path in others)
    return ", ".join([*remarks, *(f"{count} {kind}" for kind, count in sorted(kinds.items()))])


def _wanted(name: str, card: Card, request: Request) -> list[str]:
    """Name the configurations of a card that the user wants, or that are read by default."""
    asked = [request.configuration] if request.configuration else list(request.slices)
    there = ", ".join(card.configurations)
    chosen = [configuration for configuration in asked if configuration in card.configurations]
    if chosen and len(chosen) == len(asked):
        return chosen
    if chosen or request.configuration or (asked and not card.default):
        missing = ", ".join(configuration for configuration in asked if configuration not in chosen)
        raise InputError(f"{request.flag}: {name} has no configuration {missing}; choose of {there}")
    if not card.default:
        raise InputError(f"--dataset: {name} has several configurations; choose by {request.flag}: {there}")
    return [card.default]


def _is_hidden(path: str) -> bool:
    """Tell files that `datasets` leaves out unless a card names them: hidden ones, and those in folders `__NAME`."""
    *folders, _ = parts = PurePosixPath(path).parts
    return any(part.startswith(".") for part in parts) or any(folder.startswith("__") for folder in folders)


def named(name: str, paths: Sequence[str], request: Request, others: Sequence[str] = ()) -> list[str]:
    """Find the files in folders of a configuration's name, or of that name, where the card lists no configurations.

    Args:
        others: configurations that are found elsewhere.
    """
    from datasets.data_files import SPLIT_KEYWORDS

    names: set[str] = set(others)
    chosen = []
    splits = {keyword for keywords in SPLIT_KEYWORDS.values() for keyword in keywords}
    for path in paths:
        if not is_data(path):
            continue
        name_of_path = first_name(path)
        if request.configuration in (*PurePosixPath(path).parts[:-1], name_of_path, slice_of_path(path)):
            chosen.append(path)
        if not splits & set(re.split(r"[\W\d_]+", name_of_path.lower())):
            names.add(name_of_path)
    if not chosen and request.configuration != "default":  # the name that `datasets` gives to all files
        remedy = f"choose of {', '.join(sorted(names))}" if len(names) > 1 else "leave the flag out"
        raise InputError(f"{request.flag}: {name} has no '{request.configuration}'; {remedy}")
    return chosen or list(paths)


def first_name(path: str) -> str:
    """Name the file, or its top folder."""
    return PurePosixPath(path).parts[0].partition(".")[0].removesuffix("_sample")


def slice_of_path(path: str) -> str:
    """Name the slice of a file by its name or top folder: `arxiv_sample.jsonl` and `arxiv/0.jsonl` are of `arxiv`."""
    name = SHARD_NUMBER.sub("", first_name(path))
    return "common_crawl" if COMMON_CRAWL_DUMP.match(name) else name or "data"


def is_data(path: str) -> bool:
    """Tell the files that are read unless a card says otherwise."""
    return (
        path.lower().endswith(FILE_SUFFIXES) and PurePosixPath(path).name not in DESCRIPTIONS and not _is_hidden(path)
    )


def unpacking(paths: Sequence[str]) -> str:
    """The remedy for archives and files of unknown compression; empty if there are none."""
    for path in paths:
        if command := UNPACK.get(PurePosixPath(path).suffix.lower()):
            return f"; unpack {path} first ({command})"
    return ""


def refuse_unreadable(name: str, unreadable: Sequence[str]) -> InputError:
    """Refuse a data set of which a part cannot be read."""
    remedy = unpacking(unreadable) or "; convert it to JSONL"
    return InputError(
        f"--dataset: {name} has data files of a kind that is not read ({unreadable[0]}), only "
        f"{', '.join(FILE_SUFFIXES)}{remedy}, and give that folder"
    )


def _within(name: str, pattern: object) -> str:
    """Normalize a path or pattern of a card. Raises InputError where it leads out of the data set."""
    pattern = str(pattern)
    if "://" in pattern or "::" in pattern or pattern.startswith("/") or ".." in PurePosixPath(pattern).parts:
        raise InputError(
            f"--dataset: the card of {name} names {pattern}, which is no file of the data set; download it, and give "
            "the folder"
        )
    return PurePosixPath(pattern).as_posix()


class _Files:
    """Paths of a data set as fsspec describes files; an object of its own, since fsspec prints its arguments."""

    def __init__(self, paths: Sequence[str]):
        folder = ROOT.partition("://")[2]
        self.entries = {f"{folder}/{path}": _entry(f"{folder}/{path}") for path in sorted(paths)}


def _entry(path: str) -> dict:
    return {"name": path, "type": "file", "size": 0}


class _Listing(AbstractFileSystem):
    """A file system of names alone, on which `datasets` resolves its patterns."""

    protocol = "listing"

    def __init__(self, files: _Files):
        super().__init__()
        self.files = files

    def find(self, path: str, *_: Any, **__: Any) -> dict[str, dict]:
        return {name: entry for name, entry in self.files.entries.items() if name.startswith(path)}

    def info(self, path: str, **_: Any) -> dict:
        try:
            return self.files.entries[path]
        except KeyError:
            raise FileNotFoundError(path) from None
