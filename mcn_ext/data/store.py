"""The HDF5 feature store: flat datasets and offsets, so that a clip is one read.

A store is one ``.h5`` file or a folder of ``shard-00000.h5 ...``. In each file::

    video/id (n,) str   <stream>/data (rows, dim) float16   caption/start, caption/end float32 s
                        <stream>/offset (n+1,) int64        caption/text str, caption/offset (n+1,)

A stream (``2d``, ``3d``, ``mel``) has one row per 1/rate_hz seconds; a video without it has no
rows. Root attributes: ``format`` "mcn-store", ``version`` 1, ``source``; stream attributes:
``rate_hz model weights_sha256 tool``. Each dataset has ``crc32`` of its values (uint32).

``python -m mcn_ext.store FILE`` validates and describes one.
"""

from __future__ import annotations

import argparse
import os
import sys
from bisect import bisect_right
from collections import OrderedDict
from pathlib import Path

import h5py
import numpy as np

from mcn_ext.data.store_file import (
    N_MELS,
    TEXTS,
    VERSION,
    Rows,
    Shard,
    StoreError,
    blocks_of,
    check_seal,
    checksum,
    open_all,
    open_hdf5,
)
from mcn_ext.data.store_writer import StoreWriter

__all__ = ["N_MELS", "Store", "StoreError", "StoreWriter", "main", "validate"]
MAX_OPEN = 128  # files a process keeps open at a time
GAP_BYTES = 2**15  # copying so much takes as long as a read of its own


