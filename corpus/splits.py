"""Chooses the files of a data set's configuration and split as `datasets` does: by its card, else by their names.

It needs only the names of the files and the card, so a data set on the hub is read like its clone in a local folder.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from glob import has_magic
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import fsspec
from fsspec.spec import AbstractFileSystem
from huggingface_hub import DatasetCard, DatasetCardData

from corpus.rows import FILE_SUFFIXES
from runtime.console import InputError, first_line, say

if TYPE_CHECKING:
    from datasets.utils.metadata import MetadataConfigs  # functions import `datasets`: it takes a second

CARD_FILES = ("README.md", ".huggingface.yaml")  # the second adds to the first and overrides it
FOLDER = "data"  # of the file system of names
ROOT = f"listing://{FOLDER}"
READABLE_MODULES = ("json", "parquet", "arrow")  # of `datasets`, for the files that we read
CHANGES_ROWS = ("field", "filters", "encoding", "encoding_errors")  # settings of these modules
DESCRIPTIONS = (  # files that describe data, tokenizers or models: no data, unless a card names them
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
UNPACK = {  # by the suffix of files that hold data but are not read
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
MAPPED = re.compile(r"cache-[0-9a-f]{16}(_\d+_of_\d+)?\.arrow")  # what `datasets` keeps of each .map() beside the data
NAMES_A_SPLIT = re.compile(r"train|val|dev|test|-of-")  # each keyword of `datasets` has one of these in it
COMMON_CRAWL_DUMP = re.compile(r"cc_\d{4}-\d\d$")


class NotFound(InputError):
    """The data set is not there, or has no files of the split."""


class Card(NamedTuple):
    """The configurations that a card lists, by name, and the one to read if none is chosen."""

    configurations: "MetadataConfigs"
    default: str | None


class Request(NamedTuple):
    """The part of a data set to read: see `resolve_source`."""

    slices: tuple[str, ...]
    configuration: str | None
    split: str
    used: tuple[str, ...]
    flag: str


class Choice(NamedTuple):
    """The files of a data set to read.

    Attributes:
        files: the slice of each file by path, in the order in which they are read.
        unreadable: files of the same split that cannot be read.
        remark: the files that are left out, in words.
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
        texts: the contents of those CARD_FILES that are there, by name.

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
        if unquoted := [key for key in configurations if not isinstance(key, str)]:
            raise TypeError(f"the name {unquoted[0]} is no text without quotes")
        default = configurations.get_default_config_name()
    except Exception as error:  # yaml, huggingface_hub and datasets have no class of errors in common
        raise InputError(
            f"--dataset: the configurations in {CARD_FILES[0]} of {name} cannot be read ({first_line(error)}); correct "
            "them, or give the data files alone"
        ) from error
    return Card(configurations, default) if configurations else None


def card_of_folders(paths: Iterable[str]) -> Card:
    """Return the card of a data set whose Parquet files lie in folders CONFIGURATION/SPLIT, as the hub converts it."""
    from datasets.utils.metadata import MetadataConfigs

    splits: dict[str, set[str]] = {}
    for path in paths:
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


def choose(name: str, paths: Sequence[str], card: Card | None, as_datasets: bool, request: Request) -> Choice:
    """Choose the files of a split of the wanted configurations.

    Args:
        as_datasets: take only files whose names `datasets` knows, and of a split only the most common kind; else
            every file of a kind that is read.

    Raises:
        NotFound: a configuration of the card has no files of the split.
        InputError: the card has no such configuration, or cannot be followed.
    """
    files: dict[str, str] = {}
    unreadable: list[str] = []
    of_split, of_used, of_others = set(), set(), set()
    for configuration in _wanted(name, card, request) if card else [""]:
        settings = card.configurations[configuration] if card else {}
        candidates = _candidates(paths, settings, as_datasets)
        splits = _sort_by_split(name, candidates, settings, as_datasets)
        found = splits.get(request.split, [])
        if not found and card:
            raise _without_split(name, card, configuration, splits, request)
        if not found and request.split == "train":
            found = _in_place_of_train(name, candidates, splits)
        readable, others = _by_readability(found, as_datasets)
        unreadable += others
        is_slice = configuration in request.slices
        files = {path: configuration if is_slice else slice_of_path(path) for path in readable} | files
        of_split.update(found)
        for split, of_this in splits.items():
            if split != request.split:
                (of_used if split in request.used else of_others).update(of_this)
    groups = {
        "of other splits": of_others,
        "hidden": set(filter(_is_hidden, paths)),
        "made by .map()": _mapped(paths),
        "of another kind than most": of_split,
        "of other configurations" if card else "of no split": set(paths),
    }
    return Choice(dict(sorted(files.items())), unreadable, _left_out(paths, files.keys() | of_used, groups))


def _wanted(name: str, card: Card, request: Request) -> list[str]:
    """Return the configurations that the user wants, or the card's default."""
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


