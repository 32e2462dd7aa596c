"""The manifest of a prepared folder, and its splits."""

import json
import operator
from pathlib import Path

import numpy as np
import xxhash

from runtime.console import InputError
from runtime.files import is_plain_name

TRAIN, HELD_OUT = "train", "held_out"  # the splits of a prepared folder
MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 2


def is_held_out(text: str, fraction: float) -> bool:
    """Return True if a document belongs to the held-out `fraction`, which its text alone decides."""
    return xxhash.xxh3_64_intdigest(text.encode()) < fraction * 2**64


def read_manifest(folder: Path, flag: str = "--dataset") -> dict:
    """The manifest of a prepared folder. Raises InputError if it is missing, damaged or of another format version."""
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
                raise ValueError("counts that cannot be")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{flag}: {folder / MANIFEST_NAME} cannot be read ({error!r}); delete the folder to prepare it anew"
        ) from error
    if version != FORMAT_VERSION:
        raise InputError(
            f"{flag}: {folder} has format version {version}, this program reads {FORMAT_VERSION}; prepare it anew"
        )
    return manifest
