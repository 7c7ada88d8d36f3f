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

from mcn_ext.data.store_file import N_MELS
from mcn_ext.data.store_writer import StoreWriter
from mcn_ext.prepare import SkipList, Skipped, convert
from mcn_ext.prepare.captions import as_text
from mcn_ext.prepare.howto100m import MEL_RATE, as_rows
from mcn_ext.prepare.unpickle import load_pickle

# By command: the data set's name, the keys of a stream and of the captions, the best first.
KINDS = {
    "youcook2": ("YouCook2", {"2d": ["2d"], "3d": ["3d"]}, ["caption"]),
    "msrvtt": (
        "MSR-VTT",
        {"2d": ["2d_pooled", "2d"], "3d": ["3d_pooled", "3d"]},
        ["eval_caption", "caption"],
    ),
}


def _first(item: dict, keys: list[str]):
    """The value of the first of these keys that has one."""
    return next((item[key] for key in keys if item.get(key) is not None), None)


def _array(value, what: str) -> np.ndarray:
    """float32 array of a tensor, an array or a list of numbers; Skipped for anything else."""
    try:
        return np.asarray(value, np.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise Skipped(f"{what} is not an array of numbers ({error})") from error


def _pooled(item: dict, keys: list[str], dim: int) -> np.ndarray:
    """(1, dim) float16."""
    value = _first(item, keys)
    if value is None:
        raise Skipped(f"no {' or '.join(keys)} features")
    features = _array(value, keys[-1])
    if features.shape != (dim,):
        raise Skipped(f"{keys[-1]} has shape {features.shape}, the other clips have ({dim},)")
    return as_rows(features[None], keys[-1])


def _mel(item: dict) -> np.ndarray | None:
    """(frames, 40) float16 dB."""
    if item.get("audio") is None:
        return None
    audio = _array(item["audio"], "audio")
    if audio.ndim != 2 or audio.shape[0] != N_MELS:
        raise Skipped(f"audio has shape {audio.shape}, expected ({N_MELS}, frames)")
    return as_rows(audio.T, "audio")


def _captions(item: dict, keys: list[str]) -> list[str]:
    value = _first(item, keys)
    if value is None:
        raise Skipped(f"no {' or '.join(keys)} in it")
    several = isinstance(value, list) and len(keys) > 1 and value is item.get("caption")
    if several and not value:
        raise Skipped("an empty list of captions")
    return [as_text(text) for text in (value if several else [value])]


def _width(items: list[dict], keys: list[str]) -> int | None:
    """The most common width of a pooled feature; None if no clip has it."""
    values = [_first(item, keys) for item in items]
    widths = Counter(len(v) for v in values if np.ndim(v) == 1 and len(v))
    return widths.most_common(1)[0][0] if widths else None


def prepare(pickle_file: Path, out: Path, *, kind: str = "youcook2", overwrite=False) -> str:
    """Convert a pickle of a kind of ``KINDS``; returns the summary that is printed."""
    label, keys, texts = KINDS[kind]
    if not pickle_file.is_file():
        raise SystemExit(f"{pickle_file}: no such file; expected {label}'s evaluation pickle")
    found = load_pickle(pickle_file)
    items = [item if isinstance(item, dict) else {} for item in found]
    if not isinstance(found, list) or not any(key in item for item in items for key in texts):
        names = ", ".join(options[0] for options in keys.values())
        raise SystemExit(
            f"{pickle_file}: expected a list of dictionaries with {names}, "
            f"audio, {' or '.join(texts)}, id"
        )
    widths = {stream: _width(items, options) for stream, options in keys.items()}
    # Pooled over time already: one row, which every clip's slice contains whatever its length.
    specs = {
        stream: {"dim": dim, "rate_hz": 1.0, "model": "pooled 2D/3D features as found"}
        for stream, dim in widths.items()
        if dim
    }
    pooled = list(specs)
    if not pooled:
        wanted = " or ".join(repr(key) for options in keys.values() for key in options)
        raise SystemExit(f"{pickle_file}: no clip has a pooled feature {wanted} of shape (dim,)")
    if any(item.get("audio") is not None for item in items):
        specs["mel"] = {"dim": N_MELS, "rate_hz": MEL_RATE, "model": "log-mel as found"}
    specs = {name: spec | {"tool": f"mcn_ext.prepare {kind}"} for name, spec in specs.items()}
    source, settings = f"{label} clips from {pickle_file.name}", {"pickle": str(pickle_file)}
    writer = StoreWriter(out, specs, source, overwrite=overwrite, settings=settings)
    clips, repeats = {}, Counter()
    for number, item in enumerate(items):
        try:
            name = as_text(item.get("id", number))
        except Skipped:
            name = str(number)
        repeats[name] += 1  # clips may share an id
        clips[name if repeats[name] == 1 else f"{name}#{repeats[name]}"] = item

    def read(name: str, item: dict):
        rows = {stream: _pooled(item, keys[stream], specs[stream]["dim"]) for stream in pooled}
        rows["mel"], captions = _mel(item), _captions(item, texts)
        frames = 0 if rows["mel"] is None else len(rows["mel"])
        # A silent clip lasts as long as its one pooled row stands for.
        end = frames / MEL_RATE if frames else 1.0
        return rows, ([0.0] * len(captions), [end] * len(captions), captions)

    return convert(writer, SkipList(out), clips, read, unit="clips")