class Store:
    """Read access to a store; each process opens files anew, so it may travel to loader workers.

    ``dims`` {stream: width}, ``rates`` {stream: Hz}, ``source`` str; ``len(store)`` is in videos.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not self.path.exists():
            raise StoreError(
                f"{self.path}: no such store; make one with python -m "
                "mcn_ext.prepare, or check the path"
            )
        self.files = sorted(self.path.glob("shard-*.h5")) if self.path.is_dir() else [self.path]
        if not self.files:
            raise StoreError(f"{self.path}: a folder without shard-*.h5 files is not a store")
        self.shards = open_all(self.files)
        first = self.shards[0]
        self.dims, self.rates, self.source = first.dims, first.rates, first.source
        for file, shard in zip(self.files, self.shards, strict=True):
            if (shard.dims, shard.rates) != (self.dims, self.rates):
                raise StoreError(
                    f"{file}: streams {shard.dims} at {shard.rates} Hz differ from "
                    f"{self.files[0].name}'s {self.dims} at {self.rates} Hz; shards "
                    "of one store must come from one prepare run"
                )
        self._starts = np.cumsum([0] + [shard.n for shard in self.shards])
        self._caption_starts = np.cumsum(
            [0] + [int(shard.offsets["caption"][-1]) for shard in self.shards]
        )
        self.n_captions = int(self._caption_starts[-1])
        self._handles: OrderedDict[int, dict] = OrderedDict()
        self._pid = os.getpid()

    def _file(self, number: int) -> dict:
        """Datasets of a shard by name; MAX_OPEN files stay open, none is shared over a fork."""
        if self._pid != os.getpid():
            self._handles, self._pid = OrderedDict(), os.getpid()
        if number not in self._handles:
            if len(self._handles) >= MAX_OPEN:
                self._handles.popitem(last=False)[1][""].close()
            self._handles[number] = {"": open_hdf5(self.files[number])}
        self._handles.move_to_end(number)
        return self._handles[number]

    def _read(
        self, number: int, path: str, lo: int, hi: int, into: np.ndarray | None = None
    ) -> np.ndarray:
        """Rows lo to hi of a dataset of a shard, str where it holds texts; ``into``: as Rows."""
        try:
            handle = self._file(number)
            if path not in handle:  # looking a name up costs as much as reading a clip
                data = handle[""][path]
                handle[path] = data.asstr(errors="replace") if path in TEXTS else Rows.of(data)
            data = handle[path]
            rows = (
                data[lo:hi] if into is None or type(data) is not Rows else data.read(lo, hi, into)
            )
        except StoreError:
            raise
        except Exception as error:  # h5py passes on what libhdf5 says as a dozen types
            raise StoreError(
                f"{self.files[number]}: {path}: rows {lo} to {hi} cannot be read "
                f"({error}); check it with python -m mcn_ext.store"
            ) from error
        if len(rows) != hi - lo:
            raise StoreError(
                f"{self.files[number]}: {path}: shorter than when it was opened; was "
                "it replaced? start again"
            )
        return rows

    def __getstate__(self):
        return self.__dict__ | {"_handles": OrderedDict(), "_pid": -1}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _at(self, video: int, stream: str) -> tuple[int, int, int]:
        """(shard, first row, last row + 1) of a video's rows of a stream, or of its captions."""
        number = bisect_right(self._starts, video) - 1
        i = video - int(self._starts[number])
        first, last = self.shards[number].offsets[stream][i : i + 2]
        return number, int(first), int(last)

    def seconds(self, video: int) -> float:
        """Length of a video, by the stream that goes on longest."""
        spans = [(self._at(video, name), rate) for name, rate in self.rates.items()]
        return max((last - first) / rate for (_, first, last), rate in spans)

    def ids(self) -> list[str]:
        return [
            name
            for number, shard in enumerate(self.shards)
            for name in self._read(number, "video/id", 0, shard.n)
        ]

    def caption_counts(self) -> np.ndarray:
        """Captions of each video, (n,) int64."""
        return self.row_counts("caption")

    def row_counts(self, stream: str) -> np.ndarray:
        """Rows of a stream of each video, (n,) int64."""
        return np.concatenate([np.diff(shard.offsets[stream]) for shard in self.shards])

    def caption_times(self, video: int) -> tuple[int, np.ndarray, np.ndarray]:
        """(first caption's number in the store, start (n,) s, end (n,) s) of a video."""
        number, lo, hi = self._at(video, "caption")
        start, end = (self._read(number, f"caption/{key}", lo, hi) for key in ("start", "end"))
        if not ((start >= 0) & (start <= end) & (end < np.inf)).all():  # nor where they are NaN
            raise self.shards[number].error(
                "caption/start and end",
                f"video {video} of the store has captions without 0 <= start <= end",
            )
        return int(self._caption_starts[number]) + lo, start, end

    def caption_texts(self, video: int) -> list[str]:
        number, lo, hi = self._at(video, "caption")
        return list(self._read(number, "caption/text", lo, hi))

    def texts(self, block: int = 100_000):
        """All captions' texts, in order, ``block`` in memory at a time."""
        for number, shard in enumerate(self.shards):
            for lo in range(0, shard.rows["caption"], block):
                yield from self._read(
                    number, "caption/text", lo, min(lo + block, shard.rows["caption"])
                )

    def clips(
        self,
        video: int,
        stream: str,
        start: np.ndarray,
        end: np.ndarray,
        into: np.ndarray | None = None,
    ) -> list[np.ndarray]:
        """Rows int(start * rate) : int(end * rate) + 1 of each clip (seconds), of those there are.

        Clips that lie close are read in one slab and cut in memory, and share it: a read costs more
        than the rows between. ``into`` (bytes,) uint8: where to put the slab, if it fits; a caller
        that has done with the clips may use it again, which spares the system finding memory.
        """
        number, lo, hi = self._at(video, stream)
        path, n, rate = f"{stream}/data", hi - lo, self.rates[stream]
        first = np.clip((np.asarray(start, float) * rate).astype(np.int64), 0, n)
        last = np.clip((np.asarray(end, float) * rate).astype(np.int64) + 1, first, n)
        begin, stop = (int(first.min()), int(last.max())) if len(first) else (0, 0)
        between = stop - begin - int((last - first).sum())  # below 0 where clips overlap
        if between * 2 * self.dims[stream] <= len(first) * GAP_BYTES:
            slab = self._read(number, path, lo + begin, lo + stop, into)
            return [slab[a - begin : b - begin] for a, b in zip(first, last, strict=True)]
        return [self._read(number, path, lo + a, lo + b) for a, b in zip(first, last, strict=True)]


