"""YouCook2 evaluation pickle (``youcook_val_audio.pkl``) -> store, one caption per cut clip.

A list of dictionaries: pooled ``2d`` and ``3d`` (dim,), ``audio`` (40, T) dB, ``caption``, ``id``.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mcn_ext.prepare import SkipList, Skipped
from mcn_ext.prepare.captions import as_text
from mcn_ext.prepare.howto100m import MEL_RATE
from mcn_ext.prepare.unpickle import load_pickle
from mcn_ext.store_file import N_MELS
from mcn_ext.store_writer import StoreWriter


def _numbers(value) -> np.ndarray:
    """float32 array; Skipped for nested lists, which may be small and unfold to terabytes."""
    if isinstance(value, list) and not all(isinstance(v, (int, float, np.number)) for v in value):
        raise Skipped("nested lists where an array is expected")
    if not isinstance(value, (list, np.ndarray, torch.Tensor)):
        raise Skipped(f"a {type(value).__name__} where an array is expected")
    with np.errstate(over="ignore"):
        return np.asarray(value, np.float32)


def _pooled(item: dict, key: str, dim: int) -> np.ndarray:
    features = _numbers(item[key])
    if features.shape != (dim,):
        raise Skipped(f"{key} has shape {features.shape}, the other clips have ({dim},)")
    with np.errstate(over="ignore"):
        features = features.astype(np.float16)
    if not np.isfinite(features).all():
        raise Skipped(f"{key} has values that are NaN, inf or beyond fp16")
    return features[None]


def _mel(item: dict) -> np.ndarray | None:
    audio = item.get("audio")
    if audio is None:
        return None
    audio = _numbers(audio)
    if audio.ndim != 2 or audio.shape[0] != N_MELS:
        raise Skipped(f"audio has shape {audio.shape}, expected ({N_MELS}, frames)")
    with np.errstate(over="ignore"):
        audio = audio.T.astype(np.float16)
    if not np.isfinite(audio).all():
        raise Skipped("audio has values that are NaN, inf or beyond fp16")
    return audio


def prepare(pickle_file: Path, out: Path, *, overwrite: bool = False) -> str:
    """Convert; returns the summary that is printed."""
    if not pickle_file.is_file():
        raise SystemExit(
            f"{pickle_file}: no such file; expected YouCook2's evaluation pickle, "
            "youcook_val_audio.pkl")
    items = load_pickle(pickle_file)
    if (not isinstance(items, list) or not items
            or not all(isinstance(i, dict) and "caption" in i for i in items)):
        raise SystemExit(
            f"{pickle_file}: expected a list of dictionaries with 2d, 3d, audio, caption, id")
    dims = {}
    for key in ("2d", "3d"):
        widths = Counter(len(value) for item in items if getattr(
            value := item.get(key), "ndim", isinstance(value, list)) == 1 and len(value))
        if widths:
            dims[key] = widths.most_common(1)[0][0]
    if not dims:
        raise SystemExit(
            f"{pickle_file}: no clip has a pooled feature '2d' or '3d' of shape (dim,)")
    # Pooled over time already: one row, which every clip's slice contains whatever its length.
    specs = {key: (dim, 1.0, "pooled 2D/3D features as found") for key, dim in dims.items()}
    if any(item.get("audio") is not None for item in items):
        specs["mel"] = (N_MELS, MEL_RATE, "log-mel as found")
    streams = {name: {"dim": dim, "rate_hz": rate, "model": model,
                      "tool": "mcn_ext.prepare youcook2"}
               for name, (dim, rate, model) in specs.items()}
    writer = StoreWriter(out, streams, f"YouCook2 clips from {pickle_file.name}",
                         overwrite=overwrite, settings={"pickle": str(pickle_file)})
    skips, repeats, silent = SkipList(out), Counter(), 0
    for number, item in enumerate(tqdm(items, unit="clip", desc="prepare", mininterval=0.5)):
        try:
            base = as_text(item.get("id", number))
        except ValueError:
            base = str(number)
        repeats[base] += 1
        name = base if repeats[base] == 1 else f"{base}#{repeats[base]}"  # clips may share an id
        if name in writer.done:
            continue
        try:
            missing = [key for key in dims if item.get(key) is None]
            if missing:
                raise Skipped(f"no {' or '.join(missing)} features")
            rows = {key: _pooled(item, key, dim) for key, dim in dims.items()} | {"mel": _mel(item)}
            caption = as_text(item["caption"])
        except (TypeError, ValueError, RuntimeError, OverflowError) as reason:
            skips.add(name, str(reason))
            continue
        frames = 0 if rows["mel"] is None else len(rows["mel"])
        silent += "mel" in streams and not frames
        writer.add(name, rows, [0.0], [max(frames, 1) / MEL_RATE], [caption])
    kept = len(writer.done)
    sentence = skips.close()
    return (f"{writer.close()}: {kept} of {len(items)} clips, streams "
            + ", ".join(f"{n} {s[0]}" for n, s in specs.items())
            + (f", {silent} without audio" if silent else "") + f"; {sentence}")
