"""Files and folders that are either complete or absent, and survive a crash of the machine; locks on them."""

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
LOCK = ".lock"  # file in a folder that a run writes to
_CLAIMED = contextlib.ExitStack()  # locks held until this process ends


def sync(path: Path) -> None:
    """Write a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_plain_name(name: str) -> bool:
    """Return True if a name stays inside its folder: it is neither a path nor '.' nor '..'."""
    return name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def expanded(path: str) -> str:
    """Return a path or a hub name with `~` expanded: shells do not expand it in `--flag=~/x`.

    Raises:
        ValueError: the text is empty, as from an unset shell variable, or too long for a path.
    """
    if not path.strip():
        raise ValueError("the value is empty; give a path, or leave it out")
    path = os.path.expanduser(path)
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise ValueError(f"{path[:60]}...: {error.strerror}; give another path") from error
    return path


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file that is complete whenever it exists."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # other processes may write the same file
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    sync(temporary)
    temporary.replace(path)


def checksum(path: Path) -> dict:
    """Return a file's size in bytes and its XXH3-64 digest, as a manifest lists them."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while chunk := file.read(CHECKSUM_CHUNK):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "xxh3_64": digest.hexdigest()}


def replace_folder(temporary: Path, target: Path) -> None:
    """Write a finished folder to disk and rename it to `target`, replacing an older folder of that name."""
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
    """Hold a lock on a file. Unlike flock's, a lockf lock is not inherited by forked workers.

    A file system without locks is reported in one line, and no lock is held.

    Args:
        waiting: line that rank 0 prints while another process has the lock, if any.
        refusal: raise this as an InputError instead of waiting; `{holder}` in it becomes the process and machine.
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
                say(f"the file system of {path.parent} has no locks: run no second program on the same files there")
            else:
                raise
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


def existing_part(folder: Path) -> Path:
    """Return the folder itself, or its nearest parent that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def file_problems(flag: str, file: Path) -> list[str]:
    """Return a line for a reason why the file cannot be written."""
    folder = file.absolute().parent
    if not folder.is_dir():
        return [f"{flag}: folder {folder} does not exist; create it, or give another file"]
    if file.is_dir():
        return [f"{flag}: {file} is a folder; give a file"]
    if not os.access(folder, os.W_OK | os.X_OK):
        return [f"{flag}: no permission to write in {folder}; give another folder"]
    return []


def claim_folder(folder: Path, flag: str) -> None:
    """Create a folder and lock it for this run, until the process ends.

    Raises:
        InputError: another run has it, or it is not writable; the line names `flag`.
    """
    refusal = f"{flag}: another run ({{holder}}) is writing to {folder}; end that run, or give another folder"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _CLAIMED.enter_context(exclusive_lock(folder / LOCK, refusal=refusal))
    except OSError as error:
        raise InputError(
            f"{flag}: {folder} cannot be written to ({error.strerror}); make room or give another folder"
        ) from error
