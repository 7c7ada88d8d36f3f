"""Writes stores: gathered in memory, part by part, each part complete or not there."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import h5py
import numpy as np

from mcn_ext.console import printable
from mcn_ext.data.files import lock, replacing, sync_folder, write_text
from mcn_ext.data.store_file import (
    UNFINISHED,
    VERSION,
    Shard,
    StoreError,
    blocks,
    checksum,
    open_hdf5,
    reading,
)
from mcn_ext.modalities import modality_of

PARTS = r"(shard-\d{5,}\.h5|prepare\.json)(\.tmp)?"


def mend(text: str) -> str:
    """A text as HDF5 can hold it: without NUL and without half a surrogate pair."""
    return text.replace("\0", " ").encode("utf-8", "replace").decode()


class _File(io.FileIO):
    """A file that HDF5 writes to. HDF5 crashes where a write fails, at once or at the end of the
    process; so it is told that all is well, reads what it wrote, and ``check`` raises the error."""

    failure: OSError | None = None

    def __init__(self, path: Path, mode: str = "w+"):
        super().__init__(path, mode)
        self.lost: list[tuple[int, bytes]] = []  # (position, bytes) since the failure

    def write(self, data) -> int:
        rest = memoryview(data).cast("B")
        try:
            while self.failure is None and rest:  # a disk may take a part
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.failure = error
        if rest:
            # HDF5 believes that this was written: it may read it again, and goes on behind it.
            self.lost.append((self.tell(), bytes(rest)))
            self.seek(len(rest), os.SEEK_CUR)
        return len(data)

    def readinto(self, buffer) -> int:
        view, start = memoryview(buffer).cast("B"), self.tell()
        n = super().readinto(view)
        # Behind the end of the file there are zeros, then what could not be written.
        view[n:] = bytes(len(view) - n)
        for at, data in self.lost:
            low, high = max(at, start), min(at + len(data), start + len(view))
            if low < high:
                view[low - start : high - start] = data[low - at : high - at]
        return len(view)

    def truncate(self, size=None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.failure = error
            return size

    def check(self) -> None:
        if self.failure:
            raise self.failure


class StoreWriter:
    """Writes a store video by video; a killed run goes on after the last finished part.

    Rows are gathered in memory up to ``shard_mib``, then written to a part in one go: the part
    appears, complete, under its name (write, fsync, rename), or not at all. ``out`` ending in .h5
    becomes one file at the end (joined from the parts by streaming; needs the space twice for that
    moment), any other ``out`` is a folder of shards.

    Args:
        streams: {name: {"dim": int, "rate_hz": float, "model": str, "weights_sha256": str,
            "tool": str}}, and "modality" where it is not the name's: :func:`.modality_of`.
        source: what the data is, for people. settings: plain values a resumed run must share.
        speech: whether the words spoken in each video are given to :meth:`add`.
    """

    def __init__(
        self,
        out: str | os.PathLike,
        streams: dict[str, dict],
        source: str,
        *,
        settings: dict | None = None,
        speech: bool = False,
        shard_mib: float = 512,
        overwrite: bool = False,
    ):
        self.out, self.streams, self.source = Path(out), streams, source
        self.texts = ["id", "speech"] if speech else ["id"]  # of each video
        self.shard_bytes = shard_mib * 2**20
        self.lock = lock(self.out)  # two runs would take each other's parts
        single = self.out.suffix in (".h5", ".hdf5")
        self.folder = self.out.with_name(self.out.name + ".parts") if single else self.out
        if single and self.out.exists() and not overwrite:
            raise StoreError(f"{self.out} exists; pass --overwrite to replace it, or another --out")
        # --overwrite deletes the folder, so it must hold nothing but a store.
        for path in self.folder.glob("*"):
            if path.name != UNFINISHED and not re.fullmatch(PARTS, path.name):
                raise StoreError(
                    f"{self.folder} holds {path.name}, which is not part of a store; "
                    "give --out a folder of its own"
                )
        for path in self.folder.glob("*") if overwrite else ():
            path.unlink()  # one by one: the folder may be a link to one on another disk
        self.folder.mkdir(parents=True, exist_ok=True)
        self.settings_file = self.folder / "prepare.json"
        wanted = {"source": source, "streams": streams, **(settings or {})}
        # Sorted: equal settings are equal bytes.
        wanted = json.dumps(wanted, sort_keys=True)
        if not self.settings_file.exists():
            write_text(self.settings_file, wanted)
        # Parts of other inputs must not be joined with new ones.
        elif self.settings_file.read_bytes() != wanted.encode():
            raise StoreError(
                f"{self.folder} was begun from other inputs ({self.settings_file}); "
                "pass --overwrite to start again, or another --out"
            )
        # Parts that a killed run had not finished.
        for leftover in self.folder.glob("shard-*.tmp"):
            leftover.unlink()
        self.parts = sorted(self.folder.glob("shard-*.h5"))
        self.done: set[str] = set()
        for part in self.parts:
            Shard(part)  # a damaged part is an error now, not after hours
            with reading(part), open_hdf5(part) as file:
                self.done.update(file["video/id"].asstr()[:])
        # Until close() removes it, no reader takes the parts for a whole store.
        (self.folder / UNFINISHED).touch()
        # To be written: (id, {stream: rows}, start, end, texts, speech).
        self.videos: list[tuple] = []
        self.bytes = 0

    def add(
        self, name: str, rows: dict[str, np.ndarray | None], start, end, text, speech: str = ""
    ) -> None:
        """One video: rows {stream: (n, dim) or None}, captions' start and end in seconds, texts;
        the words spoken in it.

        StoreError for an id that was there, rows of another width, captions without a time.
        """
        name = mend(name)
        if name in self.done:
            raise StoreError(f"video id {printable(name)} twice in {self.out}")
        arrays = {}
        for stream, spec in self.streams.items():
            given = rows.get(stream)
            array = np.empty((0, spec["dim"])) if given is None else given
            # Half the space of fp32 on disk and on the way to the GPU.
            arrays[stream] = array = np.asarray(array, np.float16)
            if array.ndim != 2 or array.shape[1] != spec["dim"]:
                raise StoreError(
                    f"{name}: stream {stream} has shape {array.shape}, "
                    f"expected (rows, {spec['dim']})"
                )
        start, end = np.asarray(start, np.float32), np.asarray(end, np.float32)
        in_order = len(start) == len(end) == len(text) and (0 <= start) & (start <= end)
        if not np.all(in_order & (end < np.inf)):
            raise StoreError(f"{name}: captions need as many texts as times, 0 <= start <= end s")
        self.done.add(name)
        texts = [mend(t) for t in text]
        self.videos.append((name, arrays, start, end, texts, mend(speech)))
        self.bytes += sum(array.nbytes for array in arrays.values())
        # Features are nearly all of the bytes; captions and ids are not counted.
        if self.bytes >= self.shard_bytes:
            self._flush()

    def _flush(self) -> None:
        """Write the videos gathered to a new part."""
        if not self.videos:
            return
        names, arrays, starts, ends, texts, speech = zip(*self.videos, strict=True)
        contents = {
            # As bytes, since the checksum is of UTF-8.
            "video/id": [[name.encode() for name in names]],
            "video/speech": [[said.encode() for said in speech]],
            "caption/offset": [_offset(map(len, texts))],
            "caption/start": starts,
            "caption/end": ends,
            "caption/text": [[text.encode() for text in several] for several in texts],
        }
        for stream in self.streams:
            contents[f"{stream}/data"] = [rows[stream] for rows in arrays]
            contents[f"{stream}/offset"] = [_offset(len(rows[stream]) for rows in arrays)]
        path = self.folder / f"shard-{len(self.parts):05d}.h5"
        with replacing(path) as tmp:
            self._write(tmp, contents)
        self.parts.append(path)
        self.videos, self.bytes = [], 0

    def _write(self, path: Path, contents: dict[str, Iterable]) -> None:
        """A file from the blocks of each dataset, written in turn; offsets come whole."""
        text, kinds = h5py.string_dtype(), {"start": np.float32, "end": np.float32}
        # Metadata of the v110 format has checksums of its own.
        with _File(path) as raw:
            with h5py.File(raw, "w", libver=("v110", "v110")) as file:
                file.attrs.update(format="mcn-store", version=VERSION, source=mend(self.source))
                for group in (*self.streams, "caption"):
                    (offset,) = contents[f"{group}/offset"]
                    _fill(raw, file, f"{group}/offset", (len(offset),), np.int64, [offset])
                    if group != "caption":
                        spec = self.streams[group]
                        keys = ("model", "weights_sha256", "tool")
                        file[group].attrs.update({key: spec.get(key, "unknown") for key in keys})
                        file[group].attrs["rate_hz"] = spec["rate_hz"]
                        file[group].attrs["modality"] = spec.get("modality", modality_of(group))
                        shape, name = (offset[-1], spec["dim"]), f"{group}/data"
                        _fill(raw, file, name, shape, np.float16, contents[name])
                for key in ("start", "end", "text"):
                    name = f"caption/{key}"
                    _fill(raw, file, name, (offset[-1],), kinds.get(key, text), contents[name])
                for key in self.texts:
                    name = f"video/{key}"
                    _fill(raw, file, name, (len(offset) - 1,), text, contents[name])
            raw.check()

    def close(self) -> Path:
        """Write what is left, join the parts if one file was asked for; returns the path."""
        self._flush()
        (self.folder / UNFINISHED).unlink(missing_ok=True)
        if not self.parts:
            self.settings_file.unlink()  # nothing that a corrected run would have to agree with
            raise StoreError(f"{self.out}: no usable video, nothing written")
        if self.folder != self.out:
            self._join()
        self.lock.close()
        return self.out

    def _join(self) -> None:
        """Make one file of the parts, and remove them."""
        if len(self.parts) == 1:
            # The only part is the file already.
            os.replace(self.parts[0], self.out)
            sync_folder(self.out.parent)
        else:
            shards = [Shard(part) for part in self.parts]
            groups = (*self.streams, "caption")
            names = [f"video/{key}" for key in self.texts]
            names += [f"caption/{key}" for key in ("start", "end", "text")]
            names += [f"{stream}/data" for stream in self.streams]
            contents = {name: _joined(shards, name) for name in names}
            for group in groups:
                steps = [np.diff(shard.offsets[group]) for shard in shards]
                contents[f"{group}/offset"] = [_offset(np.concatenate(steps))]
            with replacing(self.out) as tmp:
                self._write(tmp, contents)
        # Last: until the file is complete, a run that was killed finds its parts.
        shutil.rmtree(self.folder)


def _offset(counts: Iterable[int]) -> np.ndarray:
    return np.cumsum([0, *counts], dtype=np.int64)


def _joined(shards: list[Shard], name: str) -> Iterator[np.ndarray]:
    """Blocks of a dataset of all parts, one open at a time; StoreError for one that changed."""
    for shard in shards:
        with reading(shard.path), open_hdf5(shard.path) as file:
            crc = 0
            for block in blocks(file[name]):
                crc = checksum(block, crc)
                yield block
            if file[name].attrs.get("crc32", crc) != crc:
                raise StoreError(
                    f"{shard.path}: {name}: its checksum is not {file[name].attrs['crc32']}, the "
                    "part is damaged; delete it to have it made again"
                )


def add_dataset(
    path: Path, name: str, shape: tuple, contents: Iterable[np.ndarray], attrs: Mapping
) -> None:
    """Add a float16 dataset to a file, or replace it there, from its blocks: in a copy, which then
    takes the file's place. SystemExit on a full disk."""
    with replacing(path) as tmp:
        shutil.copy(path, tmp)
        with _File(tmp, "r+") as raw:
            with h5py.File(raw, "r+", libver=("v110", "v110")) as file:
                if name in file:
                    del file[name]
                _fill(raw, file, name, shape, np.float16, contents)
                file[name].attrs.update(attrs)
            raw.check()


def _fill(raw: _File, file: h5py.File, name: str, shape: tuple, dtype, contents: Iterable) -> None:
    """Create a dataset, write it block by block, and the checksum of what was written."""
    data, position, crc = file.create_dataset(name, shape, dtype), 0, 0
    for block in contents:
        # Converted first, so that the checksum is of what the file holds.
        block = np.asarray(block, data.dtype)
        # check(), since HDF5 is told that every write succeeds, see _File.
        if len(block):
            data[position : position + len(block)] = block
            raw.check()
        position += len(block)
        crc = checksum(block, crc)
    data.attrs["crc32"] = np.uint32(crc)
