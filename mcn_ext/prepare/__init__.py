"""Converts files as the field has them to stores: ``python -m mcn_ext.prepare KIND ...``."""

from __future__ import annotations

import csv
import errno
import io
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from mcn_ext.console import printable
from mcn_ext.data.files import write_text

# Of the machine, not of the file: no space, too many open files, a network disk that is gone. The
# items that come after would all be lost, so these end a run; the same command then resumes it.
MACHINE = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EMFILE", "ENFILE", "ESTALE", "ENOTCONN", "ENODEV")
}


class Skipped(ValueError):
    """An item that cannot be used; says which file and why. The run goes on without it."""


def skipped(what: object, error: Exception) -> Skipped:
    """The reason to leave a file out that cannot be read; SystemExit if it is the machine's."""
    if isinstance(error, OSError) and error.errno in MACHINE:
        raise SystemExit(f"{what}: {error}; set that right and run the same command again")
    return Skipped(f"{what}: not readable ({type(error).__name__}: {error})")


def write_table(path: Path, header: list[str], rows: list[tuple[str, str]]) -> str:
    """Write a CSV, or remove an old one if there are no rows; returns the first ones in words."""
    if not rows:
        path.unlink(missing_ok=True)
        return ""
    rows = [tuple(map(printable, row)) for row in rows]
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    write_text(path, text.getvalue())
    examples = "; ".join(f"{name}: {reason}" for name, reason in rows[:3])
    return f"listed in {path} ({examples}{' ...' if rows[3:] else ''})"


class SkipList:
    """Items that were left out, for the summary and for ``<out>.skipped.csv``."""

    def __init__(self, out: Path):
        self.path = out.with_name(out.name + ".skipped.csv")
        self.rows: list[tuple[str, str]] = []

    def add(self, name: str, reason: object) -> None:
        self.rows.append((name, str(reason)))

    def close(self) -> str:
        """Write the list; returns a summary."""
        written = write_table(self.path, ["id", "reason"], self.rows)
        return f"{len(self.rows)} skipped, {written}" if written else "none skipped"


def require(flag: str, path: Path) -> None:
    """SystemExit if the file or folder of a flag is not there."""
    if not path.exists():
        raise SystemExit(f"{flag} {path}: no such file or folder")


def walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder, its files' names) of a folder and all below, linked ones too, sorted, each once.
    SystemExit for one that cannot be listed, whose files would be missing without a word."""

    def fail(error: OSError):
        raise SystemExit(f"{error.filename}: cannot be listed ({error.strerror}); mend that first")

    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        found = os.stat(place)
        if (found.st_dev, found.st_ino) in seen:  # a link to a folder above, or one that was read
            folders.clear()
            continue
        seen.add((found.st_dev, found.st_ino))
        folders.sort()
        yield place, sorted(names)


def in_order(function: Callable, items: Iterable, workers: int) -> Iterator:
    """(item, result or Skipped) of each item, in order; ``workers`` threads, 4 * workers ahead."""

    def attempt(item):
        try:
            return item, function(item)
        except Skipped as reason:
            return item, reason

    pool, pending = ThreadPoolExecutor(workers), deque()
    try:
        for item in items:
            pending.append(pool.submit(attempt, item))
            if len(pending) >= 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:  # do not wait for items that have not begun
        pool.shutdown(cancel_futures=True)


def convert(
    writer,
    skips: SkipList,
    items: dict,
    read: Callable,
    *,
    workers: int = 1,
    unit: str = "videos",
    note: str = "",
    before_close: Callable = lambda: None,
) -> str:
    """Read the items that the store lacks, write them, and return the summary that is printed.

    items: {id: whatever ``read`` takes}. read: (id, item) -> ({stream: (n, dim) array or None},
    (start, end, text) of the captions, and maybe the words spoken); it runs in ``workers`` threads
    and raises Skipped.
    HDF5 is written by this thread alone. StoreError if no item could be used.
    """
    from mcn_ext.data.store import Store, StoreError, compare_durations  # h5py is slow to load

    if others := writer.done - items.keys():
        raise StoreError(
            f"{writer.out} was begun with {len(others)} {unit} that are not in the input now, such "
            f"as {min(others)}; pass --overwrite to start again, or another --out"
        )
    total, resumed, lacking = len(items) + len(skips.rows), len(writer.done), Counter()
    todo = [entry for entry in items.items() if entry[0] not in writer.done]
    results = in_order(lambda entry: read(*entry), todo, workers)
    for (name, _), result in tqdm(
        results, total=len(todo), unit=unit.removesuffix("s"), desc="prepare", mininterval=0.5
    ):
        if isinstance(result, Skipped):
            skips.add(name, result)
            continue
        rows, captions = result
        for stream in writer.streams:
            lacking["audio" if stream == "mel" else stream] += rows.get(stream) is None
        lacking["captions (training passes over them; give --captions)"] += not len(captions[0])
        writer.add(name, rows, *captions)
    kept, left_out = len(writer.done), skips.close()
    if kept:
        before_close()
    else:
        print(printable(left_out))
    store = writer.close()
    notices, misfits = compare_durations(Store(store))
    path = store.with_name(store.name + ".durations.csv")
    if listed := write_table(path, ["id", "durations"], misfits):
        notices.append(f"in {len(misfits)} {unit} durations disagree, {listed}")
    again = f" ({resumed} from an earlier, interrupted run)" if resumed else ""
    known = ("2d", "3d", "mel")  # the other names do not say what the stream is taken for
    streams = ", ".join(
        f"{name} {spec['dim']}" + ("" if name in known else f" ({spec['modality']})")
        for name, spec in writer.streams.items()
    )
    without = "".join(f", {count} without {what}" for what, count in lacking.items() if count)
    summary = f"{store}: {kept} of {total} {unit}{again}{note}, streams {streams}{without}"
    return "\n".join([f"{summary}; {left_out}", *(f"WARNING: {notice}" for notice in notices)])
