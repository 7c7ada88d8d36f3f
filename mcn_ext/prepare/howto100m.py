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
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mcn_ext.data.store import Store
from mcn_ext.data.store_file import N_MELS
from mcn_ext.data.store_writer import StoreWriter, mend
from mcn_ext.prepare import SkipList, Skipped, finish, in_order
from mcn_ext.prepare.captions import Captions

MEL_RATE = 100.0  # hop of 160 samples at 16 kHz
MAX_ARRAY_BYTES = 2**31  # 36 hours of ResNet rows, 7 days of spectrogram: beyond, a header lies


def read_table(path: Path, columns: Sequence[str], example: str) -> list[list[str]]:
    """The ``columns`` of the rows of a --list whose first is not empty; SystemExit for another
    file."""
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
            rows = csv.DictReader(file)
            for column in columns:
                if column not in (rows.fieldnames or []):
                    raise SystemExit(
                        f"--list {path}: no column '{column}' in its first line "
                        f"{str(rows.fieldnames)[:200]}; expected a CSV with the header "
                        f"'{','.join(columns)}' and rows like {example}"
                    )
            table = [
                [mend(row[column] or "").strip() for column in columns]
                for row in rows
                if row[columns[0]]
            ]
    except (OSError, csv.Error) as error:
        raise SystemExit(f"--list {path}: not a CSV file ({error})") from error
    if not table:
        raise SystemExit(f"--list {path}: lists no video")
    return table


def read_list(path: Path) -> list[str]:
    """Video paths of the list, a leading ``None/`` dropped."""
    return [
        row[0].removeprefix("None/").strip("/")
        for row in read_table(path, ["path"], "topic/subtopic/VIDEOID")
    ]


# CPython 3.11 fails to parse literals, as a header is one, in two threads at a time (SystemError).
_header = threading.Lock()


def _read_npy(file, size: int, kinds: str) -> np.ndarray:
    """The matrix of numbers of these kinds in an open .npy of ``size`` bytes."""
    if size > MAX_ARRAY_BYTES:
        raise Skipped(f"declares {size} bytes")
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[np.lib.format.read_magic(file)]
    with _header:
        shape, fortran, dtype = read(file)
    if len(shape) != 2 or dtype.kind not in kinds or min(shape) < 1:
        raise Skipped(
            f"{dtype} array of shape {shape}, expected "
            f"{'floats' if kinds == 'f' else 'numbers'} (rows, columns)"
        )
    return np.frombuffer(file.read(), dtype).reshape(shape, order="F" if fortran else "C")


