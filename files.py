"""Files and folders that are whole or absent, and that stay when the machine stops."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import xxhash

from console import say

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


@contextlib.contextmanager
def exclusive_lock(path: Path, waiting: str) -> Iterator[None]:
    """Held by this process alone: unlike flock's, a lockf lock does not pass on to forked workers.

    Args:
        waiting: what rank 0 says when another process has it.
    """
    with open(path, "w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            say(waiting)
            fcntl.lockf(lock, fcntl.LOCK_EX)
        yield
