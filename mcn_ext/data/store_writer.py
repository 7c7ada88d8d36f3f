"""Writes stores: gathered in memory, part by part, each part complete or not there."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import h5py
import numpy as np

from mcn_ext.data.store_file import (
    SEAL_BYTES,
    TEXTS,
    VERSION,
    Shard,
    StoreError,
    blocks_of,
    checksum,
    open_all,
    open_hdf5,
    seal,
)


def mend(text: str) -> str:
    """A text as HDF5 can hold it: without NUL and without half a surrogate pair."""
    return text.replace("\0", " ").encode("utf-8", "replace").decode()


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

    def __init__(
        self,
        out: str | os.PathLike,
        streams: dict[str, dict],
        source: str,
        *,
        settings: dict | None = None,
        shard_mib: float = 512,
        overwrite: bool = False,
    ):
        self.out, self.streams, self.source, self.shard_bytes = (
            Path(out),
            streams,
            source,
            shard_mib * 2**20,
        )
        single = self.out.suffix in (".h5", ".hdf5")
        self.folder = self.out.with_name(self.out.name + ".parts") if single else self.out
        self.settings = json.dumps(
            {"source": source, "streams": streams, **(settings or {})}, sort_keys=True
        )
        if single and self.out.exists() and not overwrite:
            raise StoreError(f"{self.out} exists; pass --overwrite to replace it, or another --out")
        ours = re.compile(r"(shard-\d{5,}\.h5|prepare\.json)(\.tmp)?")
        for path in self.folder.glob("*"):
            if not ours.fullmatch(path.name):
                raise StoreError(
                    f"{self.folder} holds {path.name}, which is not part of a store; "
                    "give --out a folder of its own"
                )
        if overwrite:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.settings_file = self.folder / "prepare.json"
        if self.settings_file.exists():
            if self.settings_file.read_bytes() != self.settings.encode():
                raise StoreError(
                    f"{self.folder} was begun from other inputs ({self.settings_file}); "
                    "pass --overwrite to start again, or another --out"
                )
        else:
            _write_atomically(self.settings_file, lambda path: path.write_text(self.settings))
        for leftover in self.folder.glob("shard-*.tmp"):
            leftover.unlink()
        self.parts = sorted(self.folder.glob("shard-*.h5"))
        self.done: set[str] = set()
        open_all(self.parts)
        for part in self.parts:
            with open_hdf5(part) as file:
                self.done.update(file["video/id"].asstr()[:])
        self.videos, self.bytes = [], 0  # (id, {stream: rows}, (start, end, text)) not yet written

    def add(self, name: str, rows: dict[str, np.ndarray | None], start, end, text) -> None:
        """One video: rows {stream: (n, dim) or None}, captions' start and end in seconds, texts.

        StoreError for an id that was there, rows of another width, captions without a time.
        """
        name = mend(name)
        if name in self.done:
            raise StoreError(f"video id {name!r} twice in {self.out}")
        arrays = {
            stream: np.empty((0, spec["dim"]), np.float16)
            if rows.get(stream) is None
            else np.asarray(rows[stream], np.float16)
            for stream, spec in self.streams.items()
        }
        for stream, array in arrays.items():
            if array.ndim != 2 or array.shape[1] != self.streams[stream]["dim"]:
                raise StoreError(
                    f"{name}: stream {stream} has shape {array.shape}, "
                    f"expected (rows, {self.streams[stream]['dim']})"
                )
        start, end = (np.asarray(times, np.float32) for times in (start, end))
        if (
            not len(start) == len(end) == len(text)
            or not ((0 <= start) & (start <= end) & (end < np.inf)).all()
        ):
            raise StoreError(f"{name}: captions need as many texts as times, 0 <= start <= end s")
        text = [mend(t) for t in text]
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
            names, videos, captions = zip(*self.videos, strict=True)
            blocks = {
                "video/id": [list(names)],
                "caption/offset": [np.cumsum([0] + [len(c[2]) for c in captions])],
            }
            for stream in self.streams:
                blocks[f"{stream}/data"] = [arrays[stream] for arrays in videos]
                blocks[f"{stream}/offset"] = [np.cumsum([0] + [len(v[stream]) for v in videos])]
            for k, key in enumerate(("start", "end", "text")):
                blocks[f"caption/{key}"] = [[value for c in captions for value in c[k]]]
            self._write(tmp, len(names), rows, sum(len(c[2]) for c in captions), blocks)

        _write_atomically(path, write)
        self.parts.append(path)
        self.videos, self.bytes = [], 0

    def _write(
        self, path: Path, n: int, rows: dict[str, int], n_captions: int, blocks: dict[str, Iterable]
    ) -> None:
        """A sealed file of n videos from the blocks of each dataset."""
        text = h5py.string_dtype("utf-8")
        with h5py.File(
            path, "w", libver=("v110", "v110"), userblock_size=SEAL_BYTES, locking=False
        ) as file:
            file.attrs.update(format="mcn-store", version=VERSION, source=mend(self.source))

            def create(name: str, shape: tuple[int, ...], dtype) -> None:
                file.create_dataset(name, shape, dtype).attrs["crc32"] = np.uint32(0)

            create("video/id", (n,), text)
            for name, spec in self.streams.items():
                create(f"{name}/data", (rows[name], spec["dim"]), np.float16)
                create(f"{name}/offset", (n + 1,), np.int64)
                file[name].attrs.update(
                    {key: spec.get(key, "unknown") for key in ("model", "weights_sha256", "tool")},
                    rate_hz=spec["rate_hz"],
                )
            create("caption/offset", (n + 1,), np.int64)
            for key, dtype in (("start", np.float32), ("end", np.float32), ("text", text)):
                create(f"caption/{key}", (n_captions,), dtype)
            # Texts come last, so that what a reader must check before it opens the file is small.
            for name in sorted(blocks, key="caption/text".__eq__):
                _fill(file, name, blocks[name])
        seal(path)

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
            _sync(self.out.parent)
        else:
            _write_atomically(self.out, self._join)
        shutil.rmtree(self.folder)
        return self.out

    def _join(self, tmp: Path) -> None:
        shards = [Shard(part) for part in self.parts]
        rows = {name: sum(shard.rows[name] for shard in shards) for name in shards[0].rows}
        blocks = {path: _stream(shards, path) for path in shards[0].paths}
        for group in rows:
            steps = [np.diff(shard.offsets[group]) for shard in shards]
            blocks[f"{group}/offset"] = [np.cumsum(np.concatenate([[0], *steps]))]
        self._write(tmp, sum(shard.n for shard in shards), rows, rows["caption"], blocks)


def _stream(shards: list[Shard], path: str) -> Iterator:
    """Blocks of a dataset of all parts, one open at a time; StoreError for one that changed."""
    for shard in shards:
        with open_hdf5(shard.path) as file:
            data, crc = file[path], 0
            for block in blocks_of(data):
                crc = checksum(block, crc)
                yield block
            if data.attrs.get("crc32", crc) != crc:
                raise shard.error(
                    path,
                    f"its checksum is not {data.attrs['crc32']}, the part is "
                    "damaged; delete it to have it made again",
                )


def _fill(file: h5py.File, path: str, blocks: Iterable) -> None:
    """Write a dataset block by block, and the checksum of what was written."""
    data, position, crc = file[path], 0, 0
    for block in blocks:
        if path not in TEXTS:
            block = np.asarray(block, data.dtype)
        if len(block):
            data[position : position + len(block)] = block
        position, crc = position + len(block), checksum(block, crc)
    data.attrs.modify("crc32", np.uint32(crc))


def _write_atomically(path: Path, write) -> None:
    """Call write(temporary path), then put the result, complete and on disk, under its name."""
    tmp = path.with_name(path.name + ".tmp")
    write(tmp)
    _sync(tmp)
    os.replace(tmp, path)
    _sync(path.parent)  # the name, too, before anything that it replaces is deleted


def _sync(path: Path) -> None:
    """Wait until a file or folder is on disk, where the file system can say so of folders."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(number)
