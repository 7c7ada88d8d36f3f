"""The HDF5 feature store: flat datasets and offsets, so that a clip is one read.

A store is one ``.h5`` file or a folder of ``shard-00000.h5 ...``. In each file::

    video/id (n,) str       <stream>/data (rows, dim) float16   caption/start, caption/end float32 s
    video/speech (n,) str   <stream>/offset (n+1,) int64        caption/text str
                                                                caption/offset (n+1,) int64
                                                                caption/<name> (n, dim) float16

A stream (``2d``, ``3d``, ``mel``) has one row per 1/rate_hz seconds; a video without it has no
rows. ``video/speech``, if there: the words spoken in a clip whose caption describes it.
``caption/<name>``: features of the captions, if any, with attributes ``model`` and
``weights_sha256``. Root attributes: ``format`` "mcn-store", ``version`` 1, ``source``; stream
attributes: ``rate_hz model weights_sha256 tool``, and ``modality`` ("video" or "audio"; without it,
``mel`` is audio, all else video). Each dataset has ``crc32`` of its values (uint32).

``python -m mcn_ext.store FILE`` validates and describes one.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from bisect import bisect_right
from collections import OrderedDict
from pathlib import Path

import h5py
import numpy as np

from mcn_ext.console import printable
from mcn_ext.data.store_file import (
    N_MELS,
    UNFINISHED,
    Shard,
    StoreError,
    are_times,
    blocks,
    checksum,
    open_hdf5,
    reading,
)
from mcn_ext.data.store_writer import StoreWriter
from mcn_ext.modalities import MODALITIES, modality_of

__all__ = ["N_MELS", "Store", "StoreError", "StoreWriter", "compare_durations", "validate"]
MAX_OPEN = 128  # files a process keeps open at a time
GAP_BYTES = 2**18  # reading so much takes as long as a read of its own


class Store:
    """Read access to a store; each process opens files anew, so it may travel to loader workers.

    ``dims`` {stream: width}, ``rates`` {stream: Hz}, ``modalities`` {stream: name}, ``text_dims``
    {name of captions' features: width}, ``source`` str; ``len(store)`` is in videos.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.files = sorted(self.path.glob("shard-*.h5")) if self.path.is_dir() else [self.path]
        if not self.path.exists() or not self.files:
            what = "a folder without shard-*.h5" if self.path.exists() else "no such store"
            raise StoreError(f"{self.path}: {what}; make a store with python -m mcn_ext.prepare")
        if (self.path / UNFINISHED).exists():
            raise StoreError(
                f"{self.path}: its preparation has not finished; run the same python -m "
                "mcn_ext.prepare again, which goes on where it ended"
            )
        self.shards = [Shard(file) for file in self.files]
        first = self.shards[0]
        self.dims, self.rates, self.source = first.dims, first.rates, first.source
        self.modalities, text_made = first.modalities, first.text_made
        for shard in self.shards[1:]:
            # All shards are read with the widths and rates of the first.
            kinds = (shard.dims, shard.rates, shard.modalities)
            if kinds != (self.dims, self.rates, self.modalities):
                problem = f"{shard.dims} at {shard.rates} Hz differ from {first.path.name}'s"
                raise shard.error("streams", f"{problem} {self.dims} at {self.rates} Hz")
            # Features of captions are added shard by shard: what is not in all is not there yet.
            text_made = dict(text_made.items() & shard.text_made.items())
        self.text_dims = {name: text_made[name][0] for name in sorted(text_made)}
        self._starts = np.cumsum([0] + [shard.n for shard in self.shards])
        captions = [int(shard.offsets["caption"][-1]) for shard in self.shards]
        # Captions are numbered through all shards: clip ids are made of these numbers.
        self._caption_starts = np.cumsum([0, *captions])
        self.n_captions = sum(captions)
        self._open: OrderedDict[int, dict[str, h5py.File | h5py.Dataset]] = OrderedDict()
        self._pid = os.getpid()

    def __getstate__(self):
        # Files of h5py cannot be pickled, and are not to be shared by processes.
        return self.__dict__ | {"_open": OrderedDict(), "_pid": -1}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _datasets(self, number: int) -> dict[str, h5py.File | h5py.Dataset]:
        """Datasets of a shard by path, "/" is its file; none is shared with a forked process."""
        if self._pid != os.getpid():
            self._open, self._pid = OrderedDict(), os.getpid()
        if number not in self._open:
            # The system limits open files; the one that was not used for longest is closed.
            if len(self._open) >= MAX_OPEN:
                self._open.popitem(last=False)[1]["/"].close()
            self._open[number] = {"/": open_hdf5(self.files[number])}
        self._open.move_to_end(number)
        return self._open[number]

    def _read(self, number: int, path: str, first: int, last: int) -> np.ndarray:
        """Rows first to last of a dataset of a shard."""
        with reading(self.files[number]):
            opened = self._datasets(number)
            if path not in opened:  # looking a name up costs as much as reading a clip
                opened[path] = opened["/"][path]
            return opened[path][first:last]

    def _texts(self, number: int, path: str, first: int, last: int) -> list[str]:
        return [t.decode(errors="replace") for t in self._read(number, path, first, last)]

    def _at(self, video: int, stream: str) -> tuple[int, int, int]:
        """(shard, first row, last row + 1) of a video's rows of a stream, or of its captions."""
        number = bisect_right(self._starts, video) - 1
        i = video - int(self._starts[number])
        first, last = self.shards[number].offsets[stream][i : i + 2]
        return number, int(first), int(last)

    def streams(self, letter: str) -> dict[str, int]:
        """{stream: width} of a modality, in order of names."""
        name = MODALITIES[letter].name
        return {key: dim for key, dim in self.dims.items() if self.modalities[key] == name}

    def seconds(self, video: int) -> float:
        """Length of a video, by the stream that goes on longest."""
        spans = [(self._at(video, name), rate) for name, rate in self.rates.items()]
        return max((last - first) / rate for (_, first, last), rate in spans)

    def fingerprint(self, text: str = "words") -> str:
        """Tells whether two stores hold the same: a digest of ids, offsets and checksums; of
        captions' features, only those that are called ``text``."""
        digest = hashlib.blake2b(repr((self.dims, self.rates)).encode(), digest_size=8)
        said = {key: name for key, name in self.modalities.items() if name != modality_of(key)}
        digest.update("\0".join(self.ids() + [repr(said)] * bool(said)).encode())
        # Other features of captions may be added at any time, and change nothing for this run.
        made = {name for shard in self.shards for name in shard.text_made}
        others = {f"caption/{name}" for name in made - {text}}
        for shard in self.shards:
            for offset in shard.offsets.values():
                digest.update(offset.tobytes())
            with reading(shard.path), open_hdf5(shard.path) as file:
                # Checksums stand for the rows, which would take long to read.
                sums = [
                    int(data.attrs.get("crc32", 0))  # as a number: numpy's versions print others
                    for group in file
                    for name, data in file[group].items()
                    if f"{group}/{name}" not in others
                ]
            digest.update(repr(sums).encode())
        return digest.hexdigest()

    def ids(self) -> list[str]:
        ids = (self._texts(i, "video/id", 0, shard.n) for i, shard in enumerate(self.shards))
        return [name for names in ids for name in names]

    def speech(self) -> list[str] | None:
        """The words spoken in each video, "" for none; None if the store does not hold them."""
        if not all(shard.has_speech for shard in self.shards):
            return None
        said = (self._texts(i, "video/speech", 0, shard.n) for i, shard in enumerate(self.shards))
        return [text for texts in said for text in texts]

    def caption_counts(self) -> np.ndarray:
        """Captions of each video, (n,) int64."""
        return self.row_counts("caption")

    def row_counts(self, stream: str) -> np.ndarray:
        """Rows of a stream of each video, (n,) int64."""
        return np.concatenate([np.diff(shard.offsets[stream]) for shard in self.shards])

    def caption_times(self, video: int) -> tuple[int, np.ndarray, np.ndarray]:
        """(first caption's number in the store, start (n,) s, end (n,) s) of a video."""
        number, first, last = self._at(video, "caption")
        start = self._read(number, "caption/start", first, last)
        end = self._read(number, "caption/end", first, last)
        if not are_times(start, end):
            problem = f"video {video} of the store has captions without 0 <= start <= end"
            raise self.shards[number].error("caption/start and end", problem)
        return int(self._caption_starts[number]) + first, start, end

    def caption_ends(self) -> np.ndarray:
        """When the last caption of each video ends, (n,) s; NaN without captions."""
        ends = np.full(len(self), np.nan)
        for number, (first, shard) in enumerate(zip(self._starts, self.shards, strict=False)):
            offset = shard.offsets["caption"]
            said = np.flatnonzero(np.diff(offset))
            times = self._read(number, "caption/end", 0, int(offset[-1]))
            if len(said):
                # Of an empty range reduceat returns another video's value, so these are left out.
                ends[first + said] = np.maximum.reduceat(times, offset[said])
        return ends

    def caption_texts(self, video: int) -> list[str]:
        number, first, last = self._at(video, "caption")
        return self._texts(number, "caption/text", first, last)

    def caption_features(self, video: int, name: str) -> np.ndarray:
        """Features of a video's captions, (captions, dim) float16."""
        number, first, last = self._at(video, "caption")
        return self._read(number, f"caption/{name}", first, last)

    def partly(self, name: str) -> str:
        """What is wrong if only some files have these features of captions; "" if all or none."""
        n = sum(name in shard.text_made for shard in self.shards)
        if not n or name in self.text_dims:
            return ""
        return (
            f" (in {n} of {len(self.files)} files, or of several encoders: run the same python -m "
            "mcn_ext.prepare caption_features again, which goes on where it ended)"
        )

    def text_model(self, name: str) -> tuple[str, str]:
        """(model, SHA-256 of its weights) that made features of captions; "unknown" if not said."""
        return self.shards[0].text_made[name][1:3]

    def texts(self, block: int = 100_000):
        """All captions' texts, in order, ``block`` in memory at a time."""
        for number, shard in enumerate(self.shards):
            n = int(shard.offsets["caption"][-1])
            for first in range(0, n, block):
                yield from self._texts(number, "caption/text", first, min(first + block, n))

    def clips(self, video: int, stream: str, start, end) -> list[np.ndarray]:
        """Rows int(start * rate) : int(end * rate) + 1 of each clip (seconds), of those there are.

        Clips that lie close are read together and are views of one array: a read costs more than
        the rows between them.
        """
        number, begin, stop = self._at(video, stream)
        path, rate = f"{stream}/data", self.rates[stream]
        first = begin + (np.asarray(start, float) * rate).astype(np.int64)
        last = begin + (np.asarray(end, float) * rate).astype(np.int64) + 1
        # A clip that begins behind the video's end is empty, and its length is never negative.
        first = np.clip(first, begin, stop)
        last = np.clip(last, first, stop)
        if not len(first):
            return []
        low, high = first.min(), last.max()
        between = high - low - (last - first).sum()  # below 0 where clips overlap
        # In bytes, 2 for each float16: what is read in vain against what the reads would cost.
        if between * 2 * self.dims[stream] > len(first) * GAP_BYTES:
            return [self._read(number, path, a, b) for a, b in zip(first, last, strict=True)]
        rows = self._read(number, path, low, high)
        return [rows[a - low : b - low] for a, b in zip(first, last, strict=True)]


def compare_durations(store: Store) -> tuple[list[str], list[tuple[str, str]]]:
    """What does not fit where streams and captions of a video should last equally long.

    Returns notices about the whole store (a stream at another rate than said), and (id, durations)
    of each video that does not fit. Streams of one row a video are pooled, and are not compared.
    """
    counts = {name: store.row_counts(name) for name in store.dims}
    rates = {name: store.rates[name] for name, n in counts.items() if n.max(initial=0) > 1}
    if not rates:
        return [], []
    # NaN where a video lacks the stream, which is then in no comparison.
    seconds = {name: np.where(counts[name], counts[name] / rates[name], np.nan) for name in rates}
    spans = np.array(list(seconds.values()))
    # The middle one: of three streams that is right where two agree. "lower": of two, one of them.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of videos without any stream, which are NaN
        middle = np.nanpercentile(spans, 50, axis=0, method="lower")
        longest = np.nanmax(spans, axis=0)
    seconds["captions"] = ends = store.caption_ends()
    slack = 2 / min(rates.values())  # seconds: rounding to whole rows, at either end
    notices, wrong = [], ends > 1.05 * longest + slack  # captions may end early
    for name, rate in rates.items():
        wrong |= np.abs(seconds[name] - middle) > 0.05 * middle + slack
        ratio, rounding = _median(seconds[name] / middle), _median(slack / middle)
        if abs(ratio - 1) > 0.02 + rounding and len(rates) == 2:  # which one is right is unknown
            other = next(key for key in rates if key != name)
            notices.append(
                f"stream {name} lasts {ratio:.3g} times as long as {other}: has one of them "
                "another rate than said, or is one cut off?"
            )
        elif abs(ratio - 1) > 0.02 + rounding:
            notices.append(
                f"stream {name} lasts {ratio:.3g} times as long as the others: has it "
                f"{rate * ratio:.3g} rows a second, not {rate:g}, or is it cut off?"
            )
    ratio = _median(ends / longest)
    if ratio > 1.05 + _median(slack / longest) or ratio < 0.03:
        notices.append(f"captions end after {ratio:.2g} of the video: are their times seconds?")
    ids = store.ids() if wrong.any() else []
    return notices, [
        (ids[i], ", ".join(f"{s} {t[i]:.4g} s" for s, t in seconds.items() if t[i] == t[i]))
        for i in np.flatnonzero(wrong)
    ]


def _median(values: np.ndarray) -> float:
    """Of the values that are there; 1 without any."""
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else 1.0


def validate(path: str | os.PathLike, *, check_rows: bool = True) -> dict:
    """Check a store from end to end and describe it; StoreError with the first thing wrong.

    check_rows reads every byte: checksums, values that are not finite, captions without a time,
    ids twice. ``checksums`` of the result tells whether there were any.
    """
    store = Store(path)
    info = {"source": store.source, "videos": len(store), "captions": store.n_captions}
    info["streams"] = []
    for name, dim in store.dims.items():
        counts = store.row_counts(name)
        info["streams"].append(
            f"{name:4s} {counts.sum()} rows x {dim}, {store.rates[name]:g} per second, "
            f"{(counts == 0).sum()} videos without, {store.modalities[name]}"
        )
    for name in sorted({name for shard in store.shards for name in shard.text_made}):
        dim, model = next(s.text_made[name] for s in store.shards if name in s.text_made)[:2]
        about = f"caption/{name}: features of captions, {dim} wide, by {model}"
        info["streams"].append(about + store.partly(name))
    if said := store.speech():
        n = sum(map(bool, said))
        info["streams"].append(f"video/speech: the words spoken in {n} of {len(said)} videos")
    info["notices"], misfits = compare_durations(store)
    if misfits:
        name, durations = misfits[0]
        about = f"durations disagree in {len(misfits)} videos, such as {printable(name)}"
        info["notices"].append(f"{about}: {durations}")
    # What follows reads every byte, which takes long for a large store.
    if not check_rows:
        return info
    info["checksums"] = True
    for shard in store.shards:
        with reading(shard.path), open_hdf5(shard.path) as file:
            for group in file:
                for name in file[group]:
                    info["checksums"] &= _check_dataset(shard, file[f"{group}/{name}"])
            if not are_times(file["caption/start"][:], file["caption/end"][:]):
                raise shard.error("caption/start", "not 0 <= start <= end")
    # Within shards and between them: an id must name one video.
    duplicates = len(store) - len(set(store.ids()))
    if duplicates:
        raise StoreError(f"{path}: video/id has {duplicates} duplicates; prepare the store again")
    return info


def _check_dataset(shard: Shard, data: h5py.Dataset) -> bool:
    """Read a dataset to its end; whether it has a checksum."""
    name, crc, wanted = data.name.lstrip("/"), 0, data.attrs.get("crc32")
    for block in blocks(data):
        crc = checksum(block, crc)
        if block.dtype.kind == "f" and not np.isfinite(block).all():
            raise shard.error(name, "has values that are not finite")
    if wanted not in (None, crc):
        raise shard.error(
            name,
            f"its checksum is {crc}, {wanted} was written: damaged, or edited since; copy it again",
        )
    return wanted is not None
