"""Clip sampling, data sets, batches.

What a step trains on depends on (seed, epoch, video) alone, not on workers, ranks or what was read
before: runs resume exactly, and any number of processes sees the same global batch.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mcn_ext import distributed
from mcn_ext.data.batch import SharedRooms, collate, own, to_device
from mcn_ext.data.store import N_MELS, Store
from mcn_ext.data.words import WordVectors
from mcn_ext.data.workers import born_deaf, outlive_signals

__all__ = ["ClipReader", "Loader", "TrainingClips", "collate", "draw_spans", "to_device"]
# A clip whose loudest and quietest mel entries are closer than this (dB) has no sound in it.
SILENCE_DB = 0.1
PREFETCH = 2  # batches of a worker read ahead
SLAB_BYTES = 2**23  # 10 minutes of 3D rows or 17 of sound


def caption_span(
    start: np.ndarray, end: np.ndarray, index: int, min_time: float
) -> tuple[int, int]:
    """(first, last) caption of the clip around caption ``index``: grown by its nearer neighbour."""
    first = last = index
    while end[last] - start[first] < min_time and (first > 0 or last < len(start) - 1):
        earlier = end[last] - start[first - 1] if first > 0 else np.inf
        later = end[last + 1] - start[first] if last < len(start) - 1 else np.inf
        if earlier < later:
            first -= 1
        else:
            last += 1
    return first, last


def draw_spans(
    start: np.ndarray, end: np.ndarray, n: int, min_time: float, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """n clips of a video as (first, last) captions: all different while there are enough."""
    spans: dict[tuple[int, int], None] = {}
    start, end = list(start), list(end)  # of the same numbers, which arrays would make each time
    for index in rng.permutation(len(start)).tolist():
        spans[caption_span(start, end, index, min_time)] = None
        if len(spans) == n:
            break
    distinct = list(spans)
    return [distinct[i % len(distinct)] for i in range(n)]


def caption_id(rows: np.ndarray) -> int:
    """Equal for equal sets of words, which the text encoder, a maximum over words, confuses."""
    distinct = np.array(sorted(set(rows.tolist())), np.int64)  # faster than np.unique, for so few
    digest = hashlib.blake2b(distinct.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def perturb_voice(mel: np.ndarray, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Another voice, room and pace for a clip's spectrogram (frames, 40) in dB; 1 is moderate.

    Pitch and vocal tract: mel bands shifted by up to 3. Pace: time stretched by up to 20 %. Room
    and microphone: a smooth equaliser of 4 dB. Then one band of mels and one stretch of time are
    flattened (SpecAugment, Park et al. 2019).
    """
    frames, n_mels = mel.shape
    pace = np.exp(rng.uniform(-0.2, 0.2) * strength)
    rows = np.minimum(np.arange(max(1, round(frames * pace))) / pace, frames - 1).astype(int)
    bands = np.arange(n_mels) + rng.uniform(-3, 3) * strength
    bands = np.clip(bands, 0, n_mels - 1).round().astype(int)
    mel = mel[rows][:, bands]
    equalizer = rng.normal(0, 4 * strength, 5)
    mel += np.interp(np.arange(n_mels), np.linspace(0, n_mels - 1, 5), equalizer).astype(np.float32)
    for axis, longest in ((1, 0.2), (0, 0.15)):
        size = mel.shape[axis]
        width = int(rng.uniform(0, longest * strength) * size)
        begin = int(rng.integers(0, size - width + 1))
        mel[(slice(None),) * axis + (slice(begin, begin + width),)] = mel.mean()
    return mel


