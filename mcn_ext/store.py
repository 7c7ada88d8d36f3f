"""The HDF5 feature store: flat datasets and offsets, so that a clip is one hyperslab.

A store is one ``.h5`` file or a folder of ``shard-00000.h5 ...``. In each file::

    video/id (n,) str   <stream>/data (rows, dim) float16   caption/start, caption/end float32 s
                        <stream>/offset (n+1,) int64        caption/text str, caption/offset (n+1,)

A stream (``2d``, ``3d``, ``mel``) has one row per 1/rate_hz seconds; a video without it has no
rows. Root attributes: ``format`` "mcn-store", ``version`` 1, ``source``; stream attributes:
``rate_hz model weights_sha256 tool``.

``python -m mcn_ext.store FILE`` validates and describes one.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shutil
import sys
from bisect import bisect_right
from collections import OrderedDict
from pathlib import Path

import h5py
import numpy as np

VERSION = 1
N_MELS = 40
MAX_OPEN = 128  # files a process keeps open at a time
_NOT_STREAMS = {"video", "caption"}


class StoreError(ValueError):
    """A file that is not a store, or does not fit; the message names file, dataset and fix."""


class _Shard:
    """What of a file stays in memory: sizes and offsets, 8 bytes a video and stream."""

    def __init__(self, path: Path):
        with open_hdf5(path) as file:
            attrs = file.attrs
            if attrs.get("format") != "mcn-store":
                raise StoreError(f"{path}: root attribute 'format' is {attrs.get('format')!r}, not "
                                 "'mcn-store'; make a store with python -m mcn_ext.prepare")
            if attrs.get("version") != VERSION:
                raise StoreError(f"{path}: store version {attrs.get('version')}, this code reads "
                                 f"version {VERSION}; update mcn_ext or prepare the store again")
            try:
                names = sorted(name for name in file if name not in _NOT_STREAMS)
                self.dims = {name: file[f"{name}/data"].shape[1] for name in names}
                self.rates = {name: float(file[name].attrs["rate_hz"]) for name in names}
                self.rows = {name: len(file[f"{name}/data"]) for name in names}
                self.rows["caption"] = min(len(file[f"caption/{key}"])
                                           for key in ("start", "end", "text"))
                self.offsets = {name: file[f"{name}/offset"][:] for name in self.rows}
                self.n = len(file["video/id"])
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise StoreError(f"{path}: a dataset or attribute is missing or of another kind "
                                 f"({error}); prepare the store again") from error
            self.source = str(attrs.get("source", ""))
        if self.dims.get("mel", N_MELS) != N_MELS:
            raise StoreError(f"{path}: mel/data has {self.dims['mel']} columns, the audio encoder "
                             f"takes {N_MELS}; prepare it from {N_MELS}-band spectrograms")


def open_hdf5(path: Path) -> h5py.File:
    """A file to read; StoreError that tells a damaged one from too many open files."""
    try:
        return h5py.File(path, "r")
    except OSError as error:
        if error.errno == errno.EMFILE:
            raise StoreError(f"{path}: too many open files; raise the limit (ulimit -n)") from error
        raise StoreError(f"{path}: not a readable HDF5 file ({error}); prepare it again with "
                         "python -m mcn_ext.prepare") from error


class Store:
    """Read access to a store; each process opens files anew, so it may travel to loader workers.

    ``dims`` {stream: width}, ``rates`` {stream: Hz}, ``source`` str; ``len(store)`` is in videos.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not self.path.exists():
            raise StoreError(f"{self.path}: no such store; make one with python -m "
                             "mcn_ext.prepare, or check the path")
        self.files = sorted(self.path.glob("shard-*.h5")) if self.path.is_dir() else [self.path]
        if not self.files:
            raise StoreError(f"{self.path}: a folder without shard-*.h5 files is not a store")
        self.shards = [_Shard(file) for file in self.files]
        first = self.shards[0]
        self.dims, self.rates, self.source = first.dims, first.rates, first.source
        for file, shard in zip(self.files, self.shards, strict=True):
            if (shard.dims, shard.rates) != (self.dims, self.rates):
                raise StoreError(f"{file}: streams {shard.dims} at {shard.rates} Hz differ from "
                                 f"{self.files[0].name}'s {self.dims} at {self.rates} Hz; shards "
                                 "of one store must come from one prepare run")
        self._starts = np.cumsum([0] + [shard.n for shard in self.shards])
        self._caption_starts = np.cumsum([0] + [int(shard.offsets["caption"][-1])
                                                for shard in self.shards])
        self.n_captions = int(self._caption_starts[-1])
        self._handles: OrderedDict[int, dict] = OrderedDict()
        self._pid = os.getpid()

    def _data(self, number: int, path: str) -> h5py.Dataset:
        """A data set of a shard; MAX_OPEN files stay open, none is shared over a fork."""
        if self._pid != os.getpid():
            self._handles, self._pid = OrderedDict(), os.getpid()
        if number not in self._handles:
            if len(self._handles) >= MAX_OPEN:
                self._handles.popitem(last=False)[1][""].close()
            self._handles[number] = {"": open_hdf5(self.files[number])}
        self._handles.move_to_end(number)
        handle = self._handles[number]
        if path not in handle:  # looking a name up costs as much as reading a clip
            handle[path] = handle[""][path]
        return handle[path]

    def __getstate__(self):
        return self.__dict__ | {"_handles": OrderedDict(), "_pid": -1}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _at(self, video: int, stream: str) -> tuple[int, int, int]:
        """(shard, first row, last row + 1) of a video's rows of a stream, or of its captions."""
        number = bisect_right(self._starts, video) - 1
        i = video - int(self._starts[number])
        first, last = self.shards[number].offsets[stream][i:i + 2]
        return number, int(first), int(last)

    def ids(self) -> list[str]:
        return [name for number in range(len(self.files))
                for name in self._data(number, "video/id").asstr(errors="replace")[:]]

    def caption_counts(self) -> np.ndarray:
        """Captions of each video, (n,) int64."""
        return np.concatenate([np.diff(shard.offsets["caption"]) for shard in self.shards])

    def caption_times(self, video: int) -> tuple[int, np.ndarray, np.ndarray]:
        """(first caption's number in the store, start (n,) s, end (n,) s) of a video."""
        number, lo, hi = self._at(video, "caption")
        start, end = (self._data(number, f"caption/{key}")[lo:hi] for key in ("start", "end"))
        return int(self._caption_starts[number]) + lo, start, end

    def caption_texts(self, video: int) -> list[str]:
        number, lo, hi = self._at(video, "caption")
        return list(self._data(number, "caption/text").asstr(errors="replace")[lo:hi])

    def texts(self, block: int = 100_000):
        """All captions' texts, in order, ``block`` in memory at a time."""
        for number, shard in enumerate(self.shards):
            for lo in range(0, shard.rows["caption"], block):
                texts = self._data(number, "caption/text").asstr(errors="replace")
                yield from texts[lo:lo + block]

    def clips(self, video: int, stream: str, start: np.ndarray,
              end: np.ndarray) -> list[np.ndarray]:
        """Rows int(start * rate) : int(end * rate) + 1 of each clip (seconds), of those there are.

        Clips that lie close are read in one slab and cut in memory: a read costs more than the rows
        between.
        """
        number, lo, hi = self._at(video, stream)
        data, n, rate = self._data(number, f"{stream}/data"), hi - lo, self.rates[stream]
        first = np.clip((np.asarray(start, float) * rate).astype(np.int64), 0, n)
        last = np.clip((np.asarray(end, float) * rate).astype(np.int64) + 1, first, n)
        begin, stop = (int(first.min()), int(last.max())) if len(first) else (0, 0)
        if stop - begin <= 4 * int((last - first).sum()) + 64:
            slab = data[lo + begin:lo + stop]
            return [slab[a - begin:b - begin] for a, b in zip(first, last, strict=True)]
        return [data[lo + a:lo + b] for a, b in zip(first, last, strict=True)]


