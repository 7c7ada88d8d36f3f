"""From disk to a training batch: the store against the field's .npz folders, in clips a second.

    python benchmarks/loader.py        # 2 minutes on 2 cores; 1 GB in the temporary folder

Videos of 320 s with 2048-wide 2D and 3D rows, a spectrogram and 32 clips, as a store, as .npz and
as compressed .npz; the files are in the page cache. Words are not read. All readers draw the same
clips and make the same batches, which is checked. Ours: ClipReader and make_loader, up to the
float32 of to_device. The .npz readers do what the published loaders do: open each stream's file,
decompress it whole, convert, slice, max, pad. Readers take turns; an epoch ends with its last
batch.
"""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import QUICK, describe, save, show, take_turns
from made_up import make_store, published

from mcn_ext.data.batch import to_device
from mcn_ext.data.clips import ClipReader, ClipSampler, TrainingClips, draw_spans, make_loader

N_VIDEOS, N_CAPTIONS, DIM, VIDEOS_A_STEP = (4, 8, 32, 2) if QUICK else (64, 32, 2048, 8)
FRAMES, MIN_TIME, CPU = 1000, 10.0, torch.device("cpu")
KINDS = {"npz": np.savez, "npz, compressed": np.savez_compressed}


class NpzClips(torch.utils.data.Dataset):
    """What the published loaders do with these folders; times are in memory, as theirs are."""

    def __init__(self, folder: Path, kind: str, store):
        self.folder, self.rates = folder / kind, store.rates
        self.folder.mkdir()
        self.times = [store.caption_times(i)[1:] for i in range(len(store))]
        for video, (_, end) in enumerate(self.times):
            for name in store.dims:
                rows = store.clips(video, name, [0.0], [end[-1]])[0]
                KINDS[kind](self.folder / f"{video}_{name}.npz", features=rows)

    def __len__(self) -> int:
        return len(self.times)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, np.ndarray]:
        epoch, video = key
        start, end = self.times[video]
        rng = np.random.default_rng((0, epoch, video))
        spans = draw_spans(start, end, N_CAPTIONS, MIN_TIME, rng)
        out = {}
        for name, rate in self.rates.items():
            with np.load(self.folder / f"{video}_{name}.npz") as file:
                rows = torch.from_numpy(file["features"]).float()
            clips = [rows[int(start[a] * rate) : int(end[b] * rate) + 1] for a, b in spans]
            if name == "mel":
                padded = np.zeros((len(clips), FRAMES, 40), np.float32)
                for into, clip in zip(padded, clips, strict=True):
                    into[: len(clip)] = clip[:FRAMES]
                out["audio"] = padded.transpose(0, 2, 1)
            else:
                out[f"video.{name}"] = torch.stack([clip.amax(0) for clip in clips]).numpy()
        return out


def read_all(loader, finish: bool):
    """An epoch; batches of the store become float32 here, the others are."""
    for batch in loader:
        if finish:
            to_device(batch, CPU, None)


def same(ours: dict, theirs: dict) -> bool:
    ours, theirs = (to_device(batch, CPU, None) for batch in (ours, theirs))
    video = all(torch.equal(ours["video"][name], x) for name, x in theirs["video"].items())
    return video and torch.equal(ours["audio"], theirs["audio"])


def main():
    torch.set_num_threads(1)  # as in workers: small maxima gain nothing from more
    report = describe() | {"videos": N_VIDEOS, "clips of a video": N_CAPTIONS, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder, "store.h5"), N_VIDEOS, N_CAPTIONS, published(DIM), 10.0)
        reader = ClipReader(store, "AV")
        clips = TrainingClips(reader, n_pair=N_CAPTIONS, min_time=MIN_TIME, seed=0)
        npz = {kind: NpzClips(Path(folder), kind, store) for kind in KINDS}
        for workers in (0, 2):
            sampler = ClipSampler(N_VIDEOS, VIDEOS_A_STEP, 0)
            loaders = {
                name: make_loader(data, sampler, workers, CPU)
                for name, data in {"store": clips, **npz}.items()
            }
            batches = {name: list(loader) for name, loader in loaders.items()}
            for kind in KINDS:
                if not all(map(same, batches["store"], batches[kind])):
                    raise SystemExit(f"{kind} makes other batches than the store")
            del batches
            calls = {
                name: partial(read_all, loader, name == "store") for name, loader in loaders.items()
            }
            found = take_turns(calls, 1 if QUICK else 3)
            for name, row in found.items():
                row = {"reader": name, "workers": workers, "ms": row["ms"]}
                row["clips/s"] = 1e3 * N_VIDEOS * N_CAPTIONS / row["ms"]
                row["store / it"] = found["store"]["ms"] / row["ms"]
                report["rows"].append(row)
            save("loader", report)
    show("Clips a second", report["rows"])


if __name__ == "__main__":
    main()
