"""Converts files as the field has them to stores: ``python -m mcn_ext.prepare KIND ...``."""

from __future__ import annotations

import csv
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm


class Skipped(ValueError):
    """An item that cannot be used; says which file and why. The run goes on without it."""


class SkipList:
    """Items that were left out, for the summary and for ``<out>.skipped.csv``."""

    def __init__(self, out: Path):
        self.path = out.with_name(out.name + ".skipped.csv")
        self.rows: list[tuple[str, str]] = []

    def add(self, name: str, reason: object) -> None:
        self.rows.append((name, str(reason)))

    def close(self) -> str:
        """Write the list, or remove an old one if nothing was left out; returns a summary."""
        if not self.rows:
            self.path.unlink(missing_ok=True)
            return "none skipped"
        tmp = self.path.with_name(self.path.name + ".tmp")
        with open(tmp, "w", newline="") as file:
            csv.writer(file).writerows([("id", "reason"), *self.rows])
        os.replace(tmp, self.path)
        examples = "; ".join(f"{name}: {reason}" for name, reason in self.rows[:3])
        more = " ..." if len(self.rows) > 3 else ""
        return f"{len(self.rows)} skipped, listed in {self.path} ({examples}{more})"


def require(flag: str, path: Path) -> None:
    """SystemExit if the file or folder of a flag is not there."""
    if not path.exists():
        raise SystemExit(f"{flag} {path}: no such file or folder")


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
    (start, end, text) of the captions); it runs in ``workers`` threads and raises Skipped.
    HDF5 is written by this thread alone. StoreError if no item could be used.
    """
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
        lacking["captions (training passes over them; give --captions)"] += not captions[0]
        writer.add(name, rows, *captions)
    kept, skipped = len(writer.done), skips.close()
    if kept:
        before_close()
    else:
        print(skipped)
    store = writer.close()
    again = f" ({resumed} from an earlier, interrupted run)" if resumed else ""
    streams = ", ".join(f"{name} {spec['dim']}" for name, spec in writer.streams.items())
    without = "".join(f", {count} without {what}" for what, count in lacking.items() if count)
    return f"{store}: {kept} of {total} {unit}{again}{note}, streams {streams}{without}; {skipped}"
