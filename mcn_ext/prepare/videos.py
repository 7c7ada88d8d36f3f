"""Raw videos -> store: one frame a second through ResNet-152, log-mel spectrograms, captions.

A video's id is its file name without the ending. Each video is decoded by a process of its own
(:mod:`mcn_ext.prepare.decode`), ``workers`` at a time; this process computes the features, in
batches of one video's frames, so that they depend on nothing else that is being prepared.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mcn_ext.console import printable
from mcn_ext.data.store_file import N_MELS
from mcn_ext.data.store_writer import StoreWriter
from mcn_ext.prepare import SkipList, Skipped, convert, require, resnet, walk
from mcn_ext.prepare.captions import Captions
from mcn_ext.prepare.decode import import_av, serve
from mcn_ext.prepare.features import (
    MEL_RATE,
    Files,
    as_rows,
    find_specs,
    load_rows,
    parse_streams,
)

SUFFIXES = frozenset(
    ".mp4 .mkv .webm .avi .mov .m4v .mpg .mpeg .m2v .ts .m2ts .mts .flv .f4v .wmv .asf .3gp .3g2 "
    ".ogv .ogm .vob .mxf .rm .rmvb .divx .dv .wav .mp3 .mp2 .mka .m4a .m4b .aac .ac3 .flac .ogg "
    ".oga .opus .wma .amr .aif .aiff .caf".split()
)


def find_videos(paths: list[Path]) -> list[Path]:
    """Files as they are named, and media files below folders, linked ones too, in order of their
    paths. What else is in a folder is counted on stderr."""
    found, passed_over = [], Counter()
    for path in paths:
        if not path.is_dir():
            if not path.exists():
                raise SystemExit(f"{path}: no such file")
            found.append(path)
            continue
        below = []
        for folder, names in walk(path):
            for file in (Path(folder, name) for name in names):
                if file.suffix.lower() in SUFFIXES:
                    below.append(file)
                else:
                    passed_over[file.suffix.lower() or "no ending"] += 1
        if not below:
            raise SystemExit(f"{path}: a folder without a video or sound file")
        found += sorted(below)
    if passed_over:
        kinds = ", ".join(f"{kind} {n}" for kind, n in passed_over.most_common(9))
        print(printable(f"files that are not media by their ending: {kinds}"), file=sys.stderr)
    return found


def video_id(file: Path) -> str:
    """The id of a video, of the name of its file: which may be any bytes, of which Python makes
    what the locale says."""
    return printable(os.fsencode(file.stem).decode(errors="backslashreplace"))


def find_media(folder: Path) -> dict[str, list[Path]]:
    """{video id: its files}, by their names alone: no path is made of an id. Files that a link
    leads to outside of the folder are left out."""
    import_av()
    found, root = defaultdict(list), folder.resolve()
    for file in find_videos([folder]):
        if file.is_file() and file.resolve().is_relative_to(root):
            found[video_id(file)].append(file)
    return found


def decode_apart(path: Path, time_limit: float, options: dict, target=serve) -> Iterator:
    """Yields what :func:`.decode` does, from a process of its own: Skipped if it crashes, or gives
    no sign of life for ``time_limit`` seconds."""
    # Not forked, as this process has threads, and perhaps a GPU.
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(there, str(path), options), daemon=True)
    try:
        process.start()
        there.close()
        while True:
            if not here.poll(time_limit):
                raise Skipped(f"{path}: its decoder gave no sign of life for {time_limit:g} s")
            kind, value = here.recv()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield kind, value
    except EOFError:
        process.join()
        # Negative: the number of the signal that ended it.
        raise Skipped(f"{path}: its decoder ended with exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
        here.close()


def _resnet(weights: Path | None, random_weights: bool, device: str | None) -> resnet.Frames2D:
    if weights is None and not random_weights:
        raise SystemExit(
            f"--weights: frames need a ResNet-152; {resnet.WHERE}. Or --streams 2d=DIR:RATE for "
            "features extracted elsewhere, or --random_weights to try the rest"
        )
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return resnet.Frames2D(weights, device)


def _specs(external: dict[str, Files], ids: list[str], features: resnet.Frames2D | None) -> dict:
    """The store's streams: those from elsewhere, ResNet-152's, the spectrogram."""
    specs = find_specs(external, ids, "videos")
    if features:
        specs["2d"] = {
            "dim": resnet.DIM,
            "rate_hz": 1.0,
            "model": features.model + ", frame nearest to each second, 224 of 256",
            "weights_sha256": features.weights_sha256,
        }
    specs["mel"] = {
        "dim": N_MELS,
        "rate_hz": MEL_RATE,
        "weights_sha256": "none",
        "model": "log-mel, mcn_ext.prepare.logmel",
    }
    return {name: specs[name] | {"tool": "mcn_ext.prepare videos"} for name in sorted(specs)}


def prepare(
    paths: list[Path],
    captions: Path | None,
    out: Path,
    *,
    weights: Path | None,
    random_weights: bool = False,
    streams: list[str] = (),
    workers: int = 0,
    batch_size: int = 32,
    device: str | None = None,
    time_limit: float = 300,
    overwrite: bool = False,
    shard_mib: float = 64,
) -> str:
    """Convert; returns the summary that is printed."""
    import_av()
    external, files = parse_streams(streams), find_videos(paths)
    if captions:
        require("--captions", captions)
    said = Captions(captions, len(files)) if captions else None
    features = None if "2d" in external else _resnet(weights, random_weights, device)
    specs = _specs(external, [file.stem for file in files], features)
    note = " (2D features of RANDOM weights)" if features and weights is None else ""
    writer = StoreWriter(
        out,
        specs,
        printable(f"videos from {', '.join(map(str, paths))}")[:500] + note,
        overwrite=overwrite,
        shard_mib=shard_mib,
        settings={"captions": str(captions), "streams": sorted(map(str, streams))},
    )
    skips, todo = SkipList(out), {}
    for file in files:
        name = video_id(file)
        if name in todo:
            skips.add(name, f"{file}: its id is that of {todo[name]}")
        todo.setdefault(name, file)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = max(1, min(workers or min(cores, 16), len(todo)))
    options = {"video": features is not None, "threads": max(1, cores // workers)}
    turn = threading.Lock()  # one batch on the device at a time

    def embed(frames: list[torch.Tensor]) -> np.ndarray:
        with turn:
            rows = features(torch.stack(frames)).numpy()
        return as_rows(rows, "the features (are these the right weights?)")

    def read(name: str, file: Path):
        if not file.is_file():
            raise Skipped(f"{file}: not a file, or a link to none")
        rows = load_rows(external, specs, file.stem, partial=True)  # first, as it costs little
        batch, parts = [], []
        for kind, value in decode_apart(file, time_limit, options):
            if kind == "mel":
                rows["mel"] = value
            elif kind == "frame":
                # Cropped on the device, where resizing is quick.
                pixels = torch.from_numpy(value[2]).to(features.device)
                batch.append(resnet.crop(pixels))
                if len(batch) == batch_size:
                    parts.append(embed(batch))
                    batch = []
        if batch:
            parts.append(embed(batch))
        if parts:
            rows["2d"] = np.concatenate(parts)
        try:
            return rows, said.of(file.stem if said.files else name) if said else ((), (), ())
        except Skipped as reason:
            tqdm.write(printable(f"{name}: {reason}; kept without captions"), file=sys.stderr)
            return rows, ((), (), ())

    summary = convert(writer, skips, todo, read, workers=workers, note=note)
    return summary + (said.summary() if said else "")