def _candidates(paths: Sequence[str], settings: Mapping[str, Any], as_datasets: bool) -> list[str]:
    """Return the files that may hold data, by their names."""
    candidates = list(paths)
    if settings.get("data_files") is None:
        mapped = _mapped(paths)
        candidates = [p for p in paths if PurePosixPath(p).name not in DESCRIPTIONS and p not in mapped]
    if not as_datasets:
        candidates = [path for path in candidates if path.lower().endswith(FILE_SUFFIXES + PACKED_SUFFIXES)]
    return candidates


def _mapped(paths: Iterable[str]) -> set[str]:
    """Return the files in which `datasets` keeps the results of .map(), in the folders of its own cache."""
    places = [PurePosixPath(path) for path in paths]
    own = {place.parent for place in places if place.name == "dataset_info.json"}
    return {str(place) for place in places if MAPPED.fullmatch(place.name) and place.parent in own}


def _sort_by_split(
    name: str, paths: Sequence[str], settings: Mapping[str, Any], as_datasets: bool
) -> dict[str, list[str]]:
    """Sort the files of a data set by split, each once; splits without files are left out.

    Args:
        settings: of a configuration of the card; if empty, the names of files and folders count.
        as_datasets: leave out files whose names `datasets` does not know, such as A.JSONL.

    Raises:
        InputError: the configuration names a file that is not there, or has settings that are not supported.
    """
    if not settings and not as_datasets and not any(map(NAMES_A_SPLIT.search, paths)):
        found = [path for path in paths if not _is_hidden(path)]
        return {"train": found} if found else {}  # as below, without the import of `datasets`
    from datasets.data_files import EmptyDatasetError, get_data_patterns, resolve_pattern, sanitize_patterns
    from datasets.packaged_modules import _ALL_ALLOWED_EXTENSIONS

    if changes := [key for key in CHANGES_ROWS if settings.get(key)]:
        raise InputError(
            f"--dataset: the card of {name} sets {', '.join(changes)}, which is not supported; convert the data to "
            "JSONL and give that folder"
        )
    _register_names(paths)
    extensions = _ALL_ALLOWED_EXTENSIONS if as_datasets else None
    base = f"{ROOT}/{_within(name, settings.get('data_dir') or '')}".removesuffix("/.")
    try:
        if settings.get("data_files") is None:
            patterns = get_data_patterns(base)
        else:
            patterns = sanitize_patterns(settings["data_files"])
    except EmptyDatasetError:
        return {}
    except ValueError as error:
        raise InputError(f"--dataset: the files of {name} cannot be sorted by split ({first_line(error)})") from error
    splits: dict[str, set[str]] = {}  # `datasets` would repeat a file that two patterns match
    for split, of_split in patterns.items():
        for pattern in of_split:
            try:
                files = resolve_pattern(_within(name, pattern), base, extensions)
                splits.setdefault(str(split), set()).update(path.removeprefix(f"{ROOT}/") for path in files)
            except FileNotFoundError:
                if not has_magic(str(pattern)):
                    raise InputError(
                        f"--dataset: the card of {name} names {pattern}, which is not there or of no known kind; "
                        "correct the card, or give the data files alone"
                    ) from None
    return {split: sorted(files) for split, files in splits.items()}


def _register_names(paths: Sequence[str]) -> None:
    """Put a file system of names alone at ROOT, on which `datasets` resolves its patterns."""
    entries = {path: {"name": path, "type": "file", "size": 0} for path in sorted(f"{FOLDER}/{path}" for path in paths)}

    class Names(AbstractFileSystem):
        protocol = "listing"

        def find(self, path: str, *_: Any, **__: Any) -> dict[str, dict]:
            return {name: entry for name, entry in entries.items() if name.startswith(path)}

        def info(self, path: str, **_: Any) -> dict:
            try:
                return entries[path]
            except KeyError:
                raise FileNotFoundError(path) from None

    fsspec.register_implementation("listing", Names, clobber=True)


def _within(name: str, pattern: object) -> str:
    """Normalize a path or pattern of a card. Raises InputError if it leads out of the data set."""
    pattern = str(pattern)
    if "://" in pattern or "::" in pattern or pattern.startswith("/") or ".." in PurePosixPath(pattern).parts:
        raise InputError(
            f"--dataset: the card of {name} names {pattern}, which is no file of the data set; download it, and give "
            "the folder"
        )
    return PurePosixPath(pattern).as_posix()


def _without_split(
    name: str, card: Card, configuration: str, splits: Mapping[str, list[str]], request: Request
) -> NotFound:
    there = f"only {', '.join(splits)}" if splits else "and no data"
    if any(split.startswith("partial-") for split in splits):
        there += " (partial: the hub converts no more of it)"
    remedy = "give its files as a folder"
    if others := [other for other in card.configurations if other != configuration]:
        remedy = f"choose of {', '.join(others)} by {request.flag}, or {remedy}"
    return NotFound(
        f"--dataset: configuration {configuration} of {name} has no split '{request.split}', {there}; {remedy}"
    )


