"""Evaluation pickles of cut clips -> store: YouCook2 (``youcook_val_audio.pkl``) and MSR-VTT.

A list of dictionaries with ``audio`` (40, T) dB or None, ``id``, and by data set

- YouCook2: pooled ``2d`` and ``3d`` (dim,), one ``caption``;
- MSR-VTT: pooled ``2d_pooled`` and ``3d_pooled`` (dim,), else ``2d`` and ``3d`` where these have
  one axis; ``eval_caption``, the one caption of an evaluation clip, else ``caption``, a text or
  the list of some 20, each of which becomes a caption of the whole clip.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mcn_ext.data.store_file import N_MELS
from mcn_ext.data.store_writer import StoreWriter
from mcn_ext.prepare import SkipList, Skipped, finish
from mcn_ext.prepare.captions import as_text
from mcn_ext.prepare.howto100m import MEL_RATE
from mcn_ext.prepare.unpickle import load_pickle

# By command: the data set's name, where a stream's and the captions' values are, the best first.
KINDS = {
    "youcook2": ("YouCook2", {"2d": ["2d"], "3d": ["3d"]}, ["caption"]),
    "msrvtt": (
        "MSR-VTT",
        {"2d": ["2d_pooled", "2d"], "3d": ["3d_pooled", "3d"]},
        ["eval_caption", "caption"],
    ),
}


def _numbers(value) -> np.ndarray:
    """float32 array; Skipped for nested lists, which may be small and unfold to terabytes."""
    if isinstance(value, list) and not all(isinstance(v, (int, float, np.number)) for v in value):
        raise Skipped("nested lists where an array is expected")
    if not isinstance(value, (list, np.ndarray, torch.Tensor)):
        raise Skipped(f"a {type(value).__name__} where an array is expected")
    with np.errstate(over="ignore"):
        return np.asarray(value, np.float32)


def _first(item: dict, keys: list[str]):
    """The value of the first of these keys that has one."""
    return next((item[key] for key in keys if item.get(key) is not None), None)


def _pooled(item: dict, keys: list[str], dim: int) -> np.ndarray:
    value = _first(item, keys)
    if value is None:
        raise Skipped(f"no {' or '.join(keys)} features")
    features = _numbers(value)
    if features.shape != (dim,):
        raise Skipped(f"{keys[-1]} has shape {features.shape}, the other clips have ({dim},)")
    with np.errstate(over="ignore"):
        features = features.astype(np.float16)
    if not np.isfinite(features).all():
        raise Skipped(f"{keys[-1]} has values that are NaN, inf or beyond fp16")
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


def _captions(item: dict, keys: list[str]) -> list[str]:
    value = _first(item, keys)
    if value is None:
        raise Skipped(f"no {' or '.join(keys)} in it")
    if len(keys) > 1 and value is item.get("caption") and isinstance(value, list):
        if not value:
            raise Skipped("an empty list of captions")
        return [as_text(text) for text in value]
    return [as_text(value)]


def prepare(
    pickle_file: Path, out: Path, *, kind: str = "youcook2", overwrite: bool = False
) -> str:
    """Convert a pickle of a kind of ``KINDS``; returns the summary that is printed."""
    label, keys, texts = KINDS[kind]
    if not pickle_file.is_file():
        raise SystemExit(
            f"{pickle_file}: no such file; expected {label}'s evaluation pickle"
            + (", youcook_val_audio.pkl" if kind == "youcook2" else "")
        )
    items = load_pickle(pickle_file)
    if not isinstance(items, list) or not any(
        isinstance(i, dict) and any(key in i for key in texts) for i in items
    ):
        names = [key for options in keys.values() for key in options[:1]]
        raise SystemExit(
            f"{pickle_file}: expected a list of dictionaries with {', '.join(names)}, "
            f"audio, {' or '.join(texts)}, id"
        )
    items = [item if isinstance(item, dict) else {} for item in items]  # those are skipped, by name
    dims = {}
    for stream, options in keys.items():
        widths = Counter(
            len(value)
            for item in items
            if getattr(value := _first(item, options), "ndim", isinstance(value, list)) == 1
            and len(value)
        )
        if widths:
            dims[stream] = widths.most_common(1)[0][0]
    if not dims:
        wanted = " or ".join(f"'{key}'" for options in keys.values() for key in options)
        raise SystemExit(f"{pickle_file}: no clip has a pooled feature {wanted} of shape (dim,)")
    # Pooled over time already: one row, which every clip's slice contains whatever its length.
    specs = {name: (dim, 1.0, "pooled 2D/3D features as found") for name, dim in dims.items()}
    if any(item.get("audio") is not None for item in items):
        specs["mel"] = (N_MELS, MEL_RATE, "log-mel as found")
    streams = {
        name: {"dim": dim, "rate_hz": rate, "model": model, "tool": f"mcn_ext.prepare {kind}"}
        for name, (dim, rate, model) in specs.items()
    }
    writer = StoreWriter(
        out,
        streams,
        f"{label} clips from {pickle_file.name}",
        overwrite=overwrite,
        settings={"pickle": str(pickle_file)},
    )
    skips, repeats, silent, resumed = SkipList(out), Counter(), 0, len(writer.done)
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
            rows = {stream: _pooled(item, keys[stream], dim) for stream, dim in dims.items()}
            rows["mel"], captions = _mel(item), _captions(item, texts)
        except (TypeError, ValueError, RuntimeError, OverflowError) as reason:
            skips.add(name, str(reason))
            continue
        frames = 0 if rows["mel"] is None else len(rows["mel"])
        silent += "mel" in streams and not frames
        # A silent clip lasts as long as its one pooled row stands for.
        writer.add(
            name,
            rows,
            [0.0] * len(captions),
            [frames / MEL_RATE if frames else 1.0] * len(captions),
            captions,
        )
    return finish(
        writer,
        skips,
        len(items),
        {name: spec[0] for name, spec in specs.items()},
        unit="clips",
        resumed=resumed,
        without={"audio": silent},
    )
