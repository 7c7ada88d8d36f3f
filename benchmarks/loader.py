"""From disk to a training batch: the store against the field's .npz folders, in clips a second.

    python benchmarks/loader.py                  # minutes on 2 cores; 1 GB in --folder
    python benchmarks/loader.py --videos 1024 --batch_size 128 --workers 0 1 2 4 8     # a node

Videos of 390 s with 2048-wide 2D and 3D rows, a spectrogram and 100 captions, as HowTo100M has
them, as a store, as .npz and as compressed .npz. All readers draw the same clips (draw_spans) and
make the same batches, which is checked: maxima over time, (B, 40, 1000) float32 spectrograms, rows
of words. Ours: ClipReader and make_loader, up to the float32 of to_device. The .npz readers do what
the published loaders do: open each stream's file, decompress it whole, convert, slice, max, pad.

Readers take turns within a repeat; medians. Cold: every file is put out of the page cache before
the epoch (fsync, posix_fadvise), and mincore(2) tells what stayed. CPU: user and system time of
this process and its workers. An epoch ends with its last batch: short ones pay for the start.
"""

import argparse
import ctypes
import json
import mmap
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout that was built in place, not installed

import numpy as np  # noqa: E402
import torch  # noqa: E402

from mcn_ext.data import clips as data  # noqa: E402
from mcn_ext.data.store import Store, StoreWriter  # noqa: E402
from mcn_ext.data.words import WordVectors  # noqa: E402

SECONDS, CAPTIONS, FRAMES, MAX_WORDS, MIN_TIME = 390, 100, 1000, 20, 10.0
STREAMS = {"2d": (2048, 1.0), "3d": (2048, 1.5), "mel": (40, 100.0)}
VOCABULARY = [f"word{i}" for i in range(5000)]
KINDS = {"npz": np.savez, "npz, compressed": np.savez_compressed}


def make(folder: Path, n_videos: int, kinds: list[str]) -> Path:
    """The same videos as a store and as folders of .npz; returns the store's path."""
    specs = {name: {"dim": dim, "rate_hz": rate} for name, (dim, rate) in STREAMS.items()}
    writer = StoreWriter(folder / "store.h5", specs, "benchmark data")
    rng = np.random.default_rng(0)
    for video in range(n_videos):
        rows = {}
        for name, (dim, rate) in STREAMS.items():
            shape = (int(SECONDS * rate), dim)
            rows[name] = (
                rng.uniform(-80, 0, shape)
                if name == "mel"
                else np.maximum(rng.normal(0, 1, shape), 0)
            ).astype(np.float16)
            for kind in kinds:
                (folder / kind).mkdir(exist_ok=True)
                with open(folder / kind / f"v{video}_{name}.npz", "wb") as file:
                    if name == "mel":  # (40, frames), as they are published
                        KINDS[kind](file, arr_0=np.ascontiguousarray(rows[name].T))
                    else:
                        KINDS[kind](file, features=rows[name])
        start = np.sort(rng.uniform(0, SECONDS - 5, CAPTIONS)).astype(np.float32)
        end = start + rng.uniform(2, 5, CAPTIONS).astype(np.float32)
        words = rng.zipf(1.3, (CAPTIONS, 9)) % (len(VOCABULARY) + 500)  # some are not known
        writer.add(
            f"v{video}", rows, start, end, [" ".join(f"word{i}" for i in line) for line in words]
        )
    return writer.close()


