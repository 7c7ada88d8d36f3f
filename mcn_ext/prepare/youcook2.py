"""Evaluation pickles of cut clips -> store: YouCook2 (``youcook_val_audio.pkl``) and MSR-VTT.

A list of dictionaries with ``audio`` (40, T) dB or None, ``id``, and by data set

- YouCook2: pooled ``2d`` and ``3d`` (dim,), one ``caption``;
- MSR-VTT: pooled ``2d_pooled`` and ``3d_pooled`` (dim,), else ``2d`` and ``3d`` where these have
  one axis; ``eval_caption``, the one caption of an evaluation clip, else ``caption``, a text or
  the list of some 20, each of which becomes a caption of the whole clip.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np

from mcn_ext.data.store_file import N_MELS
from mcn_ext.data.store_writer import StoreWriter
from mcn_ext.data.unpickle import load_pickle
from mcn_ext.prepare import SkipList, Skipped, convert
from mcn_ext.prepare.captions import as_text
from mcn_ext.prepare.features import MEL_RATE, as_rows, find_specs, load_rows, parse_streams

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
        with np.errstate(over="ignore"):
            return np.asarray(value, np.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise Skipped(f"{what} is not an array of numbers ({error})") from error


def _pooled(item: dict, keys: list[str], dim: int) -> np.ndarray:
    """(1, dim) float16 of a feature pooled over time."""
    if (value := _first(item, keys)) is None:
        raise Skipped(f"no {' or '.join(keys)} features")
    array = _array(value, keys[-1])
    if array.shape != (dim,):
        raise Skipped(f"{keys[-1]} has shape {array.shape}, the other clips have {(dim,)}")
    return as_rows(array, keys[-1])[None]


def _spectrogram(value) -> np.ndarray:
    """(frames, 40) float16."""
    array = _array(value, "audio")
    if array.ndim != 2 or array.shape[0] != N_MELS:
        raise Skipped(f"audio has shape {array.shape}, expected {N_MELS} bands x frames")
    return as_rows(array, "audio").T


def _captions(item: dict, keys: list[str]) -> list[str]:
    value = _first(item, keys)
    if value is None:
        raise Skipped(f"no {' or '.join(keys)} in it")
    several = len(keys) > 1 and value is item.get("caption")
    several = several and isinstance(value, (list, tuple, np.ndarray))
    if several and not len(value):
        raise Skipped("an empty list of captions")
    return [as_text(text) for text in (value if several else [value])]


def _shape(value) -> tuple[int, ...]:
    try:
        return _array(value, "").shape
    except Skipped:  # reported when its turn comes
        return ()


def _width(items: list[dict], keys: list[str], where: object) -> int | None:
    """The most common width of a pooled feature; None if no clip has any. SystemExit if all there
    are have another shape: the stream would vanish."""
    values = [value for item in items if (value := _first(item, keys)) is not None]
    shapes = Counter(map(_shape, values)).most_common()
    width = next((shape[0] for shape, _ in shapes if len(shape) == 1 and shape[0]), None)
    if shapes and width is None:
        raise SystemExit(
            f"{where}: {' or '.join(keys)} have the shape {shapes[0][0]} in most clips, and (dim,) "
            "in none; expected features that are pooled over time"
        )
    return width


def _by_id(items: list[dict]) -> dict[str, dict]:
    """The clips by names of their own: ids, with #2 and so on where clips share one."""
    clips, repeats = {}, Counter()
    for number, item in enumerate(items):
        try:
            name = unique = as_text(item.get("id", number))
        except Skipped:
            name = unique = str(number)
        while unique in clips:  # another clip may be called x#2
            repeats[name] += 1
            unique = f"{name}#{repeats[name] + 1}"
        clips[unique] = item
    return clips


def _key(name: str, caption: str) -> tuple[str, str]:
    """A clip, by its video (11 characters of YouTube's id) and its caption."""
    return name[:11], " ".join(caption.lower().split())