class StoreWriter:
    """Writes a store video by video; a killed run goes on after the last finished part.

    Rows are gathered in memory up to ``shard_mib``, then written to a part in one go: the part
    appears, complete, under its name (write, fsync, rename), or not at all. ``out`` ending in .h5
    becomes one file at the end (joined from the parts by streaming; needs the space twice for that
    moment), any other ``out`` is a folder of shards.

    Args:
        streams: {name: {"dim": int, "rate_hz": float, "model": str, "weights_sha256": str,
            "tool": str}}.
        source: what the data is, for people. settings: plain values a resumed run must share.
    """

    def __init__(self, out: str | os.PathLike, streams: dict[str, dict], source: str, *,
                 settings: dict | None = None, shard_mib: float = 512, overwrite: bool = False):
        self.out, self.streams, self.source, self.shard_bytes = (
            Path(out), streams, source, shard_mib * 2**20)
        single = self.out.suffix in (".h5", ".hdf5")
        self.folder = self.out.with_name(self.out.name + ".parts") if single else self.out
        self.settings = json.dumps({"source": source, "streams": streams, **(settings or {})},
                                   sort_keys=True)
        if single and self.out.exists() and not overwrite:
            raise StoreError(f"{self.out} exists; pass --overwrite to replace it, or another --out")
        ours = re.compile(r"(shard-\d{5,}\.h5|prepare\.json)(\.tmp)?")
        for path in self.folder.glob("*"):
            if not ours.fullmatch(path.name):
                raise StoreError(f"{self.folder} holds {path.name}, which is not part of a store; "
                                 "give --out a folder of its own")
        if overwrite:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.settings_file = self.folder / "prepare.json"
        if self.settings_file.exists():
            if self.settings_file.read_text() != self.settings:
                raise StoreError(
                    f"{self.folder} was begun from other inputs ({self.settings_file}); "
                    "pass --overwrite to start again, or another --out")
        else:
            _write_atomically(self.settings_file, lambda path: path.write_text(self.settings))
        for leftover in self.folder.glob("shard-*.tmp"):
            leftover.unlink()
        self.parts = sorted(self.folder.glob("shard-*.h5"))
        self.done: set[str] = set()
        for part in self.parts:
            with h5py.File(part, "r") as file:
                self.done.update(file["video/id"].asstr()[:])
        self.videos, self.bytes = [], 0  # (id, {stream: rows}, (start, end, text)) not yet written

    def add(self, name: str, rows: dict[str, np.ndarray | None], start, end, text) -> None:
        """One video: rows {stream: (n, dim) or None}, captions' start and end in seconds, texts."""
        if name in self.done:
            raise StoreError(f"video id {name!r} twice in {self.out}")
        arrays = {stream: np.empty((0, spec["dim"]), np.float16) if rows.get(stream) is None
                  else np.asarray(rows[stream], np.float16)
                  for stream, spec in self.streams.items()}
        for stream, array in arrays.items():
            if array.ndim != 2 or array.shape[1] != self.streams[stream]["dim"]:
                raise StoreError(f"{name}: stream {stream} has shape {array.shape}, "
                                 f"expected (rows, {self.streams[stream]['dim']})")
        # HDF5 strings hold neither NUL nor half a surrogate pair.
        text = [t.replace("\0", " ").encode("utf-8", "replace").decode() for t in text]
        self.done.add(name)
        self.videos.append((name, arrays, (start, end, text)))
        self.bytes += sum(a.nbytes for a in arrays.values())
        if self.bytes >= self.shard_bytes:
            self._flush()

    def _flush(self) -> None:
        if not self.videos:
            return
        path = self.folder / f"shard-{len(self.parts):05d}.h5"
        rows = {s: sum(len(arrays[s]) for _, arrays, _ in self.videos) for s in self.streams}

        def write(tmp: Path) -> None:
            with self._create(tmp, [v[0] for v in self.videos], rows,
                              sum(len(c[2]) for _, _, c in self.videos)) as file:
                for stream in self.streams:
                    _fill(file, stream, [arrays[stream] for _, arrays, _ in self.videos])
                captions = [c for _, _, c in self.videos]
                file["caption/offset"][:] = np.cumsum([0] + [len(c[2]) for c in captions])
                for k, key in enumerate(("start", "end", "text")):
                    values = [value for c in captions for value in c[k]]
                    if values:
                        file[f"caption/{key}"][:] = values

        _write_atomically(path, write)
        self.parts.append(path)
        self.videos, self.bytes = [], 0  # (id, {stream: rows}, (start, end, text)) not yet written

    def _create(self, path: Path, ids: list[str], rows: dict[str, int],
                n_captions: int) -> h5py.File:
        file = h5py.File(path, "w")
        file.attrs.update(format="mcn-store", version=VERSION, source=self.source)
        string = h5py.string_dtype("utf-8")
        file.create_dataset("video/id", data=ids, dtype=string)
        for name, spec in self.streams.items():
            file.create_dataset(f"{name}/data", (rows[name], spec["dim"]), np.float16)
            file.create_dataset(f"{name}/offset", (len(ids) + 1,), np.int64)
            file[name].attrs.update(
                {key: spec.get(key, "unknown") for key in ("model", "weights_sha256", "tool")},
                rate_hz=spec["rate_hz"])
        file.create_dataset("caption/offset", (len(ids) + 1,), np.int64)
        for key, dtype in (("start", np.float32), ("end", np.float32), ("text", string)):
            file.create_dataset(f"caption/{key}", (n_captions,), dtype)
        return file

    def close(self) -> Path:
        """Write what is left, join the parts if one file was asked for; returns the path."""
        self._flush()
        if not self.parts:
            self.settings_file.unlink()  # nothing that a corrected run would have to agree with
            raise StoreError(f"{self.out}: no usable video, nothing written")
        if self.folder == self.out:
            return self.out
        if len(self.parts) == 1:
            os.replace(self.parts[0], self.out)
        else:
            _write_atomically(self.out, self._join)
        shutil.rmtree(self.folder)
        return self.out

    def _join(self, tmp: Path) -> None:
        shards = [_Shard(part) for part in self.parts]
        ids = []
        for part in self.parts:  # one open at a time: there may be more than a process may open
            with h5py.File(part, "r") as file:
                ids += file["video/id"].asstr()[:].tolist()
        rows = {name: sum(shard.rows[name] for shard in shards) for name in shards[0].rows}
        with self._create(tmp, ids, rows, rows["caption"]) as out:
            position = dict.fromkeys(rows, 0)
            for part, shard in zip(self.parts, shards, strict=True):
                with h5py.File(part, "r") as file:
                    for group, n in shard.rows.items():
                        for key in ("start", "end", "text") if group == "caption" else ("data",):
                            for lo in range(0, n, 65536):
                                block = file[f"{group}/{key}"][lo:min(lo + 65536, n)]
                                begin = position[group] + lo
                                out[f"{group}/{key}"][begin:begin + len(block)] = block
                        position[group] += n
            for group in rows:
                steps = [np.diff(shard.offsets[group]) for shard in shards]
                out[f"{group}/offset"][:] = np.cumsum(np.concatenate([[0], *steps]))


