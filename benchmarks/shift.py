"""Misaligns a training store, to measure what losses do about it: a copy in which neighbouring
captions' sound or picture has changed places.

    python benchmarks/shift.py STORE.h5 OUT.h5 --share 0.4 --seed 0

A caption's segment of a video goes up to the next caption. Disjoint pairs of neighbouring segments
hold SHARE of all captions; each pair changes places in all audio streams or in all video streams.
Captions and their times stay.
"""

import argparse
from pathlib import Path

import h5py
import numpy as np
from common import ROOT  # noqa: F401  (finds mcn_ext)

from mcn_ext.data.store import Store, StoreWriter
from mcn_ext.prepare.demo import shifted_order
from mcn_ext.train.flags import between, not_negative


def described(store: Store) -> dict[str, dict]:
    """The streams of a store, as StoreWriter takes them."""
    streams = {}
    with h5py.File(store.files[0]) as file:
        for name, dim in store.dims.items():
            facts = {key: file[name].attrs[key] for key in ("model", "weights_sha256", "tool")}
            modality = store.modalities[name]
            streams[name] = {"dim": dim, "rate_hz": store.rates[name], "modality": modality} | facts
    return streams


def shifted(rows: np.ndarray, start: np.ndarray, end: np.ndarray, rate: float, order: np.ndarray):
    """Rows (n, dim) of a stream with the captions' segments in another order."""
    borders = (np.append(start, end[-1]) * rate).astype(int)
    # Captions may overlap, or end behind the video.
    borders = np.maximum.accumulate(borders).clip(max=len(rows))
    segments = [rows[borders[i] : borders[i + 1]] for i in order]
    return np.concatenate([rows[: borders[0]], *segments, rows[borders[-1] :]])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--share", type=between(float, 0, 1), required=True)
    parser.add_argument("--seed", type=not_negative(int), default=0)
    args = parser.parse_args()
    store = Store(args.store)
    source = f"{store.source}; shifted by benchmarks/shift.py, share {args.share}"
    writer = StoreWriter(args.out, described(store), source)
    for video, name in enumerate(store.ids()):
        _, start, end = store.caption_times(video)
        rng = np.random.default_rng((args.seed, 4, video))
        order = shifted_order(len(start), args.share, rng) if len(start) else {}
        rows = {}
        for stream, rate in store.rates.items():
            (rows[stream],) = store.clips(video, stream, [0], [store.seconds(video)])
            if order:
                turn = order[store.modalities[stream]]
                rows[stream] = shifted(rows[stream], start, end, rate, turn)
        writer.add(name, rows, start, end, store.caption_texts(video))
    print(writer.close())


if __name__ == "__main__":
    main()