class NpzClips(torch.utils.data.Dataset):
    """What the published loaders do with these folders; captions are in memory, as theirs are."""

    def __init__(self, folder: Path, store: Store, words: WordVectors, n_pair: int):
        self.folder, self.words, self.n_pair = folder, words, n_pair
        self.captions = [
            (*store.caption_times(i)[1:], store.caption_texts(i)) for i in range(len(store))
        ]

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        epoch, video = key
        start, end, texts = self.captions[video]
        spans = data.draw_spans(
            start, end, self.n_pair, MIN_TIME, np.random.default_rng((0, epoch, video))
        )
        begin = [float(start[first]) for first, _ in spans]
        stop = [float(end[last]) for _, last in spans]
        out = {}
        for name in ("2d", "3d"):
            with np.load(self.folder / f"v{video}_{name}.npz") as file:
                rows = torch.from_numpy(file["features"]).float()
            rate = STREAMS[name][1]
            out[f"video.{name}"] = torch.stack(
                [
                    rows[int(s * rate) : int(e * rate) + 1].max(dim=0)[0]
                    for s, e in zip(begin, stop, strict=True)
                ]
            )
        with np.load(self.folder / f"v{video}_mel.npz") as file:
            mel = file["arr_0"]
        out["audio"] = torch.zeros(self.n_pair, 40, FRAMES)
        for i, (s, e) in enumerate(zip(begin, stop, strict=True)):
            clip = mel[:, int(s * 100) : int(e * 100) + 1][:, :FRAMES]
            out["audio"][i, :, : clip.shape[1]] = torch.from_numpy(clip)
        out["words"] = torch.full((self.n_pair, MAX_WORDS), -1)
        for i, (first, last) in enumerate(spans):
            rows = self.words.rows(" ".join(texts[first : last + 1]), MAX_WORDS)
            out["words"][i, : len(rows)] = torch.from_numpy(rows)
        return out


def npz_loader(clips: NpzClips, sampler: data.ClipSampler, workers: int):
    """A loader of :class:`NpzClips` in the order of ours."""
    return torch.utils.data.DataLoader(
        clips,
        batch_sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=data.PREFETCH if workers else None,
        worker_init_fn=data._start_worker,
        collate_fn=lambda items: {k: torch.cat([item[k] for item in items]) for k in items[0]},
    )


def finished(batch: dict, device: torch.device) -> dict:
    """A batch of either loader as the model takes it, but for the look-up of word vectors."""
    words = batch.pop("words")
    return data.to_device(batch, device, None) | {"words": words}


def cpu_seconds(loader) -> float:
    """User and system time of this process and of the loader's workers so far."""
    ours, total = os.times(), 0
    for worker in getattr(loader._iterator, "_workers", ()):
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return ours.user + ours.system + total / os.sysconf("SC_CLK_TCK")


