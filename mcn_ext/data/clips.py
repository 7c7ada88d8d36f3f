"""Which clips a step trains on, and how they are read: reader, data set, sampler, loader.

The clips of a step depend on (seed, epoch, video) alone, not on workers, ranks or what was read
before: runs resume exactly, and any number of processes sees the same global batch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch.utils.data import DataLoader

from mcn_ext import distributed
from mcn_ext.data.batch import collate, to_device  # noqa: F401
from mcn_ext.data.store import N_MELS, Store
from mcn_ext.data.words import WordVectors
from mcn_ext.data.workers import start_worker
from mcn_ext.modalities import MODALITIES

# A clip whose loudest and quietest mel entries are closer than this (dB) has no sound in it.
SILENCE_DB = 0.1
LONGEST_WAIT = 600  # seconds for a batch: a worker that has lost one never sends it
PREFETCH = 2  # batches of a worker read ahead


def caption_span(
    start: np.ndarray, end: np.ndarray, index: int, min_time: float
) -> tuple[int, int]:
    """(first, last) caption of the clip around caption ``index``: grown by its nearer neighbour."""
    first = last = index
    while end[last] - start[first] < min_time and (first > 0 or last < len(start) - 1):
        # Length in seconds if the clip grows by the caption before it, and by the one after it.
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
    # A dict and not a set, which would lose the order of drawing.
    spans: dict[tuple[int, int], None] = {}
    start, end = list(start), list(end)  # each index into an array would make a new number
    for index in rng.permutation(len(start)).tolist():
        spans[caption_span(start, end, index, min_time)] = None
        if len(spans) == n:
            break
    distinct = list(spans)
    # With too few captions clips repeat; equal clip ids keep them from being negatives.
    return [distinct[i % len(distinct)] for i in range(n)]


def draw_bags(spans: list[tuple[int, int]], n: int, rng: np.random.Generator) -> list[int]:
    """For each clip of a video the number of the first one of its bag: ``n`` neighbours in time,
    fewer at the ends. Where bags begin is drawn, so that any two neighbours meet in some epoch."""
    in_time, offset = sorted(set(spans)), int(rng.integers(n))  # equal clips share a bag
    first = {s: in_time[max(0, (i + offset) // n * n - offset)] for i, s in enumerate(in_time)}
    return [spans.index(first[span]) for span in spans]


def caption_id(tokens: Iterable[bytes]) -> int:
    """Equal for equal sets of tokens, which the text encoder, a maximum over tokens, cannot tell
    apart."""
    distinct = b"".join(sorted(set(tokens)))
    digest = hashlib.blake2b(distinct, digest_size=8).digest()  # what an int64 holds
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
    # Arrays as indices copy: what follows does not change the caller's array.
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
    """Maxima over time (n, dim) float16 of clips (rows, dim) float16; 0 where there are no rows."""
    out = np.zeros((len(clips), dim), np.float16)
    for rows, into in zip(clips, out, strict=True):
        if len(rows):  # by torch: numpy takes ten times as long for float16
            torch.amax(torch.from_numpy(rows), 0, out=torch.from_numpy(into))
    return out


def is_silent(mel: np.ndarray) -> bool:
    """Whether (frames, 40) float16 in dB is empty, not finite, or within SILENCE_DB everywhere."""
    if not mel.size:
        return True
    low, high = (float(x) for x in torch.aminmax(torch.from_numpy(mel)))
    return not SILENCE_DB < high - low < np.inf  # also where it is NaN


def missing_inputs(
    store: Store,
    modalities: str,
    audio: Iterable[str] = (),
    text: str = "words",
    sizes: Mapping | None = None,
) -> str:
    """What a store lacks of what is read of it, in words; "" if nothing.

    audio, text: as of :class:`ClipReader`. sizes: of a model (:class:`mcn_ext.model.MCN`) whose
    features the store must have, in their widths.
    """
    trained, problems = sizes["modalities"] if sizes else "", []
    for letter in modalities:
        there, kind = store.streams(letter), f"{MODALITIES[letter].name} stream"
        wanted = {}  # {name: width, or None for any}
        if letter == "V":
            wanted = sizes["video_dims"] if letter in trained else {}
            problems += ["no video stream"] * (not there)
        elif letter == "A":
            wanted = dict.fromkeys(audio or MODALITIES["A"].streams)
            if audio and letter in trained:
                wanted = sizes["audio_dims"]
        elif text != "words":
            there, kind = store.text_dims, "features of captions"
            wanted = {text: sizes["word_dim"] if letter in trained else None}
        for name, dim in wanted.items():
            if name not in there and letter == "T":
                how = f"mcn_ext.prepare caption_features {store.path} --encoder ENCODER --name"
                how = store.partly(name) or f" (to make them: python -m {how} {name})"
                problems.append(f"no {kind} {name!r}{how}")
            elif name not in there and letter == "A" and name in store.dims:
                problems.append(f"{name!r} is no audio stream; prepare it as {name}=DIR:RATE:audio")
            elif name not in there:
                problems.append(f"no {kind} {name!r}")
            elif dim not in (None, there[name]):
                problems.append(f"{name} is {there[name]} wide, the model was trained on {dim}")
    has = [f"{name} ({modality})" for name, modality in store.modalities.items()]
    has += [f"{name} (captions)" for name in store.text_dims]
    return "; ".join([*problems, f"it has {', '.join(has)}"]) if problems else ""


class ClipReader:
    """Clips of a store as arrays, in the sizes the model was built for.

    Args:
        modalities: letters of what is read.
        video_streams, audio_streams: names to read for "V" (all of it), for "A" (none: the
            spectrogram ``mel``).
        text: what to read for "T": "words" to look captions up in the vectors ``words``, or the
            name of captions' features in the store.
        audio_frames: at most so many frames of a clip (10 ms each) are used.
        audio_augment: strength of :func:`perturb_voice` when clips are read for training.
    """

    def __init__(
        self,
        store: Store | None,
        modalities: str = "",
        *,
        video_streams: Iterable[str] | None = None,
        audio_streams: Iterable[str] = (),
        text: str = "words",
        words: WordVectors | None = None,
        audio_frames: int = 1000,
        max_words: int = 20,
        audio_augment: float = 0.0,
    ):
        self.store, self.modalities, self.video_streams = store, modalities, ()
        if "V" in modalities and store is not None:
            self.video_streams = tuple(video_streams or store.streams("V"))
        self.audio_streams = tuple(audio_streams) if "A" in modalities else ()
        self.text, self.words, self.audio_augment = text, words, audio_augment
        self.audio_frames, self.max_words = audio_frames, max_words

    def read(
        self, video: int, spans: list[tuple[int, int]], rng: np.random.Generator | None = None
    ) -> dict[str, np.ndarray]:
        """The clips that reach from caption ``first`` to ``last``; ``rng`` to perturb the sound.

        Features that are not finite, silent sound and captions without a known word are not valid.
        """
        number, start, end = self.store.caption_times(video)
        first, last = np.array(spans, np.int64).T
        # Unique in the store: number of the first caption, and how many more follow (20 bits).
        out = {"clip_id": ((number + first) << 20) + last - first}
        out |= self.cut(video, start[first], end[last], rng)
        if self.words is not None:
            texts = self.store.caption_texts(video)
            out |= self.look_up([" ".join(texts[a : b + 1]) for a, b in spans])
        elif "T" in self.modalities and self.text != "words":
            texts = self.store.caption_texts(video)
            features = self.store.caption_features(video, self.text)
            out |= self.as_tokens([features[a : b + 1] for a, b in spans])
            # Not of the features: an encoder gives one text other last digits in another batch.
            texts = [t.encode() or row.tobytes() for t, row in zip(texts, features, strict=True)]
            out["caption_id"] = np.array([caption_id(texts[a : b + 1]) for a, b in spans])
        return out

    def pooled(
        self, video: int, stream: str, begin: np.ndarray, stop: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Maxima over time of a stream from ``begin`` to ``stop`` (n,) s, (n, dim) float16, and
        which of them can be used (n,) bool: not those without rows or with a NaN, which are 0."""
        features = maxima(self.store.clips(video, stream, begin, stop), self.store.dims[stream])
        # Not all zeros either: such a row has no direction.
        usable = np.isfinite(features).all(axis=1) & features.any(axis=1)
        features[~usable] = 0  # 0 * NaN would reach the gradients of all rows
        return features, usable

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
        out = {}
        for letter, streams in (("V", self.video_streams), ("A", self.audio_streams)):
            if letter not in self.modalities or not streams:
                continue
            modality = MODALITIES[letter].name
            valid = np.ones(len(begin), bool)
            for name in streams:
                out[f"{modality}.{name}"], usable = self.pooled(video, name, begin, stop)
                valid &= usable
            out[f"valid.{modality}"] = valid
        if "A" in self.modalities and not self.audio_streams:
            clips = self.store.clips(video, "mel", begin, stop)
            # A caption may last ten hours: 3.6 million frames, of which audio_frames are used.
            clips = [clip[: 16 * self.audio_frames] for clip in clips]
            valid = np.array([not is_silent(clip) for clip in clips])
            if rng is not None:
                for i in np.flatnonzero(valid):
                    mel = clips[i].astype(np.float32)
                    clips[i] = perturb_voice(mel, rng, self.audio_augment)
            clips = [clip[: self.audio_frames] for clip in clips]
            n_frames = np.array([len(clip) for clip in clips], np.int64)
            shape = (len(clips), max(16, n_frames.max()), N_MELS)
            audio = np.zeros(shape, np.float16 if rng is None else np.float32)
            # Silence stays zeros; its clips are left out of the losses.
            n_frames[~valid] = 0
            for mel, clip, n in zip(audio, clips, n_frames, strict=True):
                mel[:n] = clip[:n]
            out |= {"audio": audio.transpose(0, 2, 1), "n_frames": n_frames, "valid.audio": valid}
        return out

    def look_up(self, texts: list[str]) -> dict[str, np.ndarray]:
        """Texts as rows of the word vectors, -1 after the last word."""
        words = np.full((len(texts), self.max_words), -1, np.int64)
        ids = np.zeros(len(texts), np.int64)
        for i, text in enumerate(texts):
            rows = self.words.rows(text, self.max_words)
            words[i, : len(rows)] = rows
            ids[i] = caption_id(row.tobytes() for row in rows)
        return {"words": words, "caption_id": ids, "valid.text": words[:, 0] >= 0}

    def as_tokens(self, clips: list[np.ndarray]) -> dict[str, np.ndarray]:
        """Features of each clip's captions (captions, dim) float16 as tokens ``text`` (n, longest,
        dim), with ``text_mask``; captions without usable features are left out."""
        clips = [rows[np.isfinite(rows).all(1) & rows.any(1)][: self.max_words] for rows in clips]
        counts = np.array([len(rows) for rows in clips])
        text = np.zeros((len(clips), max(1, counts.max()), clips[0].shape[1]), np.float16)
        for into, rows in zip(text, clips, strict=True):
            into[: len(rows)] = rows
        return {
            "text": text,
            "text_mask": np.arange(text.shape[1]) < counts[:, None],
            "valid.text": counts > 0,
        }

    def describe(self, clip_ids: list[int]) -> list[str]:
        """Clips as a person finds them: video id, seconds, words."""
        n_until = np.cumsum(self.store.caption_counts())
        names, out = self.store.ids() if clip_ids else [], []
        for clip_id in clip_ids:
            caption, more = clip_id >> 20, clip_id & (1 << 20) - 1  # as in read()
            video = int(np.searchsorted(n_until, caption, side="right"))
            number, start, end = self.store.caption_times(video)
            first, last = caption - number, caption - number + more
            words = " ".join(self.store.caption_texts(video)[first : last + 1])
            out.append(f'{names[video]} {start[first]:.1f} to {end[last]:.1f} s "{words[:60]}"')
        return out


