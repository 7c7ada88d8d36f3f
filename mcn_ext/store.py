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
import json
import os
import shutil
import sys
from bisect import bisect_right
from pathlib import Path

import h5py
import numpy as np

VERSION = 1
N_MELS = 40
_NOT_STREAMS = {"video", "caption"}


class StoreError(ValueError):
    """A file that is not a store, or does not fit; the message names file, dataset and fix."""


def stream_names(file: h5py.File) -> list[str]:
    return sorted(name for name in file if name not in _NOT_STREAMS)


class _Shard:
    """One open file: offsets in memory (8 bytes a video and stream), rows on disk."""

    def __init__(self, path: Path):
        try:
            self.file = h5py.File(path, "r")
        except OSError as error:
            raise StoreError(f"{path}: not a readable HDF5 file ({error}); prepare it again with "
                             "python -m mcn_ext.prepare") from error
        attrs = self.file.attrs
        if attrs.get("format") != "mcn-store":
            raise StoreError(
                f"{path}: root attribute 'format' is {attrs.get('format')!r}, not 'mcn-store'; "
                "make a store with python -m mcn_ext.prepare")
        if attrs.get("version") != VERSION:
            raise StoreError(
                f"{path}: store version {attrs.get('version')}, this code reads version {VERSION}; "
                "update mcn_ext or prepare the store again")
        try:
            self.n = len(self.file["video/id"])
            self.caption_offset = self.file["caption/offset"][:]
            self.streams = {name: (self.file[f"{name}/data"], self.file[f"{name}/offset"][:])
                            for name in stream_names(self.file)}
        except KeyError as error:
            raise StoreError(
                f"{path}: a dataset is missing ({error}); prepare the store again") from error