def evict(files: list[Path]) -> float:
    """Put files out of the page cache; the share of their pages that stayed."""
    libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
    stayed = pages = 0
    for path in files:
        with open(path, "r+b") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            with mmap.mmap(file.fileno(), 0) as mapped:
                seen = (ctypes.c_ubyte * -(-len(mapped) // page))()
                view = ctypes.c_char.from_buffer(mapped)
                if libc.mincore(
                    ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_size_t(len(mapped)), seen
                ):
                    raise OSError(ctypes.get_errno(), "mincore")
                del view
            stayed += int((np.frombuffer(seen, np.uint8) & 1).sum())
            pages += len(seen)
    return stayed / pages


def machine() -> dict:
    cpu = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": cpu[0] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "threads": torch.get_num_threads(),
        "load_before": [round(x, 1) for x in os.getloadavg()],
    }


def measure(args, folder: Path) -> list[dict]:
    kinds = [kind for kind in KINDS if kind in args.readers]
    store = Store(make(folder, args.videos, kinds))
    words = WordVectors(VOCABULARY, np.zeros((len(VOCABULARY), 1)), "benchmark")
    device = torch.device(args.device)
    reader = data.ClipReader(
        store,
        "AV",
        video_streams=("2d", "3d"),
        words=words,
        audio_frames=FRAMES,
        max_words=MAX_WORDS,
    )
    ours = data.TrainingClips(reader, n_pair=args.n_pair, min_time=MIN_TIME, seed=0)
    places = {"store": store.files} | {kind: sorted((folder / kind).iterdir()) for kind in kinds}
    out = []
    for workers in args.workers:
        loaders = {}
        for name in places:
            sampler = data.ClipSampler(len(ours), args.batch_size, 0)
            if name == "store":
                loaders[name] = data.make_loader(ours, sampler, workers, device)
            else:
                theirs = NpzClips(folder / name, store, words, args.n_pair)
                loaders[name] = npz_loader(theirs, sampler, workers)
        first = {}
        for name, loader in loaders.items():  # starts the workers, fills the page cache
            for i, batch in enumerate(loader):
                batch = finished(batch, device)
                first[name] = batch if i == 0 else first[name]
        for name, batch in first.items():
            mine = first["store"]
            same = all(torch.equal(mine["video"][k], batch["video"][k]) for k in ("2d", "3d"))
            same &= torch.equal(mine["words"], batch["words"])
            mel, theirs = (b["audio"][..., :FRAMES] for b in (mine, batch))  # ours pads by 16s
            same &= torch.equal(mel, theirs) and mel.dtype == theirs.dtype == torch.float32
            assert same, f"{name} makes other batches"
        first.clear()
        for cache in args.cache:
            rows = {
                name: {
                    "reader": name,
                    "workers": workers,
                    "cache": cache,
                    "seconds": [],
                    "cpu_seconds": [],
                    "stayed": [],
                }
                for name in places
            }
            for repeat in range(args.repeats):
                for name, loader in loaders.items():
                    loader.batch_sampler.set_epoch(repeat + 1)
                    if cache == "cold":
                        rows[name]["stayed"].append(evict(places[name]))
                    cpu, begin = cpu_seconds(loader), time.perf_counter()
                    n = sum(len(finished(batch, device)["words"]) for batch in loader)
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    rows[name]["seconds"].append(time.perf_counter() - begin)
                    rows[name]["cpu_seconds"].append(cpu_seconds(loader) - cpu)
            size = sum(p.stat().st_size for p in places["store"]) / args.videos / args.n_pair
            for row in rows.values():
                row["clips"] = n
                row["clips_per_s"] = n / median(row["seconds"])
                row["mb_per_s"] = row["clips_per_s"] * size / 1e6
                row["cpu_us_per_clip"] = 1e6 * median(row["cpu_seconds"]) / n
                row["ratio"] = rows["store"]["clips_per_s"] / row["clips_per_s"]
                row["cpu_ratio"] = row["cpu_us_per_clip"] / rows["store"]["cpu_us_per_clip"]
                out.append(row)
                print(line(row), flush=True)
    return out


HEAD = (
    "| reader | workers | page cache | clips per s | MB per s | CPU us per clip | store is so "
    "many times faster | in CPU time |\n|---|---:|---|---:|---:|---:|---:|---:|"
)


def line(row: dict) -> str:
    cold = row["stayed"] and max(row["stayed"]) > 0.01
    cache = row["cache"] + (f" ({max(row['stayed']):.0%} stayed)" if cold else "")
    return (
        f"| {row['reader']} | {row['workers']} | {cache} | {row['clips_per_s']:.0f} | "
        f"{row['mb_per_s']:.0f} | {row['cpu_us_per_clip']:.0f} | {row['ratio']:.1f} | "
        f"{row['cpu_ratio']:.1f} |"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=8, help="videos (128 is the paper's)")
    parser.add_argument("--n_pair", type=int, default=32, help="clips per video")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cache", nargs="+", choices=("warm", "cold"), default=["warm", "cold"])
    parser.add_argument(
        "--readers",
        nargs="+",
        choices=("store", *KINDS),
        metavar="READER",
        default=["store", *KINDS],
        help="npz and 'npz, compressed'",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, help="where to make the data: the disk to measure")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/loader-DEVICE.json")
    args = parser.parse_args()
    torch.set_num_threads(1)  # as in workers: small maxima gain nothing from more
    facts = machine()
    with tempfile.TemporaryDirectory(dir=args.folder) as tmp:
        print(HEAD)
        rows = measure(args, Path(tmp))
    facts["load_after"] = [round(x, 1) for x in os.getloadavg()]
    out = args.out or ROOT / "benchmarks" / "results" / f"loader-{args.device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        json.dumps(
            {
                "command": " ".join(sys.argv),
                "machine": facts,
                "videos": args.videos,
                "batch_size": args.batch_size,
                "n_pair": args.n_pair,
                "rows": rows,
            },
            indent=1,
        )
        + "\n"
    )
    print(
        f"\n{args.videos} videos of {SECONDS} s, {args.n_pair} clips each, medians of "
        f"{args.repeats} epochs; MB: what the store holds of what was drawn from. {facts}"
    )


if __name__ == "__main__":
    main()