def _read_speech(path: Path) -> dict[str | tuple[str, str], str]:
    """Texts of a file of what is said in clips, by id, and by :func:`_key` where an entry tells the
    caption. SystemExit for any other file."""
    found = {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(entries, dict):
            return {name: as_text(text) for name, text in entries.items()}
        for entry in entries:
            name, text = as_text(entry["video_id"]), as_text(entry["subtitle"])
            found[name] = text
            if "desc" in entry:
                found[_key(name, as_text(entry["desc"]))] = text
    except Exception as error:  # of any JSON but the right one, a dozen types
        raise SystemExit(
            f'--speech {path}: expected JSON {{id: text}}, or a list of {{"video_id": id, '
            f'"subtitle": text}} ({type(error).__name__}: {error})'
        ) from error
    return found


def _match_speech(path: Path, clips: dict[str, dict], keys: list[str]) -> dict[str, str]:
    """{id of a clip: the words spoken in it, "" for none}. SystemExit if none has any."""
    found, said = _read_speech(path), {}
    for name, item in clips.items():
        # Ids of YouCook2's pickle name the video alone: its clips are told apart by captions.
        said[name] = found.get(_key(name, str(_first(item, keys)))) or found.get(name, "")
    if not any(said.values()):
        raise SystemExit(
            f"--speech {path}: nothing in it is of these clips: its ids are like "
            f"{next((key for key in found if isinstance(key, str)), None)}, the clips' like "
            f"{next(iter(clips), None)}"
        )
    return said


def prepare(
    pickle_file: Path,
    out: Path,
    *,
    kind: str = "youcook2",
    streams: list[str] = (),
    speech: Path | None = None,
    overwrite: bool = False,
) -> str:
    """Convert a pickle of a kind of ``KINDS``; returns the summary that is printed.

    streams: features over the clips by their ids, in place of the pickle's of that name.
    speech: a file of the words spoken in the clips.
    """
    label, keys, texts = KINDS[kind]
    files = parse_streams(streams)
    for of_stream in files.values():
        of_stream.pooled = True
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
    clips = _by_id(items)
    widths = {
        name: _width(items, options, pickle_file)
        for name, options in keys.items()
        if name not in files
    }
    # Pooled over time already: one row, which every clip's slice contains whatever its length.
    specs = {
        stream: {"dim": dim, "rate_hz": 1.0, "model": "pooled 2D/3D features as found"}
        for stream, dim in widths.items()
        if dim
    }
    pooled = list(specs)
    if not pooled and not files:
        wanted = " or ".join(repr(key) for options in keys.values() for key in options)
        raise SystemExit(f"{pickle_file}: no clip has a pooled feature {wanted} of shape (dim,)")
    if any(item.get("audio") is not None for item in items):
        specs["mel"] = {"dim": N_MELS, "rate_hz": MEL_RATE, "model": "log-mel as found"}
    specs = {name: spec | {"tool": f"mcn_ext.prepare {kind}"} for name, spec in specs.items()}
    specs |= find_specs(files, list(clips), kind)
    source = f"{label} clips from {pickle_file.name}"
    settings = {"pickle": str(pickle_file), "streams": sorted(streams)}
    said, note = {}, ""
    if speech:
        said, settings["speech"] = _match_speech(speech, clips, texts), str(speech)
        note = f", {sum(map(bool, said.values()))} with words spoken"
    writer = StoreWriter(
        out, specs, source, overwrite=overwrite, settings=settings, speech=bool(speech)
    )

    def read(name: str, item: dict):
        rows = load_rows(files, specs, name)
        if item.get("audio") is not None:
            rows["mel"] = _spectrogram(item["audio"])
        seconds = [len(rows[s]) / specs[s]["rate_hz"] for s in rows if rows[s] is not None]
        end = max(seconds, default=0) or 1.0  # else the time of the pooled row
        for stream in pooled:
            rows[stream] = _pooled(item, keys[stream], specs[stream]["dim"])
        captions = _captions(item, texts)
        ends = [end] * len(captions)
        return rows, ([0.0] * len(captions), ends, captions, said.get(name, ""))

    return convert(writer, SkipList(out), clips, read, unit="clips", note=note)
