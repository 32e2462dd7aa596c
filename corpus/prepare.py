"""Turns a data set into the folder of tokens that `data_utils.PackedDataset` reads.

The folder holds `tokens-00000.bin`, ... (little-endian uint16, or uint32 for a vocabulary above 65536) and
`manifest.json`. The shards are one stream of documents, BOS ... EOS each; a sequence may span two shards. Nothing
depends on the sequence length or on the number of processes or machines.

Its subfolder `.preparation/` has the plan and a record of every finished unit (see `corpus/units.py`). With them a
killed preparation continues, several machines share the work, and a lost shard is made again.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import Any, NamedTuple

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from corpus.encoder import TextEncoder
from corpus.manifest import FORMAT_VERSION, MANIFEST_NAME, is_prepared, list_skipped, read_manifest
from corpus.sources import Source, resolve_source
from corpus.units import PREPARATION, Preparation, Unit, make_units, read_units, tokenize_units
from runtime.console import InputError, say
from runtime.files import exclusive_lock, sync, write_json
from runtime.ranks import once_per_node

CHECKED_AT_START_BYTES = 2**29


class Part(NamedTuple):
    """One machine's share of the work: every `of`-th unit."""

    number: int = 1
    of: int = 1

    def __str__(self) -> str:
        return f"part {self.number} of {self.of}"


EVERYTHING = Part()


def prepare_dataset(
    dataset: str,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: str | Path,
    num_workers: int | None = None,
    *,
    revision: str | None = None,
    slices: Sequence[str] = (),
    eval_fraction: float | None = None,
) -> Path:
    """Return the folder with the tokens of `dataset`: `dataset` itself if it is prepared, else one in `cache_dir`.

    Local rank 0 finds the files and makes the folder while the other local ranks wait. Call it before any collective
    operation that could time out.

    Raises:
        InputError: the input cannot be used, or `cache_dir` cannot be written to.
    """

    def prepare() -> str:
        encoder = TextEncoder(tokenizer)
        if is_prepared(Path(dataset)) or (Path(dataset) / PREPARATION).is_dir():
            if revision or slices:
                flag = "--dataset_slices" if slices else "--dataset_revision"
                raise InputError(f"{flag}: {dataset} is prepared already and is read as a whole; leave the flag out")
            _check(Path(dataset), encoder, eval_fraction)
            return dataset
        fraction = eval_fraction or 0.0
        source = resolve_source(dataset, revision=revision, slices=slices)
        if source.remark:
            say(source.remark)
        key = json.dumps([FORMAT_VERSION, encoder.fingerprint, source.fingerprint, fraction])
        folder = Path(cache_dir) / hashlib.sha256(key.encode()).hexdigest()
        if not is_prepared(folder):
            request = [dataset, revision, *slices]
            choice: dict[str, Any] = {"eval_fraction": fraction, "request": request}
            prepare_folder(source, encoder, folder, num_workers, flag="--cache_dir", wait_for_others=True, **choice)
            _remove_superseded(folder, [fraction, *request], encoder)
            say(f"kept for the next time in {folder}")
        _check(folder, encoder, fraction)
        return str(folder)

    return Path(once_per_node(prepare))


def _check(folder: Path, encoder: TextEncoder, eval_fraction: float | None) -> None:
    if not (folder / MANIFEST_NAME).exists():
        raise InputError(f"--dataset: {folder} is not completely prepared; run scripts/prepare_dataset.py once more")
    manifest = read_manifest(folder)
    if manifest["tokenizer_fingerprint"] != encoder.fingerprint:
        raise InputError(f"--dataset: {folder} was prepared with another tokenizer; give that one as --tokenizer")
    if eval_fraction not in (None, manifest["eval_fraction"]):
        raise InputError(
            f"--eval_fraction: {folder} was prepared with {manifest['eval_fraction']}, not {eval_fraction}"
        )
    if manifest["total_tokens"] * encoder.dtype.itemsize <= CHECKED_AT_START_BYTES:
        verify(folder)