def validate(path: str | os.PathLike, *, check_rows: bool = True) -> dict:
    """Check a store from end to end and describe it; StoreError with the first thing wrong.

    check_rows reads every byte: checksums, values that are not finite, captions without a time,
    ids twice. ``checksums`` of the result tells whether there were any: older stores have none.
    """
    store = Store(path)
    info = {
        "path": str(path),
        "source": store.source,
        "videos": len(store),
        "captions": store.n_captions,
        "checksums": True,
        "streams": {},
    }
    for name, dim in store.dims.items():
        empty = [np.diff(shard.offsets[name]) == 0 for shard in store.shards]
        info["streams"][name] = {
            "dim": dim,
            "rate_hz": store.rates[name],
            "rows": sum(shard.rows[name] for shard in store.shards),
            "videos_without": int(sum(e.sum() for e in empty)),
        }
    ids: set[str] = set()
    for shard in store.shards if check_rows else ():
        try:
            if shard.sealed:
                check_seal(shard.path, whole=True)
            with open_hdf5(shard.path) as file:
                checked = [_check_dataset(shard, file, name) for name in shard.paths]
                new = file["video/id"].asstr(errors="replace")[:]
                ids.update(new)
        except StoreError:
            raise
        except Exception as error:  # h5py passes on what libhdf5 says as a dozen types
            raise StoreError(
                f"{shard.path}: cannot be read to its end ({error}); copy it again or "
                "prepare it again"
            ) from error
        if any(checked) != all(checked) or any(checked) != shard.sealed:
            raise StoreError(
                f"{shard.path}: seal and crc32 on some datasets only; prepare it again"
            )
        info["checksums"] &= shard.sealed
    if check_rows and len(ids) != len(store):
        raise StoreError(f"{path}: video/id has {len(store) - len(ids)} duplicates")
    return info


def _check_dataset(shard: Shard, file: h5py.File, name: str) -> bool:
    """Read a dataset to its end; whether it has a checksum."""
    if name in TEXTS:
        shard.check_lengths(file, name)
    data, crc, row = file[name], 0, 0
    wanted = data.attrs.get("crc32")
    for block in blocks_of(data):
        crc = checksum(block, crc) if wanted is not None else 0
        if name not in TEXTS and not np.isfinite(block).all():
            raise StoreError(
                f"{shard.path}: {name} has values that are not finite in rows from {row}"
            )
        if (
            name == "caption/start"
            and not ((block >= 0) & (block <= file["caption/end"][row : row + len(block)])).all()
        ):
            raise shard.error(name, f"not 0 <= start <= end in rows from {row}")
        row += len(block)
    if wanted is not None and crc != wanted:
        raise StoreError(
            f"{shard.path}: {name}: the values' checksum is {crc}, {wanted} was "
            "written: damaged, or edited since; copy it again or prepare it again"
        )
    return wanted is not None


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mcn_ext.store", description="Validate and describe a store."
    )
    parser.add_argument("path", help="a .h5 store or a folder of shards")
    parser.add_argument(
        "--quick", action="store_true", help="check the layout only, do not read every row"
    )
    args = parser.parse_args(argv)
    try:
        info = validate(args.path, check_rows=not args.quick)
    except StoreError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{info['path']}: valid mcn-store version {VERSION}, {info['source']}")
    print(f"  {info['videos']} videos, {info['captions']} captions")
    if not args.quick:
        print(
            "  checksums agree"
            if info["checksums"]
            else "  no checksums (an older store): damage to values cannot be told; prepare it "
            "again to have them"
        )
    for name, s in info["streams"].items():
        print(
            f"  {name:4s} {s['rows']} rows x {s['dim']}, {s['rate_hz']:g} per second, "
            f"{s['videos_without']} videos without"
        )
    return 0