class Store:
    """Read access to a store; each process opens it anew, so it may travel to loader workers.

    ``dims`` {stream: width}, ``rates`` {stream: Hz}, ``source`` str; ``len(store)`` is in videos.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not self.path.exists():
            raise StoreError(
                f"{self.path}: no such store; make one with python -m mcn_ext.prepare, "
                "or check the path")
        self.files = sorted(self.path.glob("shard-*.h5")) if self.path.is_dir() else [self.path]
        if not self.files:
            raise StoreError(f"{self.path}: a folder without shard-*.h5 files is not a store")
        self._shards: list[_Shard] = []
        self._pid = -1
        shards = self._open()
        first = shards[0]
        self.dims = {name: data.shape[1] for name, (data, _) in first.streams.items()}
        self.rates = {name: float(first.file[name].attrs["rate_hz"]) for name in first.streams}
        self.source = str(first.file.attrs.get("source", ""))
        for path_i, shard in zip(self.files, shards, strict=True):
            dims = {name: data.shape[1] for name, (data, _) in shard.streams.items()}
            if dims != self.dims:
                raise StoreError(
                    f"{path_i}: streams {dims} differ from {self.files[0].name}'s {self.dims}; "
                    "shards of one store must come from one prepare run")
        self._starts = np.cumsum([0] + [shard.n for shard in shards])
        self._caption_starts = np.cumsum([0] + [int(shard.caption_offset[-1]) for shard in shards])
        self.n_captions = int(self._caption_starts[-1])

    def _open(self) -> list[_Shard]:
        if self._pid != os.getpid():  # HDF5 handles must not be shared over a fork
            self._shards = [_Shard(path) for path in self.files]
            self._pid = os.getpid()
        return self._shards

    def __getstate__(self):
        return self.__dict__ | {"_shards": [], "_pid": -1}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _at(self, video: int) -> tuple[_Shard, int, int]:
        shard = bisect_right(self._starts, video) - 1
        return self._open()[shard], video - int(self._starts[shard]), shard

    def id(self, video: int) -> str:
        shard, i, _ = self._at(video)
        return shard.file["video/id"].asstr()[i]

    def ids(self) -> list[str]:
        return [name for shard in self._open() for name in shard.file["video/id"].asstr()[:]]

    def n_captions_of(self, video: int) -> int:
        shard, i, _ = self._at(video)
        return int(shard.caption_offset[i + 1] - shard.caption_offset[i])

    def captions(self, video: int) -> tuple[int, np.ndarray, np.ndarray, list[str]]:
        """(first caption's number in the store, start (n,) s, end (n,) s, n texts) of a video."""
        shard, i, number = self._at(video)
        lo, hi = (int(o) for o in shard.caption_offset[i:i + 2])
        group = shard.file["caption"]
        return (int(self._caption_starts[number]) + lo, group["start"][lo:hi], group["end"][lo:hi],
                list(group["text"].asstr(errors="replace")[lo:hi]))

    def texts(self, block: int = 100_000):
        """All captions' texts, in order, ``block`` in memory at a time."""
        for shard in self._open():
            texts = shard.file["caption/text"].asstr(errors="replace")
            for lo in range(0, len(shard.file["caption/text"]), block):
                yield from texts[lo:lo + block]

    def clips(self, video: int, stream: str, start: np.ndarray,
              end: np.ndarray) -> list[np.ndarray]:
        """Rows int(start * rate) : int(end * rate) + 1 of each clip (seconds), of those there are.

        Clips that lie close are read in one slab and cut in memory: a read costs more than the rows
        between.
        """
        shard, i, _ = self._at(video)
        data, offset = shard.streams[stream]
        lo, n = int(offset[i]), int(offset[i + 1] - offset[i])
        rate = self.rates[stream]
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
        if overwrite:
            shutil.rmtree(self.folder, ignore_errors=True)
        if single and self.out.exists() and not overwrite:
            raise StoreError(f"{self.out} exists; pass --overwrite to replace it, or another --out")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.settings_file = self.folder / "prepare.json"
        if self.settings_file.exists():
            if self.settings_file.read_text() != self.settings:
                raise StoreError(
                    f"{self.folder} was begun from other inputs ({self.settings_file}); "
                    "pass --overwrite to start again, or another --out")
        else:
            _write_atomically(self.settings_file, lambda path: path.write_text(self.settings))
        for leftover in self.folder.glob("*.tmp"):
            leftover.unlink()
        self.parts = sorted(self.folder.glob("shard-*.h5"))
        self.done: set[str] = set()
        for part in self.parts:
            with h5py.File(part, "r") as file:
                self.done.update(file["video/id"].asstr()[:])
        self._clear()

    def _clear(self) -> None:
        self.videos: list[tuple[str, dict[str, np.ndarray], tuple]] = []
        self.bytes = 0

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
        self._clear()

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
        files = [h5py.File(part, "r") for part in self.parts]
        rows = {s: sum(len(f[f"{s}/data"]) for f in files) for s in self.streams}
        ids = [name for f in files for name in f["video/id"].asstr()[:]]
        with self._create(tmp, ids, rows, sum(len(f["caption/text"]) for f in files)) as out:
            for group in [*self.streams, "caption"]:
                keys = ("data",) if group != "caption" else ("start", "end", "text")
                position, offsets = 0, [np.zeros(1, np.int64)]
                for f in files:
                    offsets.append(f[f"{group}/offset"][1:] + offsets[-1][-1])
                    n = len(f[f"{group}/{keys[0]}"])
                    for key in keys:
                        for lo in range(0, n, 65536):
                            hi = min(lo + 65536, n)
                            out[f"{group}/{key}"][position + lo:position + hi] = (
                                f[f"{group}/{key}"][lo:hi])
                    position += n
                out[f"{group}/offset"][:] = np.concatenate(offsets)
        for f in files:
            f.close()


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
    for file, shard in zip(store.files, store._open(), strict=True):
        offsets = {name: (offset, len(data)) for name, (data, offset) in shard.streams.items()}
        offsets["caption"] = (shard.caption_offset, len(shard.file["caption/text"]))
        for name, (offset, n) in offsets.items():
            if (len(offset) != shard.n + 1 or offset[0] != 0 or (np.diff(offset) < 0).any()
                    or offset[-1] != n):
                raise StoreError(
                    f"{file}: {name}/offset does not run from 0 to its {n} rows in {shard.n} steps")
        for name, (data, offset) in shard.streams.items():
            info["streams"][name]["rows"] += len(data)
            info["streams"][name]["videos_without"] += int((np.diff(offset) == 0).sum())
            for lo in range(0, len(data) if check_rows else 0, 65536):
                if not np.isfinite(data[lo:lo + 65536]).all():
                    raise StoreError(
                        f"{file}: {name}/data has values that are not finite in rows from {lo}")
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
