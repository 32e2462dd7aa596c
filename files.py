"""Files and folders that are whole or absent, and that stay when the machine stops."""

import json
import os
import shutil
from pathlib import Path

import xxhash

CHECKSUM_CHUNK = 2**24  # bytes


def sync(path: Path) -> None:
    """Forces a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: dict) -> None:
    """Writes a file that is whole whenever it is there."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    sync(temporary)
    temporary.replace(path)


def checksum(path: Path) -> dict:
    """Size in bytes and XXH3-64 of a file, as the manifest has them."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while chunk := file.read(CHECKSUM_CHUNK):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "xxh3_64": digest.hexdigest()}


def replace_folder(temporary: Path, target: Path) -> None:
    """Puts a finished folder in its place, that of an older one of the same name too."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)
