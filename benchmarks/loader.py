"""Reading clips: the store against the field's .npz folders, the same clips from the same data.

    python benchmarks/loader.py [--videos 24] [--out benchmarks/results/loader.json]

Videos of 390 s with 2048-wide 2D and 3D rows and a spectrogram, as HowTo100M has them; 32 clips of
10 s a video. The .npz readers do what a loader for these folders does: open, decompress, slice.
Warm page cache; median of the repeats.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from mcn_ext.store import Store, StoreWriter

SECONDS, CLIPS, CLIP_SECONDS = 390, 32, 10.0
STREAMS = {"2d": (2048, 1.0), "3d": (2048, 1.5), "mel": (40, 100.0)}


def make(folder: Path, n_videos: int) -> Path:
    """The same videos as a store, as .npz and as compressed .npz; returns the store's path."""
    specs = {name: {"dim": dim, "rate_hz": rate} for name, (dim, rate) in STREAMS.items()}
    writer = StoreWriter(folder / "store.h5", specs, "benchmark data")
    rng = np.random.default_rng(0)
    for video in range(n_videos):
        rows = {}
        for name, (dim, rate) in STREAMS.items():
            shape = (int(SECONDS * rate), dim)
            rows[name] = (rng.uniform(-80, 0, shape) if name == "mel" else
                          np.maximum(rng.normal(0, 1, shape), 0)).astype(np.float16)
            for save, kind in ((np.savez, "plain"), (np.savez_compressed, "compressed")):
                place = folder / kind / f"v{video}"
                place.mkdir(parents=True, exist_ok=True)
                save(place / f"{name}.npz", features=rows[name])
        writer.add(f"v{video}", rows, [0.0], [float(SECONDS)], ["x"])
    return writer.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        store = Store(make(folder, args.videos))

        def from_store(video, start, end):
            return [store.clips(video, name, start, end) for name in STREAMS]

        def from_npz(kind):
            def read(video, start, end):
                out = []
                for name, (_, rate) in STREAMS.items():
                    with np.load(folder / kind / f"v{video}" / f"{name}.npz") as file:
                        rows = file["features"]
                    out.append([rows[int(s * rate):int(e * rate) + 1]
                                for s, e in zip(start, end, strict=True)])
                return out
            return read

        readers = {"store": from_store, "npz": from_npz("plain"),
                   "npz, compressed": from_npz("compressed")}
        times = {name: [] for name in readers}
        for repeat in range(args.repeats + 1):  # the first warms the page cache
            rng = np.random.default_rng(repeat)
            starts = [np.sort(rng.uniform(0, SECONDS - CLIP_SECONDS, CLIPS))
                      for _ in range(args.videos)]
            seen = []
            for name, read in readers.items():  # side by side, the same clips
                begin = time.perf_counter()
                total = 0.0
                for video, start in enumerate(starts):
                    for clips in read(video, start, start + CLIP_SECONDS):
                        total += sum(float(clip[0, 0]) + len(clip) for clip in clips)
                if repeat:
                    times[name].append(time.perf_counter() - begin)
                seen.append(total)
            assert len(set(seen)) == 1, "the readers disagree"
    n = args.videos * CLIPS
    rows = {name: {"us_per_clip": 1e6 * statistics.median(t) / n,
                   "clips_per_s": n / statistics.median(t)} for name, t in times.items()}
    base = rows["store"]["us_per_clip"]
    print(f"{n} clips of {CLIP_SECONDS:g} s from {args.videos} videos of {SECONDS} s, one thread, "
          f"warm cache, median of {args.repeats}; {platform.processor() or platform.machine()}, "
          f"{os.cpu_count()} cores\n")
    print("| reader | us per clip | clips per s | relative |\n|---|---:|---:|---:|")
    for name, row in rows.items():
        print(f"| {name} | {row['us_per_clip']:.0f} | {row['clips_per_s']:.0f} | "
              f"{row['us_per_clip'] / base:.1f} |")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"videos": args.videos, "clips": n, "readers": rows},
                                       indent=1) + "\n")


if __name__ == "__main__":
    main()
