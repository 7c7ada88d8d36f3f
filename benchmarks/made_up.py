"""Stores of a given size without data, and word vectors without a file, for timing.

python benchmarks/made_up.py stores FOLDER             # paper.h5, paper-eval.h5; QUICK=1: tiny
python benchmarks/made_up.py words STORE.h5 WORDS.npz  # random vectors of the store's words
"""

import sys
from pathlib import Path

import numpy as np
from common import QUICK

from mcn_ext.data.store import Store, StoreWriter
from mcn_ext.data.words import WordVectors, tokenize


def published(dim: int) -> dict[str, dict]:
    """The published streams; ``dim``: of both video streams, 2048."""
    return {
        "2d": {"dim": dim, "rate_hz": 1.0},
        "3d": {"dim": dim, "rate_hz": 1.5},
        "mel": {"dim": 40, "rate_hz": 100.0},
    }


def make_store(path: Path, n_videos: int, n_captions: int, specs: dict, seconds: float) -> Store:
    """One video's numbers, turned round for the next: 512 videos of 32 clips are made in 20 s.

    specs: of the streams. seconds: length of a caption, of which one follows another.
    """
    rng, first = np.random.default_rng(0), {}
    for name, spec in specs.items():
        size = int(n_captions * seconds * spec["rate_hz"]) + 2, spec["dim"]
        drawn = rng.uniform(-80, 0, size) if name == "mel" else rng.normal(size=size).clip(min=0)
        first[name] = drawn.astype(np.float16)
    writer = StoreWriter(path, specs, "no data: made up for timing")
    start, vocabulary = np.arange(n_captions) * seconds, [f"word{i}" for i in range(2000)]
    for video in range(n_videos):
        rows = {name: np.roll(x, 37 * video % len(x), axis=0) for name, x in first.items()}
        texts = [" ".join(rng.choice(vocabulary, 10)) for _ in start]
        writer.add(f"v{video:05d}", rows, start, start + seconds, texts)
    writer.close()
    print(f"{path.name}: {path.stat().st_size / 1e6:.0f} MB")
    return Store(path)


def random_words(store: Store) -> WordVectors:
    words = sorted({word for text in store.texts() for word in tokenize(text)})
    vectors = np.random.default_rng(0).normal(0, 2 / 300**0.5, (len(words), 300))
    return WordVectors(words, vectors.astype(np.float32), "random")


def main():
    kind, source, *target = sys.argv[1:]
    if kind == "stores":  # 512 videos: 4 steps of 128 an epoch, 3 GB
        dim, seconds, captions = (32, 2.0, 8) if QUICK else (2048, 10.0, 32)
        streams = published(dim)
        make_store(Path(source, "paper.h5"), 8 if QUICK else 512, captions, streams, seconds)
        make_store(Path(source, "paper-eval.h5"), 24 if QUICK else 256, 1, streams, seconds)
    elif kind == "words":
        random_words(Store(source)).save(Path(*target))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
