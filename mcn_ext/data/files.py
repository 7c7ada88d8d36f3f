"""Writes files atomically (each is the old or the new one, complete), one process at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

_locks: dict[Path, BinaryIO] = {}  # of this process, which end with it


def _release_locks() -> None:
    for file in _locks.values():
        file.close()


# A process that reads ahead outlives a killed run for seconds, and would keep its lock.
os.register_at_fork(after_in_child=_release_locks)


def lock(path: Path, wait: bool = False) -> BinaryIO:
    """Keep a file or folder for this process, until what is returned is closed.

    A lock of the operating system, on a file beside ``path``: it is gone when its process is.
    SystemExit if another process has it: its host, number and start. wait: until it is free.
    """
    if path in _locks:  # an earlier run of this process
        _locks.pop(path).close()
    beside = path.with_name(f".{path.name}.lock")
    with writing(beside):
        beside.parent.mkdir(parents=True, exist_ok=True)
        # Not through a link, at whose end a file would be emptied.
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        file = open(os.open(beside, flags, 0o666), "a+b", buffering=0)
    _locks[path] = file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        file.truncate(0)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"host {platform.node()}, process {os.getpid()}, since {now}".encode())
    except BlockingIOError:
        file.seek(0)
        raise SystemExit(
            f"{path}: another run is writing here ({file.read().decode() or 'just started'}); "
            "wait for it, end it, or write elsewhere"
        ) from None
    except OSError:  # a file system without locks, or a full one
        pass
    return file


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the error of a disk that is full, or refuses, into a SystemExit that names the file."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):  # torch.save makes a RuntimeError of a full disk
            raise
        full = cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise SystemExit(
            f"{path}: could not be written ({cause.strerror or cause}); what was "
            "saved before is untouched. "
            + (
                "Make room and run the same command again"
                if full
                else "Is the place right, and may you write there?"
            )
        ) from error


@contextlib.contextmanager
def replacing(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """Yields a temporary path; what is written there then takes the place of ``path``.

    Write, fsync, rename. The old file is kept as ``previous``. SystemExit on a full disk.
    """
    tmp = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            yield tmp
            _sync(tmp)
            if previous is not None and path.exists():
                _keep(path, previous)
            os.replace(tmp, path)
        finally:
            tmp.unlink(missing_ok=True)
    sync_folder(path.parent)


def replace(path: Path, fill: Callable[[BinaryIO], object], previous: Path | None = None) -> None:
    """:func:`replacing` by what ``fill`` writes into an open file."""
    with replacing(path, previous) as tmp, open(tmp, "wb") as file:
        fill(file)


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one move. SystemExit on a full disk."""
    replace(path, lambda file: file.write(text.encode()))


def append(path: Path, text: str) -> None:
    """Add to a file, which is not held open. SystemExit on a full disk."""
    with writing(path), open(path, "ab") as file:
        file.write(text.encode(errors="backslashreplace"))


def _keep(path: Path, previous: Path) -> None:
    """Give a file a second name, and that only, so that ``path`` is there at every moment."""
    link = previous.with_name(previous.name + ".tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # no links on this disk: for a moment, only ``previous`` is there
        link = path
    os.replace(link, previous)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on disk, where the file system can say so."""
    with contextlib.suppress(OSError):
        _sync(folder)


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