class TrainingClips(torch.utils.data.Dataset):
    """Item (epoch, video) -> ``n_pair`` clips of it; videos without captions are left out. With
    ``n_candidates``, also ``bag_id`` (n_pair,) int64, equal in a bag of :func:`draw_bags`."""

    def __init__(
        self,
        reader: ClipReader,
        *,
        n_pair: int,
        min_time: float,
        seed: int,
        n_candidates: int | None = None,
    ):
        self.reader, self.n_pair, self.min_time, self.seed = reader, n_pair, min_time, seed
        self.n_candidates = n_candidates
        self.videos = np.flatnonzero(reader.store.caption_counts())

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, np.ndarray]:
        epoch, index = key
        video = int(self.videos[index])
        _, start, end = self.reader.store.caption_times(video)
        # Not one generator for all: what it draws would depend on what was read before.
        rng = np.random.default_rng((self.seed, epoch, video))
        spans = draw_spans(start, end, self.n_pair, self.min_time, rng)
        item = self.reader.read(video, spans, rng if self.reader.audio_augment else None)
        if self.n_candidates:  # drawn last: the clips are those of the other losses
            item["bag_id"] = item["clip_id"][draw_bags(spans, self.n_candidates, rng)]
        return item


class ClipSampler(torch.utils.data.Sampler):
    """This rank's part of every global batch of an epoch, as lists of (epoch, video).

    Rank r owns the r-th contiguous part, so that ranks' rows in order are the single-process batch.
    The epoch's last, smaller batch is left out. Epochs count on from ``first_epoch``, in a
    second stage from the first one's.
    """

    def __init__(self, n_videos: int, batch_size: int, seed: int, first_epoch: int = 0):
        self.n_videos, self.batch_size, self.seed = n_videos, batch_size, seed
        self.first_epoch, self.epoch, self.start = first_epoch, 0, 0
        self.steps_per_epoch = n_videos // batch_size

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The next pass over the loader is of ``epoch``, from its step ``start`` on."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.steps_per_epoch - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.first_epoch + self.epoch
        # The same order on every rank, and again when the run is resumed.
        order = np.random.default_rng((self.seed, epoch)).permutation(self.n_videos)
        n_local = self.batch_size // distributed.world()
        for step in range(self.start, self.steps_per_epoch):
            begin = step * self.batch_size + distributed.rank() * n_local
            yield [(epoch, int(i)) for i in order[begin : begin + n_local]]


def make_loader(
    clips: TrainingClips, sampler: ClipSampler, workers: int, device: torch.device
) -> DataLoader:
    """A DataLoader of this rank's batches, read ahead by ``workers`` processes."""
    return DataLoader(
        clips,
        # It runs in the main process, so that set_epoch also reaches workers that live on.
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        prefetch_factor=PREFETCH if workers else None,
        timeout=LONGEST_WAIT if workers else 0,
        # Python 3.14 would fork them from a server, which outlives the run.
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # workers' seeds: not from the model's random numbers
    )


def default_workers(device: torch.device) -> int:
    """GPU: this rank's share of the cores, at most 8. CPU: 0, the cores are training."""
    if device.type == "cpu":
        return 0
    ranks = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    # The cores that this process may use: SLURM and containers may give a part of the machine.
    return min(8, max(1, len(os.sched_getaffinity(0)) // ranks))
