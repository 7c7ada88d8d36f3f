"""Files of features, one per video and stream: finding, reading and checking them."""

from __future__ import annotations

import argparse
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mcn_ext.data.store_file import N_MELS
from mcn_ext.prepare import Skipped, require, skipped
from mcn_ext.train.flags import RATE, between

MEL_RATE = 100.0  # hop of 160 samples at 16 kHz


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


def parse_streams(specs: list[str]) -> dict[str, Files]:
    """NAME=DIR:RATE, each -> {name: its files}."""
    streams = {}
    for spec in specs:
        match = re.fullmatch(r"(\w+)=(.+):([^:]+)", spec)
        try:
            name, folder, rate = match.groups()
            rate = between(float, *RATE)(rate)
        except (AttributeError, ValueError, argparse.ArgumentTypeError):
            raise SystemExit(
                f"--streams {spec}: expected NAME=DIR:RATE, like 3d=features/3d:1.5"
            ) from None
        if name in ("mel", "video", "caption"):
            raise SystemExit(f"--streams {spec}: {name} is not a name for features")
        if name in streams:
            raise SystemExit(f"--streams {spec}: {name} is given twice")
        streams[name] = Files(f"--streams {spec}:", Path(folder), name, rate, bare=True)
    return streams