def verify(folder: Path, num_workers: int = 1, flag: str = "--dataset") -> None:
    """Compare every shard with its checksum in the manifest. Raises InputError with a line for each damaged one."""
    if not (folder / MANIFEST_NAME).exists():
        raise InputError(f"{flag}: {folder} has no {MANIFEST_NAME}; prepare the data set to its end")
    shards = read_manifest(folder, flag)["shards"]
    paths = [folder / shard["file"] for shard in shards]
    with ThreadPoolExecutor(num_workers) as pool:  # hashing releases the interpreter lock
        digests = pool.map(_sha256, paths)
        bar = tqdm(digests, total=len(paths), unit="shard", desc="verifying", disable=None if num_workers > 1 else True)
        damaged = [path for path, shard, digest in zip(paths, shards, bar, strict=True) if digest != shard["sha256"]]
    if damaged:
        raise InputError(
            *(
                f"{flag}: {path} is damaged or missing; delete it and prepare the data set again, which makes only "
                "the missing shards"
                for path in damaged
            )
        )


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def prepare_folder(
    source: Source,
    encoder: TextEncoder,
    folder: Path,
    num_workers: int | None = None,
    *,
    part: Part = EVERYTHING,
    eval_fraction: float = 0.0,
    request: Sequence = (),
    flag: str = "--output",
    wait_for_others: bool = False,
) -> bool:
    """Make the missing shards of a prepared folder, or of a part of it. Return True if the folder is then complete.

    Args:
        eval_fraction: fraction of the documents that is held out of training, in shards of its own.
        request: the user's choice of data, which identifies an interrupted preparation.
        flag: the flag that named the folder, for messages.
        wait_for_others: wait if another process works on the same part, instead of raising InputError.

    Raises:
        InputError: the input cannot be used, the folder cannot be written to or belongs to another data set, or another
            process works on the same part.
    """
    started = time.monotonic()
    try:
        if not (folder / PREPARATION).exists() and _has_files(folder):
            raise InputError(f"{flag}: {folder} has other files; give a new or an empty folder")
        (folder / PREPARATION).mkdir(parents=True, exist_ok=True)
        lock = folder / PREPARATION / f"part-{part.number}-of-{part.of}.lock"
        refusal = f"{flag}: {{holder}} is preparing {part} of {folder}; let it finish, or give another --part"
        waiting = "another job is preparing the same data set; waiting for it"
        locked = exclusive_lock(lock, waiting, None if wait_for_others else refusal)
        read_only = is_prepared(folder) and not os.access(folder, os.W_OK)
        with contextlib.nullcontext() if read_only else locked:
            source, units = _agree_on_plan(folder, source, encoder, [eval_fraction, *request], flag)
            preparation = Preparation(folder, source, units, encoder, eval_fraction)
            mine = range(part.number - 1, len(units), part.of)
            _remove_temporary(preparation, mine)
            missing = [number for number in mine if not preparation.record(number)]
            if missing:
                if len(missing) < len(mine):
                    say(f"going on: {len(mine) - len(missing):,} of {len(mine):,} units are finished")
                workers = num_workers or len(os.sched_getaffinity(0))
                threads = max(1, workers // len(missing))
                preparation = replace(preparation, threads=threads)
                tokenize_units(preparation, missing, min(workers, len(missing)))
            if not missing and is_prepared(folder):
                say(f"{folder} is complete already")
                return True
            return _merge(preparation, time.monotonic() - started)
    except OSError as error:
        remedy = "give a folder that can be written to, with enough room"
        if error.errno == errno.ENOSPC:
            remedy = "make room and run the same command again; finished shards are kept"
        raise InputError(
            f"{flag}: cannot write to {error.filename or folder} ({error.strerror or error}); {remedy}"
        ) from error


def _has_files(folder: Path) -> bool:
    """Return True if a folder has files besides those that a new file system or a desktop puts there."""
    return folder.is_dir() and any(path.name[0] != "." and path.name != "lost+found" for path in folder.iterdir())


def _agree_on_plan(
    folder: Path, source: Source, encoder: TextEncoder, request: Sequence, flag: str
) -> tuple[Source, list[Unit]]:
    """Return the source and the units in the folder's plan; the first process on the folder writes the plan."""
    path = folder / PREPARATION / "plan.json"
    plan = {
        "format_version": FORMAT_VERSION,
        "tokenizer_fingerprint": encoder.fingerprint,
        "request": list(request),
        "source": source.to_json(),
        "units": make_units(source),
    }
    if not path.is_file():
        own = path.with_name(f"plan.{socket.gethostname()}.{os.getpid()}.json")
        write_json(own, plan)
        with contextlib.suppress(FileExistsError):
            os.link(own, path)
        own.unlink()
    try:
        agreed = json.loads(path.read_bytes())
        first = Source.from_json(agreed["source"])
        units = read_units(agreed.get("units"), first)
        _ = [agreed[key] for key in plan if key != "units"]  # plans of earlier versions have no units
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{flag}: {path} is damaged; delete {folder} and start again") from error
    for name, key in (
        ("format", "format_version"),
        ("tokenizer", "tokenizer_fingerprint"),
        ("data set, revision, slices or --eval_fraction", "request"),
    ):
        if agreed[key] != plan[key]:
            raise InputError(f"{flag}: {folder} was prepared with another {name}; give another folder")
    if first.fingerprint != source.fingerprint:
        if not first.commit:
            raise InputError(
                f"{flag}: the files of {source.name} have changed since {folder} was begun; give another folder"
            )
        say(f"going on with {first.name}@{first.commit}, with which {folder} was begun")
    return first, units


def _remove_temporary(preparation: Preparation, numbers: range) -> None:
    """Remove the temporary files of these units that a killed process left."""
    for path in preparation.state.glob("tokens-*"):
        if int(re.split("[-.]", path.name)[1]) in numbers:
            path.unlink(missing_ok=True)


def _merge(preparation: Preparation, seconds: float) -> bool:
    """Write the manifest if every unit has its record, and return True then."""
    folder, source, encoder = preparation.folder, preparation.source, preparation.encoder
    units = range(len(preparation.units))
    records = [record for number in units if (record := preparation.record(number))]
    if missing := len(units) - len(records):
        say(f"this part is finished, others lack {missing:,} of {len(units):,} units; the last writes the manifest")
        return False
    shards = [shard for record in records for shard in record["shards"]]
    skipped = sum((Counter(record["skipped"]) for record in records), Counter())
    unknown = sum(record.get("unknown", 0) for record in records)
    documents, tokens = Counter(), Counter()
    for shard in shards:
        documents[shard["slice"]] += shard["documents"]
        tokens[shard["slice"]] += shard["tokens"]
    if not shards:
        raise InputError(
            f"--dataset: {source.name} has no usable row (skipped: {list_skipped(skipped)}); "
            "give documents in the column 'text'"
        )
    manifest = {
        "format_version": FORMAT_VERSION,
        "dtype": encoder.dtype.name,
        "vocab_size": encoder.vocab_size,
        "tokenizer_fingerprint": encoder.fingerprint,
        "source": source.name,
        "commit": source.commit,
        "source_fingerprint": source.fingerprint,
        "eval_fraction": preparation.eval_fraction,
        "total_tokens": tokens.total(),
        "documents": documents.total(),
        "skipped": dict(sorted(skipped.items())),
        "slices": {name: {"documents": documents[name], "tokens": tokens[name]} for name in sorted(documents)},
        "shards": shards,
    }
    own = preparation.state / f"manifest.{socket.gethostname()}.{os.getpid()}"
    write_json(own, manifest)
    own.replace(folder / MANIFEST_NAME)
    sync(folder)
    say(
        f"tokenized {documents.total():,} documents into {tokens.total():,} tokens in {seconds:.1f} s; "
        f"skipped rows: {list_skipped(skipped)}"
        + (f"; {unknown:,} tokens stand for text that the tokenizer does not know" if unknown else "")
    )
    return True


def _remove_superseded(folder: Path, request: Sequence, encoder: TextEncoder) -> None:
    """Delete interrupted preparations of older states of the same data set; nobody will finish them."""
    for plan_path in folder.parent.glob(f"*/{PREPARATION}/plan.json"):
        begun = plan_path.parent.parent
        if begun == folder or is_prepared(begun):
            continue
        with contextlib.suppress(OSError, ValueError, KeyError, InputError):
            plan = json.loads(plan_path.read_bytes())
            if plan["request"] == request and plan["tokenizer_fingerprint"] == encoder.fingerprint:
                with exclusive_lock(plan_path.with_name("part-1-of-1.lock"), refusal="in use by {holder}"):
                    rmtree(begun)
