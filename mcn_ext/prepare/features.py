"""Files of features, one per video and stream: finding, reading and checking them.

A file is named by its id, as ``ID.npz`` or ``ID_<stream>.npz``, in folders at any depth or, of
``--streams``, in uncompressed ``.tar`` archives, of which members are read in place. ``.npz`` and
``.npy`` are numpy's; ``.pt``, ``.pth`` and ``.pth.tar`` are files of torch.save.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from mcn_ext.console import printable
from mcn_ext.data.store_file import N_MELS
from mcn_ext.data.unpickle import load_torch
from mcn_ext.modalities import modality_of
from mcn_ext.prepare import Skipped, in_order, require, skipped, walk
from mcn_ext.train.flags import RATE, between

MEL_RATE = 100.0  # hop of 160 samples at 16 kHz
REFUSED = -1  # the offset of links and sparse members of a tar, which are not read
_TORCH = (".pt", ".pth", ".pth.tar")
_NAME = re.compile(r"(?s:(.+))(\.np[yz]|\.pth?|\.pth\.tar)")


class Place(NamedTuple):
    """Where a file of features lies: ``folder`` is a folder, or a tar, of which it is the ``size``
    bytes from ``offset`` on. ``ending``: of its name, such as .npz."""

    folder: str
    ending: str
    offset: int | None = None  # None: not in a tar
    size: int = 0


Index = dict[str, Place]  # by name without ending; of names that are twice, also by their paths


# ------------------------------------------------------------------------------------- finding


def _members(tar: str) -> list[tuple[str, int, int]]:
    """(name, first byte, bytes) of a tar's files, of headers alone; SystemExit for damage."""
    found = []
    try:
        with open(tar, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            while member := archive.next():
                archive.members.clear()  # it would keep all
                if member.size < 0:
                    raise tarfile.ReadError(f"{member.name} has {member.size} bytes")
                if not member.isdir():
                    whole = member.isreg() and not member.issparse()
                    at = member.offset_data if whole else REFUSED
                    found.append((member.name.rsplit("/", 1)[-1], at, member.size))
            # tarfile takes a damaged header for the end, which is zeros.
            file.seek(archive.offset)
            if file.read(512) != bytes(512):
                raise tarfile.ReadError(f"no header and no end at byte {archive.offset}")
            while block := file.read(2**20):
                if block.strip(b"\0"):
                    raise tarfile.ReadError("more behind its end, as of tars that were joined")
    except (OSError, ValueError, tarfile.TarError) as error:
        raise SystemExit(
            f"{tar}: not a whole, uncompressed tar ({error}); get it again, or move it elsewhere "
            "to go on without its videos"
        ) from error
    return found


def index(flag: str, folder: Path, archives: bool = False) -> Index:
    """Finds the files of features below a folder and, if ``archives``, in the tars there; or in one
    tar. Of a name that is there twice, the one where the list says counts, else the first: files
    before tars, each by path."""
    require(flag, folder)
    found, tars, again = {}, [], []
    bar = tqdm(desc=f"files in {printable(folder)}", unit="", delay=1, leave=False)

    def add(name: str, place: str, offset: int | None = None, size: int = 0) -> None:
        bar.update()
        # macOS leaves ._ID.npz beside ID.npz.
        if (match := _NAME.fullmatch(name)) and not name.startswith("._"):
            here = Place(place, sys.intern(match[2]), offset, size)
            if (first := found.setdefault(match[1], here)) is not here:
                again.append(match[1])
                for one in (first, here):
                    found.setdefault(f"{one.folder}/{match[1]}", one)

    alone = [(str(folder.parent), [folder.name])]  # one tar
    for place, names in walk(folder) if folder.is_dir() else alone:
        for name in names:
            add(name, place)
            if archives and re.search(r"\.(tar\.(gz|bz2|xz|zst)|tgz)$", name):
                raise SystemExit(
                    f"{flag} {os.path.join(place, name)}: compressed, so no part of it can be read "
                    "alone; unpack it with gunzip, or move it elsewhere"
                )
            if archives and name.endswith(".tar") and not name.endswith(_TORCH):
                tars.append(os.path.join(place, name))
    # Headers are far apart: on network disks several tars at a time.
    for tar, members in in_order(_members, sorted(tars), 8):
        for name, offset, size in members:
            add(name, tar, offset, size)
    bar.close()
    if again:
        text = f"{flag} {folder}: {len(again)} duplicate names, such as {again[0]}"
        print(printable(f"{text}; the file where --list says, else the first"), file=sys.stderr)
    return found


@dataclass
class Files:
    """The files of one stream: those of an index that are named ``ID_<suffix>``.

    flag: what the folder was given as. bare: a file ``ID.npz`` counts, too, as no other stream of
    this folder has such names. transposed: files are (columns, rows), as spectrograms are. pooled:
    one vector is a row, of a clip as a whole.
    """

    flag: str
    folder: Path
    index: Index
    suffix: str
    rate_hz: float
    bare: bool = False
    modality: str = "video"
    transposed: bool = False
    pooled: bool = False

    @property
    def required(self) -> bool:
        """Whether the store must have the stream: one of ``--streams``; a folder of ``--features``
        may lack some of its kinds of features."""
        return self.flag.startswith("--streams")

    def find(self, path: str) -> str | None:
        """The key in the index of the file of a video (``path``: its id, or the row of the list,
        such as topic/subtopic/ID)."""
        head, _, name = path.rpartition("/")
        names = [f"{name}_{self.suffix}", *([name] if self.bare else [])]
        keys = [f"{self.folder}/{place}/{name}" for name in names for place in (path, head)]
        return next((key for key in [*keys, *names] if key in self.index), None)

    def load(self, path: str) -> tuple[str, np.ndarray] | None:
        """(file, rows (n, width) float16) of a video; None without a file, or Skipped."""
        key = self.find(path)
        if key is None:
            return None
        place = self.index[key]
        file = os.path.join(place.folder, key.rsplit("/", 1)[-1] + place.ending)
        array = load_array(file, place=place, pooled=self.pooled)
        return file, array.T if self.transposed else array


def feature_files(
    features: Path | None,
    audio: Path | None,
    rate_2d: float,
    rate_3d: float,
    bare: str | None,
    specs: list[str],
) -> dict[str, Files]:
    """The files of each stream, by the flags of kinds that read folders of features.

    bare: which of 2d and 3d may go without its suffix. specs: of ``--streams``.
    """
    if not features and not specs:
        raise SystemExit("--features: give a folder of features, or --streams NAME=DIR:RATE")
    streams = {}
    if features:
        there = index("--features", features)
        for name, rate in (("2d", rate_2d), ("3d", rate_3d)):
            streams[name] = Files("--features", features, there, name, rate, bare == name)
    if sound := audio or features:
        there = there if sound == features else index("--features_audio", sound)
        streams["mel"] = Files(
            "--features_audio",
            sound,
            there,
            "spec",
            MEL_RATE,
            bare=audio is not None,
            modality="audio",
            transposed=True,
        )
    return streams | parse_streams(specs)


def parse_streams(specs: Iterable[str]) -> dict[str, Files]:
    """NAME=DIR:RATE or NAME=DIR:RATE:MODALITY, each -> {name: its files}."""
    streams, indexes = {}, {}
    for spec in specs:
        match = re.fullmatch(r"([\w-]+)=(.+?):([^:]+)(?::(audio|video))?", spec)
        try:
            name, folder, rate, modality = match.groups()
            rate = between(float, *RATE)(rate)
        except (AttributeError, ValueError, argparse.ArgumentTypeError):
            raise SystemExit(
                f"--streams {spec}: expected NAME=DIR:RATE, like 3d=features/3d:1.5, or "
                "NAME=DIR:RATE:audio"
            ) from None
        if name in ("mel", "video", "caption", "davenet"):  # davenet: --audio means the encoder
            raise SystemExit(f"--streams {spec}: {name} is not a name for features")
        if name in streams:
            raise SystemExit(f"--streams {spec}: {name} is given twice")
        flag, folder = f"--streams {spec}:", Path(folder)
        if folder not in indexes:
            indexes[folder] = index(flag, folder, archives=True)
        modality = modality or modality_of(name)
        streams[name] = Files(flag, folder, indexes[folder], name, rate, modality=modality)
    folders = Counter(files.folder for files in streams.values())
    for files in streams.values():
        files.bare = folders[files.folder] == 1  # else an ID.npz would be a file of each
    return streams


def ids(streams: dict[str, Files]) -> list[str]:
    """The ids of all files, sorted."""
    suffix = re.compile(rf"_({'|'.join(streams)})$")
    names = (name for files in streams.values() for name in files.index if "/" not in name)
    return sorted({suffix.sub("", name) for name in names})


# ------------------------------------------------------------------------------------- reading


def as_rows(array: np.ndarray, what: object) -> np.ndarray:
    """The array as float16; Skipped if a value is NaN, infinite or beyond float16."""
    with np.errstate(over="ignore"):
        array = array.astype(np.float16)
    if not np.isfinite(array).all():
        raise Skipped(f"{what} has values that are NaN, inf or beyond fp16")
    return array


def _choose(names: Iterable[str]) -> str:
    names = list(names)
    for name in ("features", "arr_0"):
        if name in names:
            return name
    raise ValueError(f"it holds {names[:9]}, expected features or arr_0")


def _torch_array(file: io.BufferedIOBase) -> np.ndarray:
    """A tensor that is the file's content, or in a dictionary alone or as ``features``."""
    found = load_torch(file)
    if isinstance(found, dict):
        found = found[next(iter(found)) if len(found) == 1 else _choose(found)]
    if not isinstance(found, torch.Tensor):
        raise ValueError(f"it holds a {type(found).__name__}, expected a tensor")
    if found.nbytes > found.untyped_storage().nbytes():  # a row may be expanded to any number
        raise ValueError(f"a tensor of shape {tuple(found.shape)} that repeats its numbers")
    return (found.half() if found.is_floating_point() else found).numpy()  # numpy has no bfloat16


def load_array(
    path: str | Path, kinds: str = "f", place: Place | None = None, pooled: bool = False
) -> np.ndarray:
    """The (rows, columns) of an .npy, of features or arr_0 in an .npz, or of a torch file, as
    float16; of a member of a tar, if that is its ``place``. ``pooled``: (columns,) is a row.

    Skipped for damage, another shape, dtypes not of numpy's ``kinds``, values that are not finite.
    """
    in_tar = place is not None and place.offset is not None
    if in_tar and place.offset == REFUSED:
        raise Skipped(f"{path}: a link or a sparse member of the tar, which is not read")
    try:
        with open(place.folder if in_tar else path, "rb") as file:
            if in_tar:
                file.seek(place.offset)
                file = io.BytesIO(file.read(place.size))
            if str(path).endswith(_TORCH):
                array = _torch_array(file)
            else:
                array = np.load(file, allow_pickle=False)
            if not isinstance(array, np.ndarray):  # an .npz
                with array as archive:
                    array = archive[_choose(archive)]
    except Exception as error:  # damage makes zip, deflate, lzma and numpy raise a dozen types
        raise skipped(path, error) from error
    if pooled and array.ndim == 1:
        array = array[None]
    if array.ndim != 2 or array.dtype.kind not in kinds or not array.size:
        raise Skipped(
            f"{path}: {array.dtype} array of shape {array.shape}, expected numbers (n, dim)"
        )
    return as_rows(array, path)


def find_specs(streams: dict[str, Files], paths: list[str], kind: str) -> dict[str, dict]:
    """What StoreWriter takes, of each stream that has files: its width is the most common one of 20
    readable files; of ``--features``, among the first 1000 videos.

    SystemExit for a stream that has files, of which none can be read: it would vanish; and for one
    of ``--streams`` without files.
    """
    specs, first = {}, next(iter(paths), "ID")
    for name, files in sorted(streams.items()):
        widths, unreadable = Counter(), []
        there = filter(files.find, paths if files.required else paths[:1000])
        for path in islice(there, 1000):
            try:
                widths[files.load(path)[1].shape[1]] += 1
            except Skipped as reason:  # reported when its turn comes, if others can be read
                unreadable.append(reason)
            if sum(widths.values()) == 20:
                break
        if unreadable and not widths:
            raise SystemExit(
                f"{files.flag} {files.folder}: of the {name} files of {len(unreadable)} videos "
                f"none can be read, the first because of {unreadable[0]}. Correct them; to go on "
                "without this stream, move its files elsewhere"
            )
        if files.required and not widths:
            raise SystemExit(
                f"{files.flag} no readable features of any video; looked for {first}_{name}.npz, "
                f".npy, .pt, .pth, .pth.tar{f', {first}.npz ...' * files.bare} in folders and tars"
            )
        if widths:
            specs[name] = {
                "dim": widths.most_common(1)[0][0],
                "rate_hz": files.rate_hz,
                "model": "log-mel as found" if name == "mel" else f"{name} features as found",
                "tool": f"mcn_ext.prepare {kind}",
                "modality": files.modality,
            }
    if "mel" in specs and specs["mel"]["dim"] != N_MELS:
        raise SystemExit(
            f"{streams['mel'].folder}: the spectrograms have {specs['mel']['dim']} bands, the "
            f"audio encoder takes {N_MELS}"
        )
    return specs


def load_rows(
    streams: dict[str, Files], specs: dict[str, dict], path: str, partial: bool = False
) -> dict[str, np.ndarray | None]:
    """{stream: rows (n, dim) float16, or None without a file} of a video; Skipped if one does not
    fit the others, and, unless ``partial``, if a video stream is missing."""
    rows = {}
    for name, files in streams.items():
        found = files.load(path)
        if found and name not in specs:
            raise Skipped(
                f"{found[0]}: the first 1000 videos have no {name} file; list this one before them"
            )
        if found and found[1].shape[1] != specs[name]["dim"]:
            width = found[1].shape[1]
            raise Skipped(f"{found[0]}: width {width}, the other videos have {specs[name]['dim']}")
        # Silent videos are of use for video and text.
        if not found and name in specs and files.modality == "video" and not partial:
            raise Skipped(f"no {name} features of {path} in {files.folder}")
        rows[name] = found and found[1]
    return rows