def maxima(clips: list[np.ndarray], dim: int) -> np.ndarray:
    """Maxima over time (n, dim) float16 of clips (rows, dim) float16; 0 where there are no rows.

    rows.max(axis=0) takes 30 times as long: numpy has no float16 arithmetic. But the bits of
    numbers without a sign are ordered as the numbers are, and those with a sign are larger.
    """
    bits = np.zeros((len(clips), dim), np.uint16)
    for rows, most in zip(clips, bits, strict=True):
        if len(rows):
            rows.view(np.uint16).max(axis=0, out=most)
    best = bits.view(np.float16)
    if bits.size and bits.max() < 0x8000:  # features after a ReLU
        return best
    for i in np.flatnonzero((bits >= 0x8000).any(axis=1)):
        signed = clips[i].view(np.int16).max(axis=0)
        unsure = (signed <= 0) | (bits[i] > 0xFC00)  # nothing above 0, or a NaN with a sign
        best[i] = signed.view(np.float16)
        best[i, unsure] = clips[i][:, unsure].max(axis=0)
    return best


def is_silent(mel: np.ndarray) -> bool:
    """Whether (frames, 40) float16 in dB is empty, not finite, or within SILENCE_DB everywhere."""
    if not mel.size:
        return True
    # As in maxima(). A set sign bit makes the larger number the smaller one. NaN has the largest
    # bits of its sign, so that it gets into the difference; so does infinity.
    bits = mel.reshape(-1).view(np.uint16)
    signed = bits.view(np.int16)
    low, high = bits.max(), signed.max()
    low = (low if low >= 0x8000 else bits.min()).view(np.float16)
    high = (high if high >= 0 else signed.min()).view(np.float16)
    spread = np.float64(high) - np.float64(low)
    return not SILENCE_DB < spread < np.inf


