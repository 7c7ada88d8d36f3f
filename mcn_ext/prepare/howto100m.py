"""HowTo100M feature folders, as the field has them -> store.

List: CSV with header ``path``, rows ``topic/subtopic/VIDEOID``. Features: ``<path>/<id>_2d.npz``
and its variants, key ``features`` or ``arr_0``, (T, dim). Audio: ``<path>/<id>_spec.npz``, key
``arr_0``, (40, frames) dB. Captions: :mod:`mcn_ext.prepare.captions`.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mcn_ext.data.store_file import N_MELS
from mcn_ext.data.store_writer import StoreWriter, mend
from mcn_ext.prepare import SkipList, Skipped, convert, require, skipped
from mcn_ext.prepare.captions import Captions

MEL_RATE = 100.0  # hop of 160 samples at 16 kHz
LABELS = {"howto100m": "HowTo100M", "crosstask": "CrossTask", "miningyoutube": "MiningYouTube"}


def read_table(
    path: Path, columns: Sequence[str], example: str, skips: SkipList
) -> list[tuple[str, list[str]]]:
    """(video id, values of ``columns``) of a --list's rows. Rows without an id are put on
    ``skips``, as are those whose id was there. SystemExit for a file without these columns."""
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
    videos = {}
    for number, row in enumerate(rows, 1):
        row[0] = row[0].removeprefix("None/").strip("/")
        name = row[0].rsplit("/", 1)[-1]
        if not name:
            skips.add("", f"no {columns[0]} in row {number} of {path}")
        elif name in videos:
            skips.add(name, f"twice in {path}")
        else:
            videos[name] = row
    if not videos:
        raise SystemExit(f"--list {path}: lists no video")
    return list(videos.items())


def as_rows(array: np.ndarray, what: object) -> np.ndarray:
    """The array as float16; Skipped if a value is NaN, infinite or beyond float16."""
    with np.errstate(over="ignore"):
        array = array.astype(np.float16)
    if not np.isfinite(array).all():
        raise Skipped(f"{what} has values that are NaN, inf or beyond fp16")
    return array


def load_array(path: Path, kinds: str = "f") -> np.ndarray:
    """The (rows, columns) of an .npy, or of features or arr_0 in an .npz, as float16.

    Skipped for damage, another shape, dtypes not of numpy's ``kinds``, values that are not finite.
    """
    try:
        array = np.load(path)  # of numbers alone: it refuses objects
        if not isinstance(array, np.ndarray):
            with array as archive:
                names = [key for key in ("features", "arr_0") if key in archive]
                if not names:
                    raise ValueError(f"it holds {archive.files[:9]}, expected features or arr_0")
                array = archive[names[0]]
    except Exception as error:  # damage makes zip, deflate, lzma and numpy raise a dozen types
        raise skipped(path, error) from error
    if array.ndim != 2 or array.dtype.kind not in kinds or not array.size:
        raise Skipped(
            f"{path}: {array.dtype} array of shape {array.shape}, expected numbers (n, dim)"
        )
    return as_rows(array, path)


@dataclass
class Files:
    """The files of one stream: ``<path>/<id>_<suffix>.npz`` and its variants in ``folder``.

    flag: what the folder was given as. bare: names may go without ``_<suffix>``, too, as no other
    stream does so in this folder.
    """

    flag: str
    folder: Path
    suffix: str
    rate_hz: float
    bare: bool = False

    def __post_init__(self):
        require(self.flag, self.folder)

    def find(self, path: str) -> Path | None:
        """The file of a video, under any of the layouts in use."""
        name = path.rsplit("/", 1)[-1]
        names = [f"{path}/{name}_{self.suffix}", f"{path}_{self.suffix}", f"{name}_{self.suffix}"]
        if self.bare:
            names += [f"{path}/{name}", path]
        files = [self.folder / f"{name}{ending}" for name in names for ending in (".npz", ".npy")]
        try:
            return next((file for file in files if file.is_file()), None)
        except OSError as error:  # a name no file can have
            raise skipped(path[:99], error) from error

    def load(self, path: str) -> tuple[Path, np.ndarray] | None:
        """(file, rows (n, width) float16) of a video; None without a file, or Skipped."""
        file = self.find(path)
        if file is None:
            return None
        array = load_array(file)
        return file, array.T if self.suffix == "spec" else array


def feature_files(
    features: Path, audio: Path | None, rate_2d: float, rate_3d: float, bare: str | None
) -> dict[str, Files]:
    """The files of each stream, by the flags of kinds that read folders of features.

    bare: which of 2d and 3d may go without its suffix.
    """
    return {
        "2d": Files("--features", features, "2d", rate_2d, bare == "2d"),
        "3d": Files("--features", features, "3d", rate_3d, bare == "3d"),
        "mel": Files("--features_audio", audio or features, "spec", MEL_RATE, audio is not None),
    }


def find_widths(streams: dict[str, Files], paths: list[str]) -> dict[str, int]:
    """{stream: the most common width of its first 20 readable files} of 1000 videos.

    SystemExit for a stream that has files, of which none can be read: it would vanish.
    """
    dims = {}
    for name, files in streams.items():
        widths, unreadable = Counter(), []
        for path in paths[:1000]:
            try:
                if found := files.load(path):
                    widths[found[1].shape[1]] += 1
            except Skipped as reason:  # reported when its turn comes, if others can be read
                unreadable.append(reason)
            if sum(widths.values()) == 20:
                break
        if widths:
            dims[name] = widths.most_common(1)[0][0]
        elif unreadable:
            raise SystemExit(
                f"{files.flag} {files.folder}: of the {name} files of {len(unreadable)} videos "
                f"none can be read, the first because of {unreadable[0]}. Correct them; to go on "
                "without this stream, move its files elsewhere"
            )
    if dims.get("mel", N_MELS) != N_MELS:
        raise SystemExit(
            f"{streams['mel'].folder}: the spectrograms have {dims['mel']} bands, the audio "
            f"encoder takes {N_MELS}"
        )
    return dims


def load_rows(
    streams: dict[str, Files], dims: dict[str, int], path: str
) -> dict[str, np.ndarray | None]:
    """{stream: rows (n, dim) float16, or None without a file} of a video; Skipped if one does not
    fit the others."""
    rows = {}
    for name, files in streams.items():
        found = files.load(path)
        if found and name not in dims:
            raise Skipped(
                f"{found[0]}: the first 1000 videos have no {name} file; list this one before them"
            )
        if found and found[1].shape[1] != dims[name]:
            width = found[1].shape[1]
            raise Skipped(f"{found[0]}: width {width}, the other videos have {dims[name]}")
        rows[name] = found and found[1]
    return rows


def convert_features(
    paths: dict[str, str],
    streams: dict[str, Files],
    captions_of: Callable,
    out: Path,
    skips: SkipList,
    *,
    kind: str,
    settings: dict,
    workers: int = 4,
    before_close: Callable = lambda: None,
    **options,
) -> str:
    """Features {id: path as in the list} and captions -> store; returns the summary.

    captions_of: id -> (start, end, text), or raises Skipped. kind: the command's name. skips: what
    was left out so far. before_close: see :func:`.convert`. options: overwrite, shard_mib.
    """
    dims, folder = find_widths(streams, list(paths.values())), streams["2d"].folder
    if not dims.keys() & {"2d", "3d"}:
        path = next(iter(paths.values()))
        raise SystemExit(
            f"--features {folder}: no _2d.npz, _3d.npz or .npy of the first videos of --list; "
            f"looked for names like {folder / path}/{path.split('/')[-1]}_2d.npz"
        )
    specs = {
        name: {
            "dim": dim,
            "rate_hz": streams[name].rate_hz,
            "model": "log-mel as found" if name == "mel" else f"{name.upper()} features as found",
            "tool": f"mcn_ext.prepare {kind}",
        }
        for name, dim in sorted(dims.items())
    }
    source = f"{LABELS[kind]} features from {folder}"
    settings = settings | {"audio": str(streams["mel"].folder)}
    writer = StoreWriter(out, specs, source, settings=settings, **options)

    def read(name: str, path: str):
        rows = load_rows(streams, dims, path)
        for stream in dims.keys() - {"mel"}:  # silent videos are of use for video and text
            if rows[stream] is None:
                raise Skipped(f"no {stream} features under {folder / path}")
        return rows, captions_of(name)

    return convert(writer, skips, paths, read, workers=workers, before_close=before_close)


def prepare(
    list_file: Path,
    features: Path,
    features_audio: Path | None,
    captions: Path,
    out: Path,
    *,
    rate_2d: float,
    rate_3d: float,
    **options,
) -> str:
    """Convert; returns the summary that is printed. The module's first lines have the formats.

    options: workers, overwrite, shard_mib.
    """
    require("--captions", captions)
    streams, skips = feature_files(features, features_audio, rate_2d, rate_3d, "2d"), SkipList(out)
    rows = read_table(list_file, ["path"], "topic/subtopic/VIDEOID", skips)
    said = Captions(captions, len(rows))
    summary = convert_features(
        {name: path for name, (path,) in rows},
        streams,
        said.of,
        out,
        skips,
        kind="howto100m",
        settings={"list": str(list_file), "captions": str(captions)},
        **options,
    )
    return summary + said.summary()
