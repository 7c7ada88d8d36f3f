"""One file of a store: what it must look like, its checksums, its seal.

Damage is found in two places. Every dataset has an attribute ``crc32``, of the values. All the
other bytes (metadata, texts) are covered by the seal, a 4096-byte user block before the HDF5 data.
Metadata is written in the v110 format, whose own checksums leave no segmentation fault of libhdf5:
the default format gave 8 in 44,184 flips of a small file (each byte, three ways). 28 of 30,204 it
answered by not returning, all in the heap that holds strings, which has no checksum: that happens
to a child process (:func:`open_all`).

CRC-32 because it is the cheapest here that misses no burst of up to 32 bits (measured, one core:
crc32 4037 MB/s, sha1 1836, sha256 1722, blake2b 902) and damage is not malice: who may write a
store may write its checksums too. Against malice there is what :class:`Shard` checks.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import json
import math
import os
import signal
import zlib
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

VERSION = 1
N_MELS = 40
MAX_VIDEOS = 2**27  # in one file: 1 GiB of offsets
SEAL_BYTES = 4096
BLOCK_BYTES = 2**22
PATIENCE = 60  # seconds that opening a file may take
_SEAL = b"mcn-store seal 1\n"
_HDF5 = b"\x89HDF\r\n\x1a\n"
_NOT_STREAMS = {"video", "caption"}
TEXTS = ("video/id", "caption/text")


class StoreError(ValueError):
    """A file that is not a store, or does not fit; the message names file, dataset and fix."""


class _Broken(StoreError):
    """A seal that does not fit: damage, or an edit."""


def open_hdf5(path: Path) -> h5py.File:
    """A file to read; StoreError that tells a damaged one from too many open files."""
    try:
        try:  # as h5py's default, or both would not open one file in one process
            return h5py.File(path, "r")
        except OSError as error:
            if "lock" not in str(error):
                raise
            return h5py.File(path, "r", locking=False)  # network disks without locks: none needed
    except Exception as error:  # libhdf5 reports damage as any of five types
        if getattr(error, "errno", None) == errno.EMFILE:
            raise StoreError(f"{path}: too many open files; raise the limit (ulimit -n)") from error
        raise StoreError(
            f"{path}: not a readable HDF5 file ({error}); prepare it again with "
            "python -m mcn_ext.prepare"
        ) from error


class Rows:
    """Rows of a contiguous dataset, read where they lie in the file: 5 us where libhdf5 takes 60.

    Shares the descriptor of the open file, and so lives as long. OSError where the file ends.
    """

    def __init__(self, data: h5py.Dataset):
        self.descriptor, self.begin = data.file.id.get_vfd_handle(), data.id.get_offset()
        self.shape, self.dtype = data.shape, data.dtype

    @classmethod
    def of(cls, data: h5py.Dataset) -> Rows | h5py.Dataset:
        """Of a dataset that is empty, or not contiguous after all, libhdf5 reads the rows."""
        plain = data.id.get_offset() is not None and data.file.driver == "sec2"
        return cls(data) if plain else data

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.read(rows.start, rows.stop, None)

    def read(self, lo: int, hi: int, into: np.ndarray | None) -> np.ndarray:
        """Rows lo to hi of those there are; in the bytes ``into`` if they fit there."""
        shape = (max(0, min(hi, self.shape[0]) - lo), *self.shape[1:])
        row_bytes = math.prod(shape[1:]) * self.dtype.itemsize
        n_bytes = shape[0] * row_bytes
        if into is None or n_bytes > len(into):
            into = np.empty(n_bytes, np.uint8)
        left, at = memoryview(into)[:n_bytes], self.begin + lo * row_bytes
        while left:
            done = os.preadv(self.descriptor, [left], at)
            if not done:
                raise OSError("the file ends before them")
            left, at = left[done:], at + done
        return into[:n_bytes].view(self.dtype).reshape(shape)


class Shard:
    """What of a file stays in memory: sizes and offsets, 8 bytes a video and stream.

    Opening one makes every check that costs no reading of rows, so that a run refuses a store
    before there is work to lose: seal, links, layout, dtypes, space on disk, offsets.
    """

    def __init__(self, path: Path):
        self.path, broken = path, None
        try:
            try:
                self.sealed = check_seal(path)
            except _Broken as error:
                broken = error
            with open_hdf5(path) as file:
                self._describe(file)
            if broken:  # after what may say more
                raise broken
        except StoreError:
            raise
        except Exception as error:  # h5py passes on what libhdf5 says as a dozen types
            raise StoreError(
                f"{path}: a dataset or attribute is missing or of another kind "
                f"({error}); prepare the store again"
            ) from error

    def _describe(self, file: h5py.File) -> None:
        attrs = file.attrs
        if attrs.get("format") != "mcn-store":
            raise StoreError(
                f"{self.path}: root attribute 'format' is {attrs.get('format')!r}, not"
                " 'mcn-store'; make a store with python -m mcn_ext.prepare"
            )
        if attrs.get("version") != VERSION:
            raise StoreError(
                f"{self.path}: store version {attrs.get('version')}, this code reads "
                f"version {VERSION}; update mcn_ext or prepare the store again"
            )
        self.source = str(attrs.get("source", ""))
        names = sorted(name for name in file if name not in _NOT_STREAMS)
        shapes = {
            f"{name}/data": self._shape(file, f"{name}/data", np.float16, 2) for name in names
        }
        self.dims = {name: shapes[f"{name}/data"][1] for name in names}
        self.rows = {name: shapes[f"{name}/data"][0] for name in names}
        self.rates = {name: float(file[name].attrs["rate_hz"]) for name in names}
        for name, rate in self.rates.items():
            if not 0 < rate < 1e6:
                raise self.error(name, f"attribute rate_hz is {rate}")
        if self.dims.get("mel", N_MELS) != N_MELS:
            raise StoreError(
                f"{self.path}: mel/data has {self.dims['mel']} columns, the audio "
                f"encoder takes {N_MELS}; prepare it from {N_MELS}-band spectrograms"
            )
        captions = {
            key: self._shape(file, f"caption/{key}", dtype, 1)[0]
            for key, dtype in (("start", np.float32), ("end", np.float32), ("text", str))
        }
        if len(set(captions.values())) != 1:
            raise self.error("caption", f"start, end and text differ in length: {captions}")
        self.rows["caption"] = captions["text"]
        self.n = self._shape(file, "video/id", str, 1)[0]
        if self.n > MAX_VIDEOS:
            raise self.error("video/id", f"{self.n} videos, at most {MAX_VIDEOS} fit in a file")
        self.offsets = {name: self._offsets(file, name) for name in self.rows}
        self.paths = [
            *TEXTS,
            "caption/start",
            "caption/end",
            *shapes,
            *(f"{name}/offset" for name in self.rows),
        ]

    def error(self, dataset: str, problem: str) -> StoreError:
        return StoreError(f"{self.path}: {dataset}: {problem}; prepare the store again")

    def _shape(self, file: h5py.File, name: str, dtype, ndim: int) -> tuple[int, ...]:
        """Shape of a dataset, after all that can be said of it without reading its values."""
        group = name.split("/")[0]
        for link in (group, name):
            if not isinstance(file.get(link, getlink=True), h5py.HardLink):
                raise self.error(link, "missing, or a link to elsewhere")
        data = file[name]
        if not isinstance(data, h5py.Dataset):
            raise self.error(name, "not a dataset")
        right = h5py.check_string_dtype(data.dtype) if dtype is str else data.dtype == dtype
        if not right or data.ndim != ndim or 0 in data.shape[1:]:
            raise self.error(
                name,
                f"{data.dtype} of shape {data.shape}, expected "
                f"{np.dtype(dtype).name} in {ndim} dimensions",
            )
        made = data.id.get_create_plist()
        if (
            made.get_layout() != h5py.h5d.CONTIGUOUS
            or made.get_external_count()
            or made.get_nfilters()
        ):
            raise self.error(
                name, "chunked, compressed, virtual or kept in another file, not contiguous"
            )
        if data.size:
            # A dataset that was never written has no place in the file and reads as zeros.
            begin, size = data.id.get_offset(), data.size * data.id.get_type().get_size()
            if begin is None or not file.userblock_size <= begin <= self._bytes() - size:
                raise self.error(name, f"its {size} bytes are not in the file")
        return data.shape

    def _bytes(self) -> int:
        return os.path.getsize(self.path)

    def _offsets(self, file: h5py.File, group: str) -> np.ndarray:
        n = self._shape(file, f"{group}/offset", np.int64, 1)[0]
        offset = file[f"{group}/offset"][:] if n == self.n + 1 else np.zeros(0, np.int64)
        if (
            not len(offset)
            or offset[0] != 0
            or (offset[1:] < offset[:-1]).any()
            or offset[-1] != self.rows[group]
        ):
            raise StoreError(
                f"{self.path}: {group}/offset does not run from 0 to its "
                f"{self.rows[group]} rows in {self.n} steps; prepare the store again"
            )
        return offset

    def check_lengths(self, file: h5py.File, name: str) -> None:
        """Refuse texts that refer past the file or, together, claim more bytes than it has.

        Many strings may share one, so that a small file unfolds to terabytes.
        """
        data = file[name]
        if not data.size or h5py.check_string_dtype(data.dtype).length is not None:
            return
        kind = np.dtype([("length", "<u4"), ("address", "<u8"), ("index", "<u4")])
        total, limit, step = 0, self._bytes(), BLOCK_BYTES // kind.itemsize
        with open(self.path, "rb") as raw:
            raw.seek(data.id.get_offset())
            for lo in range(0, len(data), step):
                n = min(step, len(data) - lo)
                refs = np.frombuffer(raw.read(n * kind.itemsize), kind)
                total += int(refs["length"].sum(dtype=np.int64))
                if len(refs) != n or total > limit or (refs["address"] >= limit).any():
                    raise self.error(name, f"texts from {lo} on are not in the file")


def open_all(paths: list[Path]) -> list[Shard]:
    """Each file's Shard, after a child process has opened them all: some damage makes libhdf5 never
    return or die. StoreError names the file."""
    if not paths:
        return []
    out, into = os.pipe()
    child = os.fork()
    if not child:
        faulthandler.disable()  # the parent says it in one line
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        try:
            for path in paths:
                os.write(into, b".")
                signal.alarm(PATIENCE)
                with contextlib.suppress(Exception):  # the parent will see the same
                    try:
                        check_seal(path)
                    except StoreError:
                        signal.alarm(1)  # known to be broken: only what else is wrong is asked
                    Shard(path)
        finally:
            os._exit(0)
    os.close(into)
    with open(out, "rb") as pipe:
        opened = len(pipe.read())
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        what = (
            f"does not return (in {PATIENCE} s, if its checksums are right)"
            if code == -signal.SIGALRM
            else f"ends with signal {-code}"
        )
        raise StoreError(
            f"{paths[opened - 1]}: damaged, or on a disk that does not answer: "
            f"reading it {what}; copy it again or prepare it again"
        )
    return [Shard(path) for path in paths]


def checksum(values, crc: int = 0) -> int:
    """CRC-32 of numbers as they lie in the file, or of strings as UTF-8, each ended by NUL."""
    if isinstance(values, list):
        values = "".join(text + "\0" for text in values).encode("utf-8", "surrogateescape")
    return zlib.crc32(
        np.ascontiguousarray(values) if isinstance(values, np.ndarray) else values, crc
    )


def blocks_of(data: h5py.Dataset) -> Iterator:
    """Values of a dataset, a few MiB at a time: arrays, or lists of str."""
    texts = h5py.check_string_dtype(data.dtype)
    step = max(1, BLOCK_BYTES * max(1, len(data)) // max(1, data.size * data.dtype.itemsize))
    for lo in range(0, len(data), step):
        block = data[lo : lo + step]
        yield (
            block
            if texts is None
            else [t.decode("utf-8", "surrogateescape") for t in block.tolist()]
        )


def _crc(path: Path, ranges: list[list[int]]) -> int:
    crc = 0
    with open(path, "rb") as file:
        for lo, hi in ranges:
            file.seek(lo)
            while lo < hi and (block := file.read(min(BLOCK_BYTES, hi - lo))):
                crc, lo = zlib.crc32(block, crc), lo + len(block)
    return crc


def seal(path: Path) -> None:
    """Record, in the user block of a file that StoreWriter began, CRC-32s of all but the numbers.

    The part before caption/text ("head") is small and compared whenever the file is opened, the
    rest ("tail", the texts) by the validator. Call it again after an edit on purpose.
    """
    size, taken, split = os.path.getsize(path), [], None
    with open_hdf5(path) as file:
        if file.userblock_size != SEAL_BYTES:
            raise StoreError(f"{path}: no room for a seal; prepare the store again")
        for group in filter(None, file.values()):
            for name, data in group.items():
                if not isinstance(data, h5py.Dataset) or data.id.get_offset() is None:
                    continue  # nothing of it lies in this file
                if data.size and h5py.check_string_dtype(data.dtype) is None:
                    begin = data.id.get_offset()
                    taken.append((begin, begin + data.id.get_storage_size()))
                elif data.size and name == "text":
                    split = data.id.get_offset()
    split = size if split is None else split
    head, tail, at = [], [], SEAL_BYTES
    for begin, end in [*sorted(taken), (size, size)]:
        head.append([min(at, split), min(begin, split)])
        tail.append([max(at, split), max(begin, split)])
        at = end
    facts = {"size": size}
    for part, ranges in (("head", head), ("tail", tail)):
        facts[part] = [pair for pair in ranges if pair[0] < pair[1]]
        facts[f"{part}_crc32"] = _crc(path, facts[part])
    body = json.dumps(facts).encode().ljust(SEAL_BYTES - len(_SEAL) - 8)
    if len(body) != SEAL_BYTES - len(_SEAL) - 8:
        raise StoreError(f"{path}: too many datasets to seal")
    with open(path, "r+b") as raw:
        raw.write(_SEAL + b"%08x" % zlib.crc32(body) + body)


def check_seal(path: Path, *, whole: bool = False) -> bool:
    """Whether a file has a seal (older stores have none); StoreError where the bytes differ."""
    try:
        with open(path, "rb") as raw:
            block = raw.read(SEAL_BYTES)
    except OSError as error:
        raise StoreError(f"{path}: cannot be opened ({error.strerror or error})") from error
    if block.startswith(_HDF5):
        return False
    mark, digits, body = (
        block[: len(_SEAL)],
        block[len(_SEAL) : len(_SEAL) + 8],
        block[len(_SEAL) + 8 :],
    )
    if mark != _SEAL or digits != b"%08x" % zlib.crc32(body) or len(block) != SEAL_BYTES:
        raise StoreError(
            f"{path}: not a readable HDF5 file, or its first {SEAL_BYTES} bytes are "
            "damaged; prepare it again with python -m mcn_ext.prepare"
        )
    facts, size = json.loads(body), os.path.getsize(path)
    if size != facts["size"]:
        raise StoreError(f"{path}: {size} bytes, {facts['size']} were written; copy it again")
    for part, what in (("head", "metadata"), ("tail", "caption/text"))[: 1 + whole]:
        if _crc(path, facts[part]) != facts[f"{part}_crc32"]:
            raise _Broken(
                f"{path}: {what} differs from what was written (damaged, or edited since); copy it "
                "again or prepare it again. After an edit on purpose: data.store_file.seal()"
            )
    return True