class ClipReader:
    """Clips of a store as arrays, in the sizes the model was built for.

    Args:
        video_streams: names to read. audio: read ``mel``. words: vectors to look captions up in.
        audio_frames: at most so many frames of a clip (10 ms each) are used.
        audio_augment: strength of :func:`perturb_voice` when clips are read for training.
    """

    def __init__(
        self,
        store: Store,
        *,
        video_streams: tuple[str, ...] = (),
        audio: bool = False,
        words: WordVectors | None = None,
        audio_frames: int = 1000,
        max_words: int = 20,
        audio_augment: float = 0.0,
    ):
        self.store, self.video_streams, self.audio = store, tuple(video_streams), audio
        self.words, self.audio_frames, self.max_words = words, audio_frames, max_words
        self.audio_augment = audio_augment
        self._slab: np.ndarray | None = None

    def __getstate__(self):
        return self.__dict__ | {"_slab": None}

    def _memory(self) -> np.ndarray:
        """Bytes for a stream's rows until the next stream is read; longer slabs get their own."""
        if self._slab is None:
            self._slab = np.empty(SLAB_BYTES, np.uint8)
        return self._slab

    def read(
        self, video: int, spans: list[tuple[int, int]], rng: np.random.Generator | None = None
    ) -> dict[str, np.ndarray]:
        """The clips that reach from caption ``first`` to ``last``; ``rng`` to perturb the sound.

        Features that are not finite, silent sound and captions without a known word are not valid.
        """
        number, start, end = self.store.caption_times(video)
        ids = [((number + first) << 20) + last - first for first, last in spans]
        out = {"clip_id": np.array(ids, np.int64)}
        out |= self.cut(
            video,
            np.array([start[first] for first, _ in spans]),
            np.array([end[last] for _, last in spans]),
            rng,
        )
        if self.words is not None:
            texts = self.store.caption_texts(video)
            out |= self.look_up([" ".join(texts[first : last + 1]) for first, last in spans])
        return out

    def cut(
        self,
        video: int,
        begin: np.ndarray,
        stop: np.ndarray,
        rng: np.random.Generator | None = None,
    ) -> dict[str, np.ndarray]:
        """What is seen and heard from ``begin`` to ``stop`` (n,) s; the same keys as ``read``.

        Features and sound stay float16 until :func:`to_device`, half the bytes to hand on; sound
        that was perturbed is float32. ``audio`` (n, 40, frames) is a view of (n, frames, 40).
        """
        n, out = len(begin), {}
        if self.video_streams:
            valid = np.ones(n, bool)
            for name in self.video_streams:
                features = maxima(
                    self.store.clips(video, name, begin, stop, self._memory()),
                    self.store.dims[name],
                )
                magnitude = features.view(np.uint16) & 0x7FFF
                usable = (magnitude < 0x7C00).all(axis=1) & magnitude.any(axis=1)  # finite, not 0
                features[~usable] = 0
                valid &= usable
                out[f"video.{name}"] = features
            out["valid.video"] = valid
        if self.audio:
            # A caption may last ten hours: 3.6 million frames, of which audio_frames are used.
            clips = [
                c[: 16 * self.audio_frames]
                for c in self.store.clips(video, "mel", begin, stop, self._memory())
            ]
            silent = [is_silent(c) for c in clips]
            if rng is not None:
                clips = [
                    c if quiet else perturb_voice(c.astype(np.float32), rng, self.audio_augment)
                    for c, quiet in zip(clips, silent, strict=True)
                ]
            out["n_frames"] = np.array([min(len(c), self.audio_frames) for c in clips], np.int64)
            audio = np.empty(
                (n, max(16, out["n_frames"].max()), N_MELS),
                np.float16 if rng is None else np.float32,
            )
            out["n_frames"][silent] = 0
            out["valid.audio"] = ~np.array(silent)
            for rows, frames, mel in zip(clips, out["n_frames"], audio, strict=True):
                mel[:frames], mel[frames:] = rows[:frames], 0
            out["audio"] = audio.transpose(0, 2, 1)
        return out

    def look_up(self, texts: list[str]) -> dict[str, np.ndarray]:
        """Texts as rows of the word vectors, -1 after the last word."""
        out = {
            "words": np.full((len(texts), self.max_words), -1, np.int64),
            "caption_id": np.zeros(len(texts), np.int64),
        }
        for i, text in enumerate(texts):
            rows = self.words.rows(text, self.max_words)
            out["words"][i, : len(rows)] = rows
            out["caption_id"][i] = caption_id(rows)
        out["valid.text"] = out["words"][:, 0] >= 0
        return out

    def describe(self, clip_ids: list[int]) -> list[str]:
        """Clips as a person finds them: video id, seconds, words."""
        last = np.cumsum(self.store.caption_counts())
        names, out = self.store.ids() if clip_ids else [], []
        for clip_id in clip_ids:
            caption, more = clip_id >> 20, clip_id & (1 << 20) - 1  # as in read()
            video = int(np.searchsorted(last, caption, side="right"))
            number, start, end = self.store.caption_times(video)
            first = caption - number
            words = " ".join(self.store.caption_texts(video)[first : first + more + 1])
            out.append(
                f'{names[video]} {start[first]:.1f} to {end[first + more]:.1f} s "{words[:60]}"'
            )
        return out


class TrainingClips(torch.utils.data.Dataset):
    """Item (epoch, video) -> ``n_pair`` clips of it; videos without captions are left out."""

    def __init__(self, reader: ClipReader, *, n_pair: int, min_time: float, seed: int):
        self.reader, self.n_pair, self.min_time, self.seed = reader, n_pair, min_time, seed
        store = reader.store
        self.videos = np.flatnonzero(store.caption_counts())
        self.n_without_captions = len(store) - len(self.videos)

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, np.ndarray]:
        epoch, index = key
        video = int(self.videos[index])
        _, start, end = self.reader.store.caption_times(video)
        rng = np.random.default_rng((self.seed, epoch, video))
        return self.reader.read(
            video,
            draw_spans(start, end, self.n_pair, self.min_time, rng),
            rng if self.reader.audio_augment else None,
        )

    def __getitems__(self, keys: list[tuple[int, int]]) -> _Lazily:
        """The items of a batch, each read when :func:`collate` comes to it."""
        return _Lazily(self, keys)


