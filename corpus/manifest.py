"""The manifest of a prepared folder, and its splits."""

import json
import operator
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import xxhash

from runtime.console import InputError
from runtime.files import is_plain_name

TRAIN, HELD_OUT = "train", "held_out"  # the splits of a prepared folder
MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 2


def is_held_out(text: str, fraction: float) -> bool:
    """Return True if a document belongs to the held-out `fraction`; its text alone decides."""
    return xxhash.xxh3_64_intdigest(text.encode()) < fraction * 2**64


def list_skipped(skipped: Mapping[str, int]) -> str:
    """Return the number of skipped rows by reason as text."""
    return ", ".join(f"{count:,} with {reason}" for reason, count in sorted(skipped.items())) or "none"


def is_prepared(folder: Path) -> bool:
    """Return True if the folder has the manifest of a prepared data set."""
    try:
        return "tokenizer_fingerprint" in json.loads((folder / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def read_manifest(folder: Path, flag: str = "--dataset") -> dict:
    """Return the manifest of a prepared folder.

    Raises:
        InputError: it is missing, damaged or of another format version; the message names `flag`.
    """
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
        version = manifest["format_version"]
        if version == FORMAT_VERSION:
            _ = [Path(shard["file"]) / shard["sha256"] / shard["slice"] for shard in manifest["shards"]]
            if not all(is_plain_name(shard["file"]) for shard in manifest["shards"]):
                raise ValueError("a shard outside the folder")
            _ = np.dtype(manifest["dtype"]), manifest["tokenizer_fingerprint"], float(manifest["eval_fraction"])
            tokens = [operator.index(shard["tokens"]) for shard in manifest["shards"]]
            if min(*tokens, operator.index(manifest["vocab_size"])) <= 0 or sum(tokens) != manifest["total_tokens"]:
                raise ValueError("impossible counts")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{flag}: {folder / MANIFEST_NAME} cannot be read ({error!r}); delete the folder to prepare it anew"
        ) from error
    if version != FORMAT_VERSION:
        raise InputError(
            f"{flag}: {folder} has format version {version}, this program reads {FORMAT_VERSION}; prepare it anew"
        )
    return manifest
