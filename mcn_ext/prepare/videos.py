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
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mcn_ext.data.store_file import N_MELS
from mcn_ext.data.store_writer import StoreWriter, mend
from mcn_ext.prepare import SkipList, Skipped, finish, in_order, resnet
from mcn_ext.prepare.captions import Captions
from mcn_ext.prepare.decode import import_av, serve
from mcn_ext.prepare.howto100m import MEL_RATE, find_features, load_array

SUFFIXES = frozenset(
    ".mp4 .mkv .webm .avi .mov .m4v .mpg .mpeg .ts .m2ts .mts .flv .wmv .asf .3gp .ogv .vob .mxf "
    ".wav .mp3 .m4a .aac .flac .ogg .opus .wma".split()
)


def find_videos(paths: list[Path]) -> list[Path]:
    """Files as they are named, and media files below folders, in order of their paths."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            files = sorted(
                file
                for file in path.rglob("*")
                if file.suffix.lower() in SUFFIXES and file.is_file()
            )
            if not files:
                raise SystemExit(f"{path}: no video or sound file in it, by their endings")
            found += files
        elif path.is_file():
            found.append(path)
        else:
            raise SystemExit(f"{path}: no such file or folder")
    return found


def parse_streams(specs: list[str]) -> dict[str, tuple[Path, float]]:
    """NAME=DIR:RATE, each -> {name: (folder, rows per second)}."""
    streams = {}
    for spec in specs:
        name, equals, rest = spec.partition("=")
        folder, colon, rate = rest.rpartition(":")
        try:
            hz = float(rate)
        except ValueError:
            hz = 0
        if not (name.isidentifier() or name in ("2d", "3d")) or not folder or not 0 < hz < 1e6:
            raise SystemExit(f"--streams {spec}: expected NAME=DIR:RATE, like 3d=features/3d:1.5")
        if name in ("mel", "video", "caption"):
            raise SystemExit(f"--streams {spec}: {name} is not a name for features")
        if not Path(folder).is_dir():
            raise SystemExit(f"--streams {spec}: {folder}: no such folder")
        streams[name] = Path(folder), hz
    return streams


def _width(folder: Path, name: str, ids: list[str]) -> int:
    """Of the first readable features of a video of these."""
    for video in ids:
        file = find_features(folder, video, name, bare=True)
        try:
            if file is not None:
                return load_array(file).shape[1]
        except Skipped:
            pass  # reported when its turn comes
    raise SystemExit(
        f"--streams {name}={folder}: no readable features of any video; looked for "
        f"{ids[0]}.npz, {ids[0]}.npy, {ids[0]}_{name}.npz, {ids[0]}/..."
    )


class Decoder:
    """A video's messages, from a process that is ended when it gives no sign of life for
    ``time_limit`` seconds."""

    def __init__(self, time_limit: float, **options):
        self.time_limit, self.options = time_limit, options
        # Not forked: this process has threads, and perhaps a GPU.
        self.context = multiprocessing.get_context("spawn")

    def __call__(self, path: Path):
        """Yields (kind, array): "f" (h, w, 3) uint8 frames in order, "m" (n, 40) float16 in
        parts."""
        here, there = self.context.Pipe(duplex=False)
        process = self.context.Process(
            target=serve, args=(there, str(path)), kwargs=self.options, daemon=True
        )
        try:
            process.start()
            there.close()
            while (message := self._next(here, path))[:1] != b"e":
                kind, payload = message[:1].decode(), memoryview(message)[1:]
                if kind == "s":
                    raise Skipped(str(payload, "utf-8"))
                if kind == "f":
                    height, width = np.frombuffer(payload[:8], ">u4")
                    yield kind, np.frombuffer(payload[8:], np.uint8).reshape(height, width, 3)
                elif kind == "m":
                    yield kind, np.frombuffer(payload, np.float16).reshape(-1, N_MELS)
        except EOFError:
            process.join()
            code = process.exitcode
            raise Skipped(
                f"{path}: its decoder ended with "
                + (f"signal {-code}" if code < 0 else f"code {code}")
            ) from None
        finally:
            process.kill()
            process.join()
            here.close()

    def _next(self, pipe: Connection, path: Path) -> bytes:
        if not pipe.poll(self.time_limit):
            raise Skipped(f"{path}: its decoder gave no sign of life for {self.time_limit:g} s")
        return pipe.recv_bytes()


class Reader:
    """Called with a file: {stream: (n, dim) rows, or None}. Many threads may call it at once.

    Args:
        features: frames -> rows, None if the store's ``2d`` comes from elsewhere.
        external: {stream: folder}; widths: {stream: dim}. on_frames: called with their number.
    """

    def __init__(
        self,
        decoder: Decoder,
        features: resnet.Frames2D | None,
        batch_size: int,
        external: dict[str, Path],
        widths: dict[str, int],
        on_frames,
    ):
        self.decoder, self.features, self.batch_size = decoder, features, batch_size
        self.external, self.widths, self.on_frames = external, widths, on_frames
        self.turn = threading.Lock()  # one batch on the device at a time

    def __call__(self, file: Path) -> dict[str, np.ndarray | None]:
        rows: dict[str, np.ndarray | None] = dict.fromkeys(self.widths)
        for name, folder in self.external.items():  # first, as it costs nothing
            if (found := find_features(folder, file.stem, name, bare=True)) is not None:
                rows[name] = load_array(found)
                if rows[name].shape[1] != self.widths[name]:
                    raise Skipped(
                        f"{found}: width {rows[name].shape[1]}, the other videos have "
                        f"{self.widths[name]}"
                    )
        batch, done, mel = [], [], []
        for kind, array in self.decoder(file):
            if kind == "m":
                mel.append(array)
                continue
            # A copy, as a message's bytes are read-only; on the device, where resizing is quick.
            batch.append(resnet.crop(torch.tensor(array, device=self.features.device)))
            if len(batch) == self.batch_size:
                done.append(self._features(batch))
                batch = []
        if batch:
            done.append(self._features(batch))
        if done:
            rows["2d"] = np.concatenate(done)
        if mel:
            rows["mel"] = np.concatenate(mel)
        return rows

    def _features(self, frames: list[torch.Tensor]) -> np.ndarray:
        with self.turn:
            rows = self.features(torch.stack(frames)).half()
            self.on_frames(len(frames))
        if not rows.isfinite().all():
            raise Skipped("features that are NaN, inf or beyond fp16: are these the right weights?")
        return rows.numpy()


def prepare(
    paths: list[Path],
    captions_file: Path | None,
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
    if captions_file is not None and not captions_file.exists():
        raise SystemExit(f"--captions {captions_file}: no such file or folder")
    captions = Captions(captions_file) if captions_file else None
    if captions and captions.single and len(files) > 1:
        raise SystemExit(
            f"--captions {captions_file}: captions of one video, but there are "
            f"{len(files)}; give a folder of files named by id, as "
            f"{files[0].stem}{captions_file.suffix}"
        )
    specs = {
        name: {
            "dim": _width(folder, name, [file.stem for file in files]),
            "rate_hz": rate,
            "model": f"{name} features as found",
            "weights_sha256": "unknown",
        }
        for name, (folder, rate) in external.items()
    }
    features = None
    if "2d" not in external:
        if weights is None and not random_weights:
            raise SystemExit(
                f"--weights: frames need a ResNet-152; {resnet.WHERE}. Or --streams "
                "2d=DIR:RATE for features extracted elsewhere, or --random_weights to "
                "try the rest"
            )
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        features = resnet.Frames2D(weights, device)
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
    specs = {name: specs[name] | {"tool": "mcn_ext.prepare videos"} for name in sorted(specs)}
    random = " (2D features of RANDOM weights)" if features and weights is None else ""
    writer = StoreWriter(
        out,
        specs,
        f"videos from {', '.join(map(str, paths))}"[:500] + random,
        overwrite=overwrite,
        shard_mib=shard_mib,
        settings={"captions": str(captions_file), "streams": sorted(map(str, streams))},
    )
    resumed, skips, seen, todo = len(writer.done), SkipList(out), {}, []
    for file in files:
        name = mend(file.stem)
        if name in seen:
            skips.add(name, f"{file}: its id is that of {seen[name]}")
        elif name not in writer.done:
            todo.append(file)
        seen.setdefault(name, file)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = max(1, min(workers or min(cores, 16), len(todo)))
    decoder = Decoder(time_limit, video=features is not None, threads=max(1, cores // workers))
    missing, n_frames = dict.fromkeys([*specs, "captions"], 0), 0
    progress = tqdm(total=len(todo), unit="video", desc="prepare", mininterval=0.5)

    def on_frames(number: int) -> None:
        nonlocal n_frames
        n_frames += number
        progress.set_postfix_str(f"{n_frames} frames")

    read = Reader(
        decoder,
        features,
        batch_size,
        {name: folder for name, (folder, _) in external.items()},
        {name: spec["dim"] for name, spec in specs.items()},
        on_frames,
    )
    for file, rows in in_order(read, todo, workers):
        progress.update()
        name = mend(file.stem)
        if isinstance(rows, Skipped):
            skips.add(name, str(rows))
            continue
        said = (), (), ()
        if captions:
            try:
                said = captions.of(name)
            except Skipped as reason:
                progress.write(f"{name}: {reason}; kept without captions", file=sys.stderr)
        for stream in specs:
            missing[stream] += rows[stream] is None
        missing["captions"] += not said[0]
        writer.add(name, rows, *said)
    progress.close()
    silent = missing.pop("captions")
    return finish(
        writer,
        skips,
        len(files),
        {name: spec["dim"] for name, spec in specs.items()},
        resumed=resumed,
        note=random,
        without=missing | {"captions (training passes over them; give --captions)": silent},
    )
