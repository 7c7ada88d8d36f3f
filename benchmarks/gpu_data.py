"""Stores of the published sizes without data, and word vectors without a file, for timing.

python benchmarks/gpu_data.py stores FOLDER             # paper.h5, paper-eval.h5; QUICK=1: tiny
python benchmarks/gpu_data.py words STORE.h5 WORDS.npz  # random vectors of the store's words
"""

import os
import sys
from pathlib import Path

import numpy as np

from mcn_ext.data.store import Store, StoreWriter
from mcn_ext.data.words import WordVectors, tokenize

QUICK = bool(os.environ.get("QUICK"))
VOCABULARY = [f"word{i}" for i in range(2000)]


def made_up_store(path, n_videos, n_captions, dim, seconds):
    """One video's numbers, turned round for the next: 512 videos of 32 clips are made in 20 s."""
    specs = {
        "2d": {"dim": dim, "rate_hz": 1.0},
        "3d": {"dim": dim, "rate_hz": 1.5},
        "mel": {"dim": 40, "rate_hz": 100.0},
    }
    rng, first = np.random.default_rng(0), {}
    for name, spec in specs.items():
        size = int(n_captions * seconds * spec["rate_hz"]) + 2, spec["dim"]
        drawn = rng.uniform(-80, 0, size) if name == "mel" else rng.normal(size=size).clip(min=0)
        first[name] = drawn.astype(np.float16)
    writer = StoreWriter(path, specs, "no data: made up for timing")
    start = np.arange(n_captions) * seconds
    for video in range(n_videos):
        rows = {name: np.roll(x, 37 * video % len(x), axis=0) for name, x in first.items()}
        writer.add(
            f"v{video:05d}",
            rows,
            start,
            start + seconds,
            [" ".join(rng.choice(VOCABULARY, 10)) for _ in range(n_captions)],
        )
    writer.close()
    print(f"{path.name}: {path.stat().st_size / 1e6:.0f} MB")


def main():
    kind, source, *target = sys.argv[1:]
    if kind == "stores":  # 512 videos: 4 steps of 128 an epoch, 3 GB
        dim, seconds, captions = (32, 2.0, 8) if QUICK else (2048, 10.0, 32)
        made_up_store(Path(source, "paper.h5"), 8 if QUICK else 512, captions, dim, seconds)
        made_up_store(Path(source, "paper-eval.h5"), 24 if QUICK else 256, 1, dim, seconds)
    elif kind == "words":
        words = sorted({word for text in Store(Path(source)).texts() for word in tokenize(text)})
        vectors = np.random.default_rng(0).normal(0, 2 / 300**0.5, (len(words), 300))
        WordVectors(words, vectors, "random").save(Path(*target))
        print(f"{len(words)} words")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
