"""The moment protocol on YouCook2's real annotations, with made-up features.

    python benchmarks/moments.py --annotations youcookii_annotations_trainval.json

A second of a video inside a segment shows its sentence's words, each a fixed random direction,
under noise; other seconds are noise alone. Video and text are trained on the 1,333 training videos
and evaluated on the 457 validation videos. It says that sentences, times, windows and scores fit
together at the real sizes; it says nothing about real features.
"""

import argparse
import json
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mcn_ext.data.store import StoreWriter  # noqa: E402
from mcn_ext.data.words import tokenize  # noqa: E402
from mcn_ext.evaluation.moments import read_annotations  # noqa: E402

DIM = 128


def look(word: str) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(word.encode())).normal(0, 1, DIM) / DIM**0.5


def write(path: Path, annotations: Path, subset: str, noise: float) -> Path:
    durations = {
        name: video["duration"]
        for name, video in json.loads(annotations.read_text())["database"].items()
    }
    writer = StoreWriter(
        path,
        {"2d": {"dim": DIM, "rate_hz": 1.0, "model": "made up"}},
        "made-up features of YouCook2's annotations",
        overwrite=True,
    )
    rng = np.random.default_rng(0)
    for name, (start, end, texts) in read_annotations(annotations, subset).items():
        rows = rng.normal(0, noise / DIM**0.5, (int(durations[name]) + 1, DIM))
        for a, b, text in zip(start, end, texts, strict=True):
            rows[int(a) : int(b) + 1] += sum(look(word) for word in set(tokenize(text)))
        order = np.argsort(start, kind="stable")
        writer.add(name, {"2d": rows}, start[order], end[order], [texts[i] for i in order])
    return writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--noise", type=float, default=1.0)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/moments"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    train, held_out = (
        write(args.out / f"{subset}.h5", args.annotations, subset, args.noise)
        for subset in ("training", "validation")
    )
    run = args.out / "stage1-VT"
    begun = time.perf_counter()
    subprocess.run(
        [
            sys.executable,
            ROOT / "train_stage1.py",
            "--pair",
            "VT",
            "--data",
            train,
            "--preset",
            "demo",
            "--epochs",
            str(args.epochs),
            "--out",
            run,
        ],
        check=True,
    )
    trained = time.perf_counter()
    subprocess.run(
        [
            sys.executable,
            ROOT / "evaluate.py",
            "--moments",
            held_out,
            "--annotations",
            args.annotations,
            "--run",
            run,
        ],
        check=True,
    )
    print(f"training {trained - begun:.0f} s, evaluation {time.perf_counter() - trained:.0f} s")


if __name__ == "__main__":
    main()
