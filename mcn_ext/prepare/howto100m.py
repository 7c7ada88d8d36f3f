"""HowTo100M feature folders, as the field has them -> store.

List: CSV with header ``path``, rows ``topic/subtopic/VIDEOID``. Features: ``<path>/<id>_2d.npz``
and its variants, key ``features`` or ``arr_0``, (T, dim). Audio: ``<path>/<id>_spec.npz``, key
``arr_0``, (40, frames) dB. Captions: :mod:`mcn_ext.prepare.captions`.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from mcn_ext.data.store_file import N_MELS
from mcn_ext.data.store_writer import StoreWriter, mend
from mcn_ext.prepare import SkipList, Skipped, convert, require
from mcn_ext.prepare.captions import Captions

MEL_RATE = 100.0  # hop of 160 samples at 16 kHz
LABELS = {"howto100m": "HowTo100M", "crosstask": "CrossTask", "miningyoutube": "MiningYouTube"}


def read_table(path: Path, columns: Sequence[str], example: str) -> list[list[str]]:
    """The ``columns`` of a --list's rows, where the first is not empty; SystemExit if it has not
    these columns."""
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
            reader = csv.DictReader(file)
            if not set(columns) <= set(reader.fieldnames or []):
                raise SystemExit(
                    f"--list {path}: its first line {str(reader.fieldnames)[:200]} has no column "
                    f"{' or '.join(columns)}; expected a CSV with the header "
                    f"'{','.join(columns)}' and rows like {example}"
                )
            rows = [[mend(row[c] or "").strip() for c in columns] for row in reader]
    except (OSError, csv.Error) as error:
        raise SystemExit(f"--list {path}: not a CSV file ({error})") from error
    rows = [row for row in rows if row[0]]
    if not rows:
        raise SystemExit(f"--list {path}: lists no video")
    return rows


def as_rows(array: np.ndarray, what: object) -> np.ndarray:
    """The array as float16; Skipped if a value is NaN, infinite or beyond float16."""
    with np.errstate(over="ignore"):
        array = array.astype(np.float16)
    if not np.isfinite(array).all():
        raise Skipped(f"{what} has values that are NaN, inf or beyond fp16")
    return array


def load_array(
    path: Path, keys: Sequence[str] = ("features", "arr_0"), kinds: str = "f"
) -> np.ndarray:
    """The (rows, columns) of an .npy, or of the first of ``keys`` in an .npz, float16; Skipped for
    damage, dtypes other than numpy's ``kinds``, values that are not finite."""
    try:
        array = np.load(path)  # of numbers alone: it refuses objects
        if not isinstance(array, np.ndarray):
            with array as archive:
                name = next((key for key in keys if key in archive), None)
                if name is None:
                    raise ValueError(f"it holds {archive.files[:9]}, expected {' or '.join(keys)}")
                array = archive[name]
    except Exception as error:  # damage makes zip, deflate, lzma and numpy raise a dozen types
        raise Skipped(f"{path}: not readable ({type(error).__name__}: {error})") from error
    if array.ndim != 2 or array.dtype.kind not in kinds or not array.size:
        raise Skipped(
            f"{path}: {array.dtype} array of shape {array.shape}, expected numbers (n, dim)"
        )
    return as_rows(array, path)


def find_features(folder: Path, path: str, kind: str, bare: bool = False) -> Path | None:
    """The file of one stream of a video under any of the layouts in use.

    bare: the folder holds this stream only, whose files may go without the suffix ``_<kind>``.
    """
    name = path.rsplit("/", 1)[-1]
    names = [f"{path}/{name}_{kind}", f"{path}_{kind}", f"{name}_{kind}"]
    if bare:
        names += [f"{path}/{name}", path]
    files = [folder / f"{name}{suffix}" for name in names for suffix in (".npz", ".npy")]
    try:
        return next((file for file in files if file.is_file()), None)
    except OSError as error:  # a name no file can have
        raise Skipped(f"{path[:99]}: {error.strerror}") from error