def load_array(
    path: Path, keys: Sequence[str] = ("features", "arr_0"), kinds: str = "f"
) -> np.ndarray:
    """The (rows, columns) of an .npy, or of the first of ``keys`` in an .npz, float16; Skipped for
    damage, other dtypes than numpy's ``kinds``, values that are not finite."""
    try:
        if path.suffix == ".npy":
            with open(path, "rb") as file:
                array = _read_npy(file, path.stat().st_size, kinds)
        else:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                name = next((f"{key}.npy" for key in keys if f"{key}.npy" in names), None)
                if name is None:
                    raise Skipped(f"holds {names[:9]}, expected {' or '.join(map(repr, keys))}")
                with archive.open(name) as file:
                    array = _read_npy(file, archive.getinfo(name).file_size, kinds)
    except (Skipped, FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise Skipped(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    except Exception as error:  # damage makes zip, deflate, lzma and numpy raise a dozen types
        raise Skipped(f"{path}: damaged or cut off ({type(error).__name__}: {error})") from error
    with np.errstate(over="ignore"):
        array = array.astype(np.float16)
    if not np.isfinite(array).all():
        raise Skipped(
            f"{path}: {int((~np.isfinite(array)).sum())} values that are NaN, inf or beyond fp16"
        )
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


class Features:
    """The feature files of videos, ``folder``, and their spectrograms, ``audio`` (default: there).

    bare: streams whose files may go without the suffix ``_<kind>``. keys: {stream: names of its
    array in an .npz, the first there is}.
    """

    def __init__(
        self,
        folder: Path,
        audio: Path | None,
        bare: Sequence[str],
        keys: dict[str, Sequence[str]] | None = None,
    ):
        for flag, path in (("--features", folder), ("--features_audio", audio or folder)):
            if not path.exists():
                raise SystemExit(f"{flag} {path}: no such file or folder")
        self.folder, self.audio, self.keys = folder, audio or folder, keys or {}
        self.bare = {*bare, "mel"} if audio else {*bare}

    def load(self, path: str, kind: str) -> tuple[Path, np.ndarray] | None:
        """(file, rows (n, width) float16) of a video's stream; None without a file, or Skipped."""
        folder, suffix = (self.audio, "spec") if kind == "mel" else (self.folder, kind)
        try:
            file = find_features(folder, path, suffix, bare=kind in self.bare)
        except OSError as error:  # a name no file can have
            raise Skipped(f"{path[:99]}: {error.strerror}") from error
        if file is None:
            return None
        array = load_array(file, self.keys.get(kind, ("features", "arr_0")))
        return file, array.T if kind == "mel" else array

    def widths(self, paths: list[str]) -> dict[str, int]:
        """{stream: the width most of its first 20 readable files have}, from the first 1000
        videos."""
        widths: dict[str, Counter] = {kind: Counter() for kind in ("2d", "3d", "mel")}
        for path in paths[:1000]:
            for kind, seen in widths.items():
                try:
                    if seen.total() < 20 and (found := self.load(path, kind)) is not None:
                        seen[found[1].shape[1]] += 1
                except Skipped:
                    pass  # reported when its turn comes
            if all(seen.total() >= 20 for seen in widths.values()):
                break
        dims = {kind: seen.most_common(1)[0][0] for kind, seen in widths.items() if seen}
        if dims.get("mel", N_MELS) != N_MELS:
            raise SystemExit(
                f"{self.audio}: the spectrograms have {dims['mel']} bands, the audio "
                f"encoder takes {N_MELS}"
            )
        return dims


def convert(
    paths: list[str],
    features: Features,
    said: Callable,
    out: Path,
    *,
    kind: str,
    label: str,
    rates: dict[str, float],
    settings: dict,
    skips: SkipList,
    workers: int = 4,
    overwrite: bool = False,
    shard_mib: float = 512,
    before_close: Callable | None = None,
) -> str:
    """Videos, features and captions -> store; resumes, skips what is damaged, shows progress.

    Args:
        paths: videos as in the list; the last part of each is its id.
        said: (id, {stream: rows}) -> (start, end, text) of the captions, or raises Skipped.
        kind, label: the command's and the data set's name. skips: what was left out so far.
        before_close: called with {id: {stream: number of rows}} before the store is there.

    Returns the summary that is printed.
    """
    dims = features.widths(paths)
    if "2d" not in dims and "3d" not in dims:
        name = paths[0].split("/")[-1]
        raise SystemExit(
            f"--features {features.folder}: no readable _2d.npz, _3d.npz or .npy among the first "
            f"videos of {settings['list']}; looked for names like "
            f"{features.folder / paths[0]}/{name}_2d.npz"
        )
    models = {"2d": "2D features as found", "3d": "3D features as found", "mel": "log-mel as found"}
    streams = {
        name: {
            "dim": dim,
            "rate_hz": rates[name],
            "model": models[name],
            "weights_sha256": "unknown",
            "tool": f"mcn_ext.prepare {kind}",
        }
        for name, dim in sorted(dims.items())
    }
    writer = StoreWriter(
        out,
        streams,
        f"{label} features from {features.folder}",
        overwrite=overwrite,
        shard_mib=shard_mib,
        settings=settings | {"audio": str(features.audio)},
    )
    lengths: dict[str, dict[str, int]] = {}
    if writer.done and before_close:
        earlier = Store(writer.folder)
        for stream in dims:
            for name, rows in zip(earlier.ids(), earlier.row_counts(stream), strict=True):
                lengths.setdefault(name, {})[stream] = int(rows)
    total, resumed, silent = len(skips.rows) + len(paths), len(writer.done), 0
    seen, todo = set(), []
    for path in paths:
        name = path.rsplit("/", 1)[-1]
        if name in seen:
            skips.add(name, f"twice in {settings['list']}")
        elif name not in writer.done:
            todo.append(path)
        seen.add(name)

    def read(path: str):
        name = path.rsplit("/", 1)[-1]
        rows: dict[str, np.ndarray | None] = {}
        for stream, dim in dims.items():
            found = features.load(path, stream)
            if found is None:
                if stream == "mel":  # silent videos are many, and of use for video and text
                    rows[stream] = None
                    continue
                raise Skipped(f"no {stream} features under {features.folder / path}")
            file, array = found
            if array.shape[1] != dim:
                raise Skipped(f"{file}: width {array.shape[1]}, the other videos have {dim}")
            rows[stream] = array
        return name, rows, said(name, rows)

    # Workers see files and captions only; HDF5 is written by this thread alone.
    for path, result in tqdm(
        in_order(read, todo, workers),
        total=len(todo),
        unit="video",
        desc="prepare",
        mininterval=0.5,
    ):
        if isinstance(result, Skipped):
            skips.add(path.rsplit("/", 1)[-1], str(result))
            continue
        name, rows, captions = result
        silent += "mel" in rows and rows["mel"] is None
        if before_close:  # else a million videos' for nothing
            lengths[name] = {s: 0 if array is None else len(array) for s, array in rows.items()}
        writer.add(name, rows, *captions)
    if before_close and writer.done:
        before_close(lengths)
    return finish(writer, skips, total, dims, resumed=resumed, without={"audio": silent})


def prepare(
    list_file: Path,
    features: Path,
    features_audio: Path | None,
    captions_file: Path,
    out: Path,
    *,
    rates: dict[str, float],
    workers: int = 4,
    overwrite: bool = False,
    shard_mib: float = 512,
) -> str:
    """Convert; returns the summary that is printed. The module's first lines have the formats."""
    for flag, path in (("--list", list_file), ("--captions", captions_file)):
        if not path.exists():
            raise SystemExit(f"{flag} {path}: no such file or folder")
    folders = Features(features, features_audio, bare=["2d"])
    paths, captions = read_list(list_file), Captions(captions_file)
    return convert(
        paths,
        folders,
        lambda name, _: captions.of(name),
        out,
        kind="howto100m",
        label="HowTo100M",
        rates=rates,
        workers=workers,
        overwrite=overwrite,
        shard_mib=shard_mib,
        skips=SkipList(out),
        settings={"list": str(list_file), "captions": str(captions_file)},
    )
