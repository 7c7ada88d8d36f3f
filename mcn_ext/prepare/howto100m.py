"""HowTo100M feature folders, as the field has them -> store.

List: CSV with header ``path``, rows ``topic/subtopic/VIDEOID``. Features: ``<path>/<id>_2d.npz``
and its variants, key ``features`` or ``arr_0``, (T, dim). Audio: ``<path>/<id>_spec.npz``, key
``arr_0``, (40, frames) dB. Captions: :mod:`mcn_ext.prepare.captions`.
"""

from __future__ import annotations

import csv
import threading
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mcn_ext.prepare import SkipList, Skipped, in_order
from mcn_ext.prepare.captions import Captions
from mcn_ext.store_file import N_MELS
from mcn_ext.store_writer import StoreWriter, mend

MEL_RATE = 100.0  # hop of 160 samples at 16 kHz
MAX_ARRAY_BYTES = 2**31  # 36 hours of ResNet rows, 7 days of spectrogram: beyond, a header lies


def read_list(path: Path) -> list[str]:
    """Video paths of the list, a leading ``None/`` dropped."""
    try:
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            rows = csv.DictReader(file)
            if "path" not in (rows.fieldnames or []):
                raise SystemExit(
                    f"--list {path}: no column 'path' in its first line "
                    f"{str(rows.fieldnames)[:200]}; "
                    "expected a CSV with the header 'path' and rows like topic/subtopic/VIDEOID")
            paths = [mend(row["path"]).strip().removeprefix("None/").strip("/")
                     for row in rows if row["path"]]
    except (OSError, csv.Error) as error:
        raise SystemExit(f"--list {path}: not a CSV file ({error})") from error
    if not paths:
        raise SystemExit(f"--list {path}: lists no video")
    return paths


# CPython 3.11 fails to parse literals, as a header is one, in two threads at a time (SystemError).
_header = threading.Lock()