def _fill(file: h5py.File, stream: str, arrays: list[np.ndarray]) -> None:
    file[f"{stream}/offset"][:] = np.cumsum([0] + [len(a) for a in arrays])
    position = 0
    for array in arrays:
        if len(array):
            file[f"{stream}/data"][position:position + len(array)] = array
        position += len(array)


def _write_atomically(path: Path, write) -> None:
    """Call write(temporary path), then put the result, complete and on disk, under its name."""
    tmp = path.with_name(path.name + ".tmp")
    write(tmp)
    with open(tmp, "rb") as file:
        os.fsync(file.fileno())
    os.replace(tmp, path)


def validate(path: str | os.PathLike, *, check_rows: bool = True) -> dict:
    """Check a store from end to end and describe it; StoreError with the first thing wrong.

    check_rows reads every row and refuses values that are not finite.
    """
    store = Store(path)
    info = {"path": str(path), "source": store.source, "videos": len(store),
            "captions": store.n_captions, "streams": {}}
    ids = store.ids()
    if len(set(ids)) != len(ids):
        raise StoreError(f"{path}: video/id has {len(ids) - len(set(ids))} duplicates")
    for name, dim in store.dims.items():
        info["streams"][name] = {"dim": dim, "rate_hz": store.rates[name], "rows": 0,
                                 "videos_without": 0}
    for number, (file, shard) in enumerate(zip(store.files, store.shards, strict=True)):
        for name, offset in shard.offsets.items():
            n = shard.rows[name]
            if (len(offset) != shard.n + 1 or offset[0] != 0 or (np.diff(offset) < 0).any()
                    or offset[-1] != n):
                raise StoreError(f"{file}: {name}/offset does not run from 0 to its {n} rows in "
                                 f"{shard.n} steps")
        for name in store.dims:
            empty = np.diff(shard.offsets[name]) == 0
            info["streams"][name]["rows"] += shard.rows[name]
            info["streams"][name]["videos_without"] += int(empty.sum())
            data = store._data(number, f"{name}/data")
            for lo in range(0, len(data) if check_rows else 0, 65536):
                if not np.isfinite(data[lo:lo + 65536]).all():
                    raise StoreError(f"{file}: {name}/data has values that are not finite in rows "
                                     f"from {lo}")
    return info


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mcn_ext.store",
                                     description="Validate and describe a store.")
    parser.add_argument("path", help="a .h5 store or a folder of shards")
    parser.add_argument("--quick", action="store_true",
                        help="check the layout only, do not read every row")
    args = parser.parse_args(argv)
    try:
        info = validate(args.path, check_rows=not args.quick)
    except StoreError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{info['path']}: valid mcn-store version {VERSION}, {info['source']}")
    print(f"  {info['videos']} videos, {info['captions']} captions")
    for name, s in info["streams"].items():
        print(f"  {name:4s} {s['rows']} rows x {s['dim']}, {s['rate_hz']:g} per second, "
              f"{s['videos_without']} videos without")
    return 0


if __name__ == "__main__":
    sys.exit(main())
