"""Rows of a trained run's DAVEnet, to be read as an audio stream: DIR/<video id>.npz.

    python benchmarks/davenet_rows.py RUN STORE.h5 DIR

Row i is what DAVEnet, without what follows it, makes of WINDOW s around (i + 1/2) / RATE s. Then
python -m mcn_ext.prepare howto100m ... --streams rows=DIR:4:audio.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from common import DEVICE
from tqdm import tqdm

from mcn_ext.data.clips import ClipReader, collate, to_device
from mcn_ext.data.store import Store
from mcn_ext.model import MCN
from mcn_ext.train import checkpoint

RATE, WINDOW = 4.0, 0.8


@torch.inference_mode()
def main(run: str, path: str, out: str):
    content = checkpoint.load(Path(run, checkpoint.LATEST))
    model = MCN(**content["sizes"]).to(DEVICE).eval()
    model.load_state_dict(content["model"])
    store = Store(path)
    reader = ClipReader(store, "A")
    Path(out).mkdir(parents=True, exist_ok=True)
    for video, name in enumerate(tqdm(store.ids())):
        n_frames = store.row_counts("mel")[video]
        middle = (np.arange(int(n_frames / 100 * RATE)) + 0.5) / RATE
        begin, stop = np.maximum(middle - WINDOW / 2, 0), middle + WINDOW / 2
        if len(middle):
            item = reader.cut(video, begin, stop)
            batch = to_device(collate([item]), torch.device(DEVICE), None)
            rows = model.encode("audio", batch)[0].cpu().numpy()
            rows[~item["valid.audio"]] = 0  # silence
            np.savez(Path(out, f"{name}.npz"), features=rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
