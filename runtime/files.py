"""Files and folders that are whole or absent, and that stay when the machine stops."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import xxhash

from runtime.console import InputError, say

CHECKSUM_CHUNK = 2**24  # bytes
LOCK = ".lock"  # in a folder that a run writes to
_CLAIMED = contextlib.ExitStack()  # locks that this process holds to its end


def sync(path: Path) -> None:
    """Forces a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_plain_name(name: str) -> bool:
    """Return True for the name of a file in a folder itself: no path, absolute or relative, and no '..'."""
    return name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def write_json(path: Path, content: dict) -> None:
    """Writes a file that is whole whenever it is there."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # others may write the same file
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
    """Forces a finished folder to disk and puts it in its place, that of an older one of the same name too."""
    for path in (*temporary.rglob("*"), temporary):
        sync(path)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def exclusive_lock(path: Path, waiting: str = "", refusal: str | None = None) -> Iterator[None]:
    """Held by this process alone: unlike flock's, a lockf lock does not pass on to forked workers.

    Where the file system has no locks, a line says so and nothing is held.

    Args:
        waiting: what rank 0 says when another process has it, if anything.
        refusal: ends as an InputError instead of waiting; `{holder}` in it becomes the process and machine.
    """
    with open(path, "a+", encoding="utf-8") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                lock.seek(0)
                if refusal:
                    raise InputError(refusal.format(holder=lock.read() or "another process")) from error
                if waiting:
                    say(waiting)
                fcntl.lockf(lock, fcntl.LOCK_EX)
            elif error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                say(f"the file system of {path.parent} has no locks: start no second program there that does the same")
            else:
                raise
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


def existing_part(folder: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def claim_folder(folder: Path, flag: str) -> None:
    """Makes a folder and takes it for this run, until the process ends.

    Raises:
        InputError: another run has it, or it cannot be written to; the line names `flag`.
    """
    refusal = f"{flag}: another run ({{holder}}) is writing to {folder}; end it or give another folder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _CLAIMED.enter_context(exclusive_lock(folder / LOCK, refusal=refusal))
    except OSError as error:
        raise InputError(
            f"{flag}: {folder} cannot be written to ({error.strerror}); make room or give another folder"
        ) from error
