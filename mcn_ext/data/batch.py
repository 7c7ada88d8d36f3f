"""Clips of several videos -> one batch: in which memory it lies, and how it gets to the device.

To have the system hand out and clear memory, 4 KiB at a time, takes longer than to fill a batch.
Workers therefore write into shared memory that they take once and use in turn; training copies a
batch out of it, to pinned memory or as float32, before it asks for the next one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mcn_ext.data.store import N_MELS

Room = Callable[[str, tuple[int, ...], torch.dtype], Tensor]


class Items(Protocol):
    """What a reader returns for several videos, in memory or read as it is asked for."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[dict[str, np.ndarray]]: ...


def new_room(_key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty tensor, from numpy, which asks the system for huge pages, as torch does not."""
    n_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.empty(n_bytes, np.uint8)).view(dtype).view(shape)


def is_large(key: str) -> bool:
    return key == "audio" or key.startswith("video.")


def collate(items: Items, room: Room = new_room) -> dict[str, Tensor]:
    """Clips of several videos as one flat batch; audio padded to the longest, by 16 frames.

    Takes items one by one and keeps no sound but the batch's: where they are read as they are asked
    for, every item finds the memory of the one before in the processor's cache.
    """
    arrays, sound, n = {}, None, 0
    for item in items:
        for key, value in item.items():
            arrays.setdefault(key, []).append(torch.from_numpy(value))
        if "audio" in item:
            audio = arrays["audio"].pop().transpose(1, 2)  # as the store has it: a copy is one move
            begin, n = n, n + len(audio)
            frames = -(-audio.shape[1] // 16) * 16
            if sound is None:  # for items like the first, which is what a training batch is made of
                sound = room("audio", (n * len(items), frames, N_MELS), audio.dtype)
            elif n > len(sound) or frames > sound.shape[1]:
                sound = _grown(sound, begin, n, frames)
            sound[begin:n, : audio.shape[1]] = audio
            sound[begin:n, audio.shape[1] :] = 0
    batch = {}
    for key, parts in arrays.items():
        if key == "audio":
            batch[key] = sound[:n].transpose(1, 2)
        elif is_large(key):
            shape = (sum(map(len, parts)), *parts[0].shape[1:])
            batch[key] = torch.cat(parts, out=room(key, shape, parts[0].dtype))
        else:
            batch[key] = torch.cat(parts)
    return batch


def _grown(sound: Tensor, used: int, n: int, frames: int) -> Tensor:
    """The first ``used`` clips of ``sound`` (N, T, 40) in a larger tensor: N >= n, T >= frames."""
    clips, longest = len(sound) if n <= len(sound) else 2 * n, max(frames, sound.shape[1])
    larger = new_room("audio", (clips, longest, N_MELS), sound.dtype)
    larger[:used, : sound.shape[1]] = sound[:used]
    larger[:used, sound.shape[1] :] = 0
    return larger


class SharedRooms:
    """:func:`collate` for a worker, into ``n`` sets of shared memory in turn.

    A set is written again n batches later. Whoever receives batches must have copied one (pinned
    it, or :func:`own`) before the worker begins the n-th after it.
    """

    def __init__(self, n: int):
        self.rooms: list[dict[str, torch.UntypedStorage]] = [{} for _ in range(n)]
        self.turn = 0

    def __call__(self, items: Items) -> dict[str, Tensor]:
        self.turn = (self.turn + 1) % len(self.rooms)
        return collate(items, self._room)

    def _room(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        n_bytes, mine = math.prod(shape) * dtype.itemsize, self.rooms[self.turn]
        if key not in mine or mine[key].nbytes() < n_bytes:
            mine[key] = torch.UntypedStorage._new_shared(n_bytes)
        return torch.empty(0, dtype=dtype).set_(mine[key], 0, shape)


def own(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch out of shared memory, as :func:`to_device` makes it."""
    return {key: _float32(value) if is_large(key) else value for key, value in batch.items()}


def _float32(value: Tensor) -> Tensor:
    """A contiguous copy, for which float16 is exact."""
    if value.device.type == "cpu":
        return new_room("", value.shape, torch.float32).copy_(value)
    return value.to(torch.float32, memory_format=torch.contiguous_format)


def to_device(batch: dict[str, Tensor], device: torch.device, table: Tensor | None) -> dict:
    """A flat batch -> what :class:`~mcn_ext.model.MCN` takes, in float32; ``table`` (V, dim): word
    vectors. ``n_frames`` stays on the host, where the layout of convolutions is made of it: to ask
    a GPU for it would wait for all that has been given to it."""
    out: dict = {"valid": {}, "video": {}}
    for key, value in batch.items():
        if key != "n_frames":
            value = value.to(device, non_blocking=True)
        if value.dtype == torch.float16 or not value.is_contiguous():
            value = _float32(value)
        group, _, name = key.partition(".")
        if name:
            out[group][name] = value
        else:
            out[key] = value
    if "words" in out:
        rows = out.pop("words")
        out["text_mask"] = rows >= 0
        out["text"] = table[rows.clamp_min(0)]
    return out


def fill_up(batch: Mapping, audio: int, text: int) -> dict:
    """A batch of :func:`to_device` whose clips are filled up with zeros to ``audio`` frames and
    ``text`` words, as the published evaluation did: convolutions and the maximum over words read
    them like data. What is longer stays so."""
    out = dict(batch)
    if "audio" in out:
        mel, n_frames = out["audio"], out["n_frames"]
        real = torch.arange(mel.shape[2]) < n_frames[:, None, None].cpu()
        mel = mel * real.to(mel.device)
        out["audio"] = F.pad(mel, (0, max(0, audio - mel.shape[2])))
        out["heard"] = torch.full_like(n_frames, out["audio"].shape[2])
    if "text" in out:
        words = out["text"] * out["text_mask"][..., None]
        out["text"] = F.pad(words, (0, 0, 0, max(0, text - words.shape[1])))
        out["text_mask"] = out["text_mask"].new_ones(out["text"].shape[:2])
    return out