def _in_place_of_train(name: str, paths: Sequence[str], splits: Mapping[str, list[str]]) -> list[str]:
    """Choose the files to train on if there is no split `train`: those of no split, else all."""
    known = {path for of_split in splits.values() for path in of_split}
    data = list(filter(is_data, paths))
    if unnamed := [path for path in data if path not in known]:
        return unnamed
    if data:
        say(f"--dataset: {name} has only files of split {', '.join(sorted(splits))}; training on them")
    return data


def _by_readability(paths: Sequence[str], as_datasets: bool) -> tuple[list[str], list[str]]:
    """Return the files of a split that can be read, and those that cannot.

    With `as_datasets` these are files of the most common kind alone, and none if that kind is not read at all.
    """
    files = set(paths)
    if as_datasets:
        from datasets.data_files import DataFilesList
        from datasets.load import infer_module_for_data_files_list
        from datasets.packaged_modules import _MODULE_TO_EXTENSIONS

        unpacked = [path for path in paths if not path.endswith(".zip")]  # it would look into archives
        module, _ = infer_module_for_data_files_list(DataFilesList(unpacked, []))
        if module not in READABLE_MODULES:
            return [], []
        files = set(DataFilesList(list(paths), []).filter(extensions=_MODULE_TO_EXTENSIONS[module]))
    readable = set(filter(_is_readable, files))
    return sorted(readable), sorted(files - readable)


def _left_out(paths: Sequence[str], read: set[str], groups: Mapping[str, set[str]]) -> str:
    """Describe the files that are not read: data by the first group that has them, others by their kind."""
    data = {
        path for path in filter(_is_readable, paths) if path in read or PurePosixPath(path).name not in DESCRIPTIONS
    }
    remarks, rest = [], data - read
    for title, group in groups.items():
        if left_out := sorted(rest & group):
            remarks.append(f"{len(left_out)} {title} ({left_out[0]}{', ...' * (len(left_out) > 1)})")
        rest -= group
    others = [PurePosixPath(path) for path in set(paths) - data if not _is_hidden(path)]
    kinds = Counter(path.name if path.name in DESCRIPTIONS else path.suffix or path.name for path in others)
    return ", ".join([*remarks, *(f"{count} {kind}" for kind, count in sorted(kinds.items()))])


def find_named(name: str, paths: Sequence[str], request: Request, others: Sequence[str] = ()) -> list[str]:
    """Find the files named after the wanted configuration, or in a folder of its name, where the card lists none.

    Args:
        others: configurations that are found elsewhere.

    Raises:
        InputError: there are no such files.
    """
    from datasets.data_files import SPLIT_KEYWORDS

    names: set[str] = set(others)
    chosen = []
    splits = {keyword for keywords in SPLIT_KEYWORDS.values() for keyword in keywords}
    mapped = _mapped(paths)
    for path in filter(is_data, paths):
        if path in mapped:
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
    """Return the name of a file's top folder, or its own, without suffixes and `_sample`."""
    return PurePosixPath(path).parts[0].partition(".")[0].removesuffix("_sample")


def slice_of_path(path: str) -> str:
    """Return the slice of a file: `arxiv_sample.jsonl`, `arxiv-0001.jsonl` and `arxiv/0.jsonl` are of `arxiv`."""
    name = SHARD_NUMBER.sub("", first_name(path))
    return "common_crawl" if COMMON_CRAWL_DUMP.match(name) else name or "data"


def is_data(path: str) -> bool:
    """Return True for a file that is read unless a card says otherwise."""
    return _is_readable(path) and PurePosixPath(path).name not in DESCRIPTIONS and not _is_hidden(path)


def _is_readable(path: str) -> bool:
    return path.lower().endswith(FILE_SUFFIXES)


def _is_hidden(path: str) -> bool:
    """Return True for what `datasets` leaves out unless a card names it: hidden files, and folders `__NAME`."""
    *folders, _ = parts = PurePosixPath(path).parts
    return any(part.startswith(".") for part in parts) or any(folder.startswith("__") for folder in folders)


def unpacking(paths: Sequence[str]) -> str:
    """Return the remedy for JSONL of another name, archives, and unknown compression; empty if there are none."""
    for path in paths:
        if path.lower().endswith((".ndjson", ".ndjson.gz", ".ndjson.zst")):
            return f"; rename {path} to .jsonl instead of .ndjson"
        if command := UNPACK.get(PurePosixPath(path).suffix.lower()):
            return f"; unpack {path} first ({command})"
    return ""


def unreadable_kind(name: str, paths: Sequence[str]) -> InputError:
    """Return the error for a data set of which these files cannot be read."""
    return InputError(
        f"--dataset: {name} has data files of a kind that is not read ({paths[0]}), only "
        f"{', '.join(FILE_SUFFIXES)}{unpacking(paths) or '; convert it to JSONL'}, and give that folder"
    )