class _Lazily:
    """Items of keys, read as they are asked for."""

    def __init__(self, clips: TrainingClips, keys: list[tuple[int, int]]):
        self.clips, self.keys = clips, keys

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return map(self.clips.__getitem__, self.keys)


class ShardedBatches(torch.utils.data.Sampler):
    """This rank's part of every global batch, as lists of (epoch, video).

    Rank r owns the r-th contiguous part, so that ranks' rows in order are the single-process batch.
    The epoch's last, smaller batch is left out.
    """

    def __init__(self, n_videos: int, batch_size: int, seed: int):
        self.n_videos, self.batch_size, self.seed = n_videos, batch_size, seed
        self.epoch = self.start = 0
        self.n_batches = n_videos // batch_size

    def __len__(self) -> int:
        return self.n_batches - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.n_videos)
        local = self.batch_size // distributed.world()
        for batch in range(self.start, self.n_batches):
            begin = batch * self.batch_size + distributed.rank() * local
            yield [(self.epoch, int(i)) for i in order[begin : begin + local]]


class Loader:
    """Batches of an epoch from any step on, read ahead by ``workers`` processes.

    Epochs count on from ``first_epoch``: a second stage draws clips its first has not drawn.
    """

    def __init__(
        self,
        clips: TrainingClips,
        batch_size: int,
        workers: int,
        device: torch.device,
        first_epoch: int = 0,
    ):
        self.first_epoch = first_epoch
        self.batches = ShardedBatches(len(clips), batch_size, clips.seed)
        self.steps_per_epoch = self.batches.n_batches
        self.copied = not workers or device.type == "cuda"  # pinned memory is a copy
        self.loader = torch.utils.data.DataLoader(
            clips,
            batch_sampler=self.batches,
            num_workers=workers,
            # One more than a worker may have under way: the one that is being copied here.
            collate_fn=SharedRooms(PREFETCH + 1) if workers else collate,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            prefetch_factor=PREFETCH if workers else None,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),
        )  # a seed per iterator: not from the model's random numbers

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        self.batches.epoch, self.batches.start = self.first_epoch + epoch, start
        with born_deaf():  # map() starts the iterator at once
            return iter(self.loader) if self.copied else map(own, self.loader)


def lack_of_shared_memory(reader: ClipReader, n_clips: int, workers: int) -> str:
    """A warning if the batches of all workers of this machine may not fit into /dev/shm, else "".

    ``n_clips``: of a batch on a rank. Each worker fills PREFETCH + 1 batches, of clips as long as
    the longest, in turn. One that finds no memory there ends with a bus error, which names nothing.
    """
    if not workers or not os.path.isdir("/dev/shm"):
        return ""
    n_bytes = 2 * sum(reader.store.dims[name] for name in reader.video_streams)  # float16
    if reader.audio:
        frames = -(-reader.audio_frames // 16) * 16
        n_bytes += (4 if reader.audio_augment else 2) * frames * N_MELS
    ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    for_one = ranks * (PREFETCH + 1) * n_clips * n_bytes
    needed, free = workers * for_one, shutil.disk_usage("/dev/shm").free
    if needed <= free:
        return ""
    return (
        f"--workers {workers}: {f'on {ranks} ranks ' if ranks > 1 else ''}they keep up to "
        f"{needed / 1e9:.2f} GB of batches in shared memory, and /dev/shm has "
        f"{free / 1e9:.2f} GB free: a worker may end with a bus error. Use --workers "
        f"{free // for_one}, or, in a container, docker run --shm-size "
        f"{needed // 2**30 + 1}g"
    )


def _start_worker(_worker: int) -> None:
    torch.set_num_threads(1)
    outlive_signals()


def default_workers(device: torch.device) -> int:
    """GPU: this rank's share of the cores, at most 8. CPU: 0, the cores are training."""
    if device.type == "cpu":
        return 0
    ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return min(8, max(1, len(os.sched_getaffinity(0)) // ranks))
