"""One file of a store: what it must look like, reading it block by block, checksums."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import h5py
import numpy as np

from mcn_ext.modalities import BY_NAME, modality_of

VERSION = 1
CAPTIONS = {"start": np.float32, "end": np.float32, "text": str}
UNFINISHED = "unfinished"  # a file in a folder of shards that is being written
N_MELS = 40
BLOCK_BYTES = 2**22


class StoreError(ValueError):
    """A file that is not a store, or does not fit; the message names file, dataset and fix."""


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns whatever h5py raises (a dozen types) into a StoreError that names the file."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        raise StoreError(
            f"{path}: not a readable HDF5 file, or damaged ({error}); copy it again, or prepare it "
            "again with python -m mcn_ext.prepare"
        ) from error


def open_hdf5(path: Path) -> h5py.File:
    """A file to read; best-effort: network disks without locks are read all the same."""
    with reading(path):
        return h5py.File(path, "r", locking="best-effort")


def blocks(data: h5py.Dataset) -> Iterator[np.ndarray]:
    """Values of a dataset in order, a few MiB at a time; texts as bytes."""
    row_bytes = max(1, data.size // max(1, len(data)) * data.dtype.itemsize)
    # At least one row, however wide.
    step = max(1, BLOCK_BYTES // row_bytes)
    for first in range(0, len(data), step):
        yield data[first : first + step]


def checksum(values: np.ndarray, crc: int = 0) -> int:
    """CRC-32 of numbers as they lie in the file, or of texts in UTF-8, each ended by NUL."""
    if values.dtype == object:
        # Without an end "ab", "c" would have the checksum of "a", "bc".
        values = b"".join(text + b"\0" for text in values)
    else:
        values = np.ascontiguousarray(values)
    return zlib.crc32(values, crc)


def are_times(start: np.ndarray, end: np.ndarray) -> bool:
    """Whether 0 <= start <= end < infinity, in seconds, for all captions."""
    return bool(((start >= 0) & (start <= end) & (end < np.inf)).all())  # False for NaN


def text_made(dim: int, attrs: Mapping) -> tuple[int, str, str, int]:
    """What captions' features are: width, model, SHA-256 of its weights ("unknown" if not said),
    and CRC-32 of the file they are from, if any. Those that differ in it must not be mixed."""
    model, weights = (str(attrs.get(key, "unknown")) for key in ("model", "weights_sha256"))
    return dim, model, weights, int(attrs.get("features_crc32", 0))


def same_encoder(made: tuple[str, str], trained: tuple[str, str]) -> bool | None:
    """Whether two (model, SHA-256 of its weights) are one encoder: by the weights, else by names;
    None where one side is "unknown" in both."""
    for one, other in zip(reversed(made), reversed(trained), strict=True):
        if "unknown" not in (one, other):
            return one == other
    return None


class Shard:
    """What of a file stays in memory: sizes and offsets, 8 bytes a video and stream.

    Opening one checks all that costs no reading of rows: layout, dtypes, offsets. Raises
    StoreError. ``dims``, ``rates``, ``modalities`` and ``offsets`` are by stream; captions have
    offsets, too. ``text_made``: of the captions' features, by name, :func:`text_made`.
    ``has_speech``: whether it holds the words spoken in each video.
    """

    def __init__(self, path: Path):
        self.path, self.dims, self.rates, self.offsets = path, {}, {}, {}
        self.modalities, self.text_made = {}, {}
        with reading(path), open_hdf5(path) as file:
            for name, wanted in (("format", "mcn-store"), ("version", VERSION)):
                if (found := file.attrs.get(name)) != wanted:
                    raise self.error(f"attribute {name}", f"{found!r}, this code reads {wanted!r}")
            self.source = str(file.attrs.get("source", ""))
            self.n = len(self._dataset(file, "video/id", str))
            self.has_speech = "speech" in file["video"]
            if self.has_speech and (n := len(self._dataset(file, "video/speech", str))) != self.n:
                raise self.error("video/speech", f"{n} texts of {self.n} videos")
            # Sorted: the model concatenates video streams in this order.
            for name in sorted(set(file) - {"video", "caption"}):
                data = self._dataset(file, f"{name}/data", np.float16, 2)
                self.dims[name] = data.shape[1]
                # Kept in memory: a clip is then one read of rows, without a read of offsets.
                self.offsets[name] = self._offset(file, name, len(data))
                self.rates[name] = rate = float(file[name].attrs.get("rate_hz", np.nan))
                # False for NaN, too.
                if not 0 < rate < 1e6:
                    raise self.error(name, f"attribute rate_hz is {rate} or missing")
                modality = str(file[name].attrs.get("modality", modality_of(name)))
                if modality not in BY_NAME or modality == "text":
                    raise self.error(name, f"attribute modality is {modality!r}")
                self.modalities[name] = modality
            if self.dims.get("mel", N_MELS) != N_MELS:
                raise self.error("mel/data", f"{self.dims['mel']} columns, expected {N_MELS}")
            rows = {
                key: len(self._dataset(file, f"caption/{key}", CAPTIONS[key])) for key in CAPTIONS
            }
            for name in sorted(set(file["caption"]) - {*CAPTIONS, "offset"}):
                data = self._dataset(file, f"caption/{name}", np.float16, 2)
                rows[name], self.text_made[name] = len(data), text_made(data.shape[1], data.attrs)
            # One offset dataset serves all of them.
            if len(set(rows.values())) > 1:
                raise self.error("caption", f"its datasets differ in length: {rows}")
            self.offsets["caption"] = self._offset(file, "caption", rows["text"])

    def error(self, dataset: str, problem: str) -> StoreError:
        fix = "prepare the store again with python -m mcn_ext.prepare"
        return StoreError(f"{self.path}: {dataset}: {problem}; {fix}")

    def _dataset(self, file: h5py.File, name: str, kind, ndim: int = 1) -> h5py.Dataset:
        """A dataset, which must have this dtype and number of dimensions."""
        data = file.get(name)
        if not isinstance(data, h5py.Dataset):
            raise self.error(name, "missing, or not a dataset")
        is_text = h5py.check_string_dtype(data.dtype) is not None
        if data.ndim != ndim or not (is_text if kind is str else data.dtype == kind):
            expected = f"{kind.__name__} in {ndim} dimensions"
            raise self.error(name, f"{data.dtype} of shape {data.shape}, expected {expected}")
        return data

    def _offset(self, file: h5py.File, group: str, rows: int) -> np.ndarray:
        """First row of each video, and ``rows`` at the end, (n + 1,) int64."""
        offset = self._dataset(file, f"{group}/offset", np.int64)[:]
        steps = np.diff(offset, prepend=0, append=rows)  # of which first and last must be 0
        if len(steps) != self.n + 2 or steps.min() < 0 or steps[0] or steps[-1]:
            problem = f"does not run from 0 to its {rows} rows in {self.n} steps"
            raise self.error(f"{group}/offset", problem)
        return offset