class Features:
    """The feature files of videos in ``folder``, and their spectrograms in ``audio`` (default:
    there too).

    bare: streams whose files may go without the suffix ``_<kind>``. keys: {stream: names of its
    array in an .npz, the best first}.
    """

    def __init__(self, folder: Path, audio: Path | None, bare: Sequence[str], **keys):
        require("--features", folder)
        require("--features_audio", audio or folder)
        self.folder, self.audio, self.keys = folder, audio or folder, keys
        self.bare = {*bare, "mel"} if audio else {*bare}

    def load(self, path: str, kind: str) -> tuple[Path, np.ndarray] | None:
        """(file, rows (n, width) float16) of a video's stream; None without a file, or Skipped."""
        folder, suffix = (self.audio, "spec") if kind == "mel" else (self.folder, kind)
        file = find_features(folder, path, suffix, bare=kind in self.bare)
        if file is None:
            return None
        array = load_array(file, self.keys.get(kind, ("features", "arr_0")))
        return file, array.T if kind == "mel" else array

    def widths(self, paths: list[str]) -> dict[str, int]:
        """{stream: the most common width of its first 20 readable files}, from 1000 videos."""

        def of(kind: str):
            for path in paths[:1000]:
                try:
                    if found := self.load(path, kind):
                        yield found[1].shape[1]
                except Skipped:
                    pass  # reported when its turn comes

        counts = {kind: Counter(islice(of(kind), 20)) for kind in ("2d", "3d", "mel")}
        dims = {kind: count.most_common(1)[0][0] for kind, count in counts.items() if count}
        if dims.get("mel", N_MELS) != N_MELS:
            raise SystemExit(
                f"{self.audio}: the spectrograms have {dims['mel']} bands, the audio "
                f"encoder takes {N_MELS}"
            )
        if not dims.keys() & {"2d", "3d"}:
            name = paths[0].split("/")[-1]
            raise SystemExit(
                f"--features {self.folder}: no readable _2d.npz, _3d.npz or .npy of the first "
                f"videos of --list; looked for names like {self.folder / paths[0]}/{name}_2d.npz"
            )
        return dims


def convert_features(
    paths: dict[str, str],
    features: Features,
    captions_of: Callable,
    out: Path,
    skips: SkipList,
    *,
    kind: str,
    rates: dict[str, float],
    settings: dict,
    workers: int = 4,
    before_close: Callable = lambda: None,
    **options,
) -> str:
    """Features {id: path as in the list} and captions -> store; returns the summary.

    captions_of: id -> (start, end, text), or raises Skipped. kind: the command's name. skips: what
    was left out so far. before_close: see :func:`.convert`. options: overwrite, shard_mib.
    """
    dims = features.widths(list(paths.values()))
    streams = {
        name: {
            "dim": dim,
            "rate_hz": rates[name],
            "model": "log-mel as found" if name == "mel" else f"{name.upper()} features as found",
            "tool": f"mcn_ext.prepare {kind}",
        }
        for name, dim in sorted(dims.items())
    }
    writer = StoreWriter(
        out,
        streams,
        f"{LABELS[kind]} features from {features.folder}",
        settings=settings | {"audio": str(features.audio)},
        **options,
    )

    def read(name: str, path: str):
        rows = {}
        for stream, dim in dims.items():
            found = features.load(path, stream)
            if found:
                file, rows[stream] = found
                if rows[stream].shape[1] != dim:
                    width = rows[stream].shape[1]
                    raise Skipped(f"{file}: width {width}, the other videos have {dim}")
            elif stream != "mel":  # silent videos are of use for video and text
                raise Skipped(f"no {stream} features under {features.folder / path}")
        return rows, captions_of(name)

    return convert(writer, skips, paths, read, workers=workers, before_close=before_close)


def prepare(
    list_file: Path,
    features: Path,
    features_audio: Path | None,
    captions: Path,
    out: Path,
    *,
    rates: dict[str, float],
    **options,
) -> str:
    """Convert; returns the summary that is printed. The module's first lines have the formats.

    options: workers, overwrite, shard_mib.
    """
    require("--captions", captions)
    folders, skips, paths = Features(features, features_audio, ["2d"]), SkipList(out), {}
    for (path,) in read_table(list_file, ["path"], "topic/subtopic/VIDEOID"):
        path = path.removeprefix("None/").strip("/")
        name = path.rsplit("/", 1)[-1]
        if name in paths:
            skips.add(name, f"twice in {list_file}")
        else:
            paths[name] = path
    said = Captions(captions, len(paths))
    summary = convert_features(
        paths,
        folders,
        said.of,
        out,
        skips,
        kind="howto100m",
        rates=rates,
        settings={"list": str(list_file), "captions": str(captions)},
        **options,
    )
    return summary + said.summary()
