"""Collates clips into a batch, and copies it to the device."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

FRAMES = 16  # DAVEnet halves time four times: batches are padded to a multiple of 2^4 frames


def collate(items: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """Clips of several videos as one flat batch; sound and captions' features are padded with zeros
    to the longest.

    ``audio`` (N, 40, frames) is a view of (N, frames, 40), as spectrograms lie in the store.
    """
    batch = {}
    for key in items[0]:
        values = [item[key] for item in items]
        if key == "audio":
            # Time before mels in memory: as in the store, and as DAVEnet's first product reads it.
            values = _pad([sound.transpose(0, 2, 1) for sound in values], FRAMES)
            batch[key] = torch.from_numpy(values).transpose(1, 2)
        else:
            values = _pad(values) if key in ("text", "text_mask") else np.concatenate(values)
            batch[key] = torch.from_numpy(values)
    return batch


def _pad(arrays: list[np.ndarray], multiple: int = 1) -> np.ndarray:
    """Arrays (n_i, length_i, ...) below each other, zeros after the end of each, up to the longest,
    rounded up to a ``multiple``."""
    longest = -(-max(array.shape[1] for array in arrays) // multiple) * multiple
    shape = (sum(map(len, arrays)), longest, *arrays[0].shape[2:])
    out, first = np.zeros(shape, arrays[0].dtype), 0
    for array in arrays:
        out[first : first + len(array), : array.shape[1]] = array
        first += len(array)
    return out


def to_device(batch: dict[str, Tensor], device: torch.device, table: Tensor | None) -> dict:
    """A flat batch as :class:`~mcn_ext.model.MCN` takes it: features in fp32, words as vectors.

    ``table`` (V, dim): word vectors. "video.2d" becomes out["video"]["2d"]. ``n_frames`` stays on
    the host, where the encoder needs it: asking a GPU for it would wait for all queued kernels.
    """
    out: dict = {}
    for key, value in batch.items():
        if key != "n_frames":
            # From pinned memory the host does not wait for the copy.
            value = value.to(device, non_blocking=True)
        if value.is_floating_point() and value.device.type == "cpu":
            # numpy's memory has huge pages; to get so much from torch takes longer than to fill it.
            value = torch.from_numpy(np.empty(value.shape, np.float32)).copy_(value)
        elif value.is_floating_point():
            value = value.to(torch.float32, memory_format=torch.contiguous_format)
        group, _, name = key.partition(".")
        if name:
            out.setdefault(group, {})[name] = value
        else:
            out[key] = value
    if "words" in out:
        rows = out.pop("words")
        out["text_mask"] = rows >= 0
        # Padding is -1: row 0 takes its place, and text_mask hides it.
        out["text"] = table[rows.clamp_min(0)]
    return out


def fill_up(batch: Mapping, audio: int, text: int) -> dict:
    """A batch of :func:`to_device`, padded with zeros to ``audio`` frames and ``text`` words, which
    then count as data, as in the published evaluation. What is longer stays so."""
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