def _read_npy(file, size: int) -> np.ndarray:
    """The matrix of floats in an open .npy of ``size`` bytes."""
    if size > MAX_ARRAY_BYTES:
        raise Skipped(f"declares {size} bytes")
    read = {(1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0}[np.lib.format.read_magic(file)]
    with _header:
        shape, fortran, dtype = read(file)
    if len(shape) != 2 or dtype.kind != "f" or min(shape) < 1:
        raise Skipped(f"{dtype} array of shape {shape}, expected floats (rows, columns)")
    return np.frombuffer(file.read(), dtype).reshape(shape, order="F" if fortran else "C")


def load_array(path: Path) -> np.ndarray:
    """The (rows, columns) of an .npy, or of an .npz's ``features`` or ``arr_0``, or Skipped."""
    try:
        if path.suffix == ".npy":
            with open(path, "rb") as file:
                array = _read_npy(file, path.stat().st_size)
        else:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                name = next((n for n in ("features.npy", "arr_0.npy") if n in names), None)
                if name is None:
                    raise Skipped(f"holds {names[:9]}, expected 'features' or 'arr_0'")
                with archive.open(name) as file:
                    array = _read_npy(file, archive.getinfo(name).file_size)
    except Exception as error:  # damage makes zip, deflate, lzma and numpy raise a dozen types
        kind = "" if isinstance(error, Skipped) else f"{type(error).__name__}: "
        raise Skipped(f"{path}: {kind}{error}") from error
    with np.errstate(over="ignore"):
        array = array.astype(np.float16)
    if not np.isfinite(array).all():
        raise Skipped(
            f"{path}: {int((~np.isfinite(array)).sum())} values that are NaN, inf or beyond fp16")
    return array


def find_features(folder: Path, path: str, kind: str, bare: bool = False) -> Path | None:
    """The file of one stream of a video under any of the layouts in use.

    bare: the folder holds this stream only, whose files may go without the suffix ``_<kind>``.
    """
    name = path.rsplit("/", 1)[-1]
    candidates = [f"{path}/{name}_{kind}", f"{path}_{kind}", f"{name}_{kind}"]
    if bare:
        candidates += [f"{path}/{name}", f"{path}"]
    candidates = [c + suffix for c in candidates for suffix in (".npz", ".npy")]
    return next((file for c in candidates if (file := folder / c).is_file()), None)


def stream_widths(paths: list[str], find) -> dict[str, int]:
    """{stream: the width most of its first 20 readable files have}, from the first 1000 videos."""
    widths: dict[str, Counter] = {kind: Counter() for kind in ("2d", "3d", "mel")}
    for path in paths[:1000]:
        for kind, seen in widths.items():
            try:
                if seen.total() < 20 and (file := find(path, kind)) is not None:
                    seen[load_array(file).shape[0 if kind == "mel" else 1]] += 1
            except (OSError, Skipped):
                pass  # reported when its turn comes
        if all(seen.total() >= 20 for seen in widths.values()):
            break
    dims = {kind: seen.most_common(1)[0][0] for kind, seen in widths.items() if seen}
    if dims.get("mel", N_MELS) != N_MELS:
        raise SystemExit(f"the spectrograms have {dims['mel']} bands, the audio encoder takes "
                         f"{N_MELS}")
    return dims


def prepare(list_file: Path, features: Path, features_audio: Path | None, captions_file: Path,
            out: Path, *, rates: dict[str, float], workers: int = 4, overwrite: bool = False,
            shard_mib: float = 512) -> str:
    """Convert; returns the summary that is printed. The module's first lines have the formats."""
    for flag, path in (("--list", list_file), ("--features", features),
                       ("--captions", captions_file),
                       *((("--features_audio", features_audio),) if features_audio else ())):
        if not path.exists():
            raise SystemExit(f"{flag} {path}: no such file or folder")
    paths = read_list(list_file)
    audio_folder = features_audio or features

    def find(path: str, kind: str) -> Path | None:
        if kind == "mel":
            return find_features(audio_folder, path, "spec", bare=features_audio is not None)
        return find_features(features, path, kind, bare=kind == "2d")

    dims = stream_widths(paths, find)
    if "2d" not in dims and "3d" not in dims:
        raise SystemExit(
            f"--features {features}: no readable _2d.npz or _3d.npz among the first videos of "
            f"{list_file}; looked for names like "
            f"{features / paths[0]}/{paths[0].split('/')[-1]}_2d.npz")
    models = {"2d": "2D features as found", "3d": "3D features as found", "mel": "log-mel as found"}
    streams = {name: {"dim": dim, "rate_hz": rates[name], "model": models[name],
                      "weights_sha256": "unknown", "tool": "mcn_ext.prepare howto100m"}
               for name, dim in sorted(dims.items())}
    captions = Captions(captions_file)
    writer = StoreWriter(
        out, streams, f"HowTo100M features from {features}", overwrite=overwrite,
        shard_mib=shard_mib, settings={"list": str(list_file), "captions": str(captions_file),
                                       "audio": str(audio_folder)})
    resumed, silent, skips, seen, todo = len(writer.done), 0, SkipList(out), set(), []
    for path in paths:
        name = path.rsplit("/", 1)[-1]
        if name in seen:
            skips.add(name, f"twice in {list_file}")
        elif name not in writer.done:
            todo.append(path)
        seen.add(name)

    def read(path: str):
        name = path.rsplit("/", 1)[-1]
        rows: dict[str, np.ndarray | None] = {}
        for kind in dims:
            try:
                file = find(path, kind)
            except OSError as error:  # a name no file can have
                raise Skipped(f"{path[:99]}: {error.strerror}") from error
            if file is None:
                if kind == "mel":  # silent videos are many, and of use for video and text
                    rows[kind] = None
                    continue
                raise Skipped(f"no {kind} features under {features / path}")
            array = load_array(file)
            if kind == "mel":
                array = array.T
            if array.shape[1] != dims[kind]:
                raise Skipped(f"{file}: width {array.shape[1]}, the other videos have {dims[kind]}")
            rows[kind] = array
        return name, rows, captions.of(name)

    # Workers see files and captions.table only; HDF5 is written by this thread alone.
    for path, result in tqdm(in_order(read, todo, workers), total=len(todo), unit="video",
                             desc="prepare", mininterval=0.5):
        if isinstance(result, Skipped):
            skips.add(path.rsplit("/", 1)[-1], str(result))
            continue
        name, rows, (start, end, text) = result
        silent += "mel" in rows and rows["mel"] is None
        writer.add(name, rows, start, end, text)
    kept = len(writer.done)
    sentence = skips.close()
    if not kept:
        print(sentence)
    store = writer.close()
    again = f" ({resumed} from an earlier, interrupted run)" if resumed else ""
    return (f"{store}: {kept} of {len(paths)} videos{again}, streams "
            + ", ".join(f"{n} {d}" for n, d in dims.items())
            + (f", {silent} without audio" if silent else "") + f"; {sentence}")
