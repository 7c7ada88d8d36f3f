"""From the field's own files to stores: ``python -m mcn_ext.prepare KIND ...``."""

from __future__ import annotations

import csv
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


class Skipped(ValueError):
    """An item that cannot be used; says which file and why. The run goes on without it."""


class SkipList:
    """Items left out, for the summary and, at the end, in ``<out>.skipped.csv``."""

    def __init__(self, out: Path):
        self.path = out.with_name(out.name + ".skipped.csv")
        self.rows: list[tuple[str, str]] = []

    def add(self, name: str, reason: str) -> None:
        self.rows.append((name, reason))

    def close(self) -> str:
        """Write the list (or remove an old one if nothing was left out); a sentence for people."""
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
    finally:  # who leaves early does not wait for what has not begun
        pool.shutdown(cancel_futures=True)


def finish(
    writer,
    skips: SkipList,
    total: int,
    streams: dict[str, int],
    *,
    unit: str = "videos",
    resumed: int = 0,
    without: dict[str, int] | None = None,
    note: str = "",
) -> str:
    """Close the list of what was left out, then the store; the summary that is printed.

    streams: {name: width}. resumed: items from an earlier run. without: {what: how many items of
    this run lack it}. note: what else people must know. StoreError if nothing was kept, after
    the reasons are printed.
    """
    kept, sentence = len(writer.done), skips.close()
    if not kept:
        print(sentence)
    store = writer.close()
    again = f" ({resumed} from an earlier, interrupted run)" if resumed else ""
    lacking = "".join(
        f", {count} without {what}" for what, count in (without or {}).items() if count
    )
    widths = ", ".join(f"{name} {dim}" for name, dim in streams.items())
    return f"{store}: {kept} of {total} {unit}{again}{note}, streams {widths}{lacking}; {sentence}"
