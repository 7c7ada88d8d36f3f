"""Training on features of frozen encoders beside DAVEnet, and HowTo100M on paper.

    python benchmarks/features.py            # one minute on 2 cores

Measured: a step of --pair AVT that differs in its audio alone (a stream of 768 numbers a second, or
DAVEnet on 10 s of spectrogram), with losses and Adam, without loading and k-means; and how many
clips one process reads. Counted, not measured: FLOPs and bytes of stage 1 on HowTo100M, and what
they take one H200.
"""

import tempfile
from argparse import Namespace
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch
from common import DEVICE, QUICK, describe, save, show, take_turns
from made_up import make_store, published

from mcn_ext.data.clips import ClipReader, TrainingClips, collate
from mcn_ext.model import MCN
from mcn_ext.objective import Objective
from mcn_ext.study.cost import training_flops

N, FRAMES = (4, 100) if QUICK else (64, 1000)
DAVENET = {"video_dims": {"video": 768}, "audio_dims": {}, "text": "text", "word_dim": 768}
FEATURES = DAVENET | {"audio_dims": {"audio": 768}}
PUBLISHED = {"video_dims": {"2d": 2048, "3d": 2048}, "audio_dims": {}, "text": "words"}
PUBLISHED |= {"word_dim": 300}
# HowTo100M: videos, clips of each in an epoch, epochs of stage 1. An H200: TFLOP/s of dense bf16,
# of which matrix products of these sizes reach a part.
VIDEOS, CLIPS, EPOCHS, PEAK, PART = 1_200_000, 32, 20, 989, 0.3


def make_step(inputs: dict):
    """A training step as train_stage1.py makes it, on one random batch."""
    torch.manual_seed(0)
    model = MCN("AVT", **inputs, embd_dim=64 if QUICK else 1024).to(DEVICE).train()
    objective = Objective(model.modalities, model.modalities, cluster_size=4 if QUICK else 256)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, fused=True)
    audio = {name: torch.randn(N, dim, device=DEVICE) for name, dim in inputs["audio_dims"].items()}
    ids = torch.arange(N, device=DEVICE)
    batch = {
        "video": {k: torch.randn(N, d, device=DEVICE) for k, d in inputs["video_dims"].items()},
        "audio": audio or torch.randn(N, 40, FRAMES, device=DEVICE),
        "n_frames": torch.full((N,), FRAMES),
        "text": torch.randn(N, 3, inputs["word_dim"], device=DEVICE),
        "text_mask": torch.ones(N, 3, dtype=torch.bool, device=DEVICE),
        "clip_id": ids,
        "caption_id": ids,
        "valid": dict.fromkeys(model.modalities, torch.ones_like(ids, dtype=torch.bool)),
    }

    def step():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            rows, errors = model(batch)
        optimizer.zero_grad(set_to_none=True)
        objective(rows, errors, batch).total.backward()
        optimizer.step()

    return step


def make_clips(folder: Path, name: str, specs: dict, **options) -> TrainingClips:
    n_videos, n_captions = (4, 8) if QUICK else (64, 32)
    store = make_store(folder / f"{name}.h5", n_videos, n_captions, specs, 10.0)
    if options:
        with h5py.File(store.path, "a") as file:
            rows = np.random.default_rng(0).normal(size=(store.n_captions, 768))
            file["caption/text768"] = rows.astype(np.float16)
    reader = ClipReader(type(store)(store.path), "AVT" if options else "AV", **options)
    return TrainingClips(reader, n_pair=n_captions, min_time=10.0, seed=0)


def read_all(clips: TrainingClips):
    for video in range(len(clips)):
        collate([clips[0, video]])


def on_paper(name: str, inputs: dict, embd_dim: int, n_clips: int, clip_bytes: int) -> dict:
    """A step's and 20 epochs' work on HowTo100M."""
    args = Namespace(embd_dim=embd_dim, recon_dim=1024, recon_weight=1, audio_width=1.0)
    args.audio_frames = 1000
    encoders = n_clips * training_flops(args, inputs, "AVT")
    # Three pairs and three cluster terms, forward and backward.
    losses = 6 * n_clips * (3 * n_clips + 3 * 256) * embd_dim
    seconds = (encoders + losses) / (PEAK * PART * 1e12)
    steps = EPOCHS * VIDEOS * CLIPS / n_clips
    return {
        "stage 1, AVT": name,
        "clips a step": n_clips,
        "encoders, TFLOP": encoders / 1e12,
        "losses, TFLOP": losses / 1e12,
        "H200, s": seconds,
        "clips/s": n_clips / seconds,
        "20 epochs, h": steps * seconds / 3600,
        "read, GB/s": n_clips * clip_bytes / seconds / 1e9,
        "bytes a clip": clip_bytes,
    }


def main():
    report = describe() | {"clips": N}
    calls = {"DAVEnet": make_step(DAVENET), "audio features": make_step(FEATURES)}
    found = take_turns(calls, 1 if QUICK else 3)
    report["step"] = [
        {"audio": name, "ms": row["ms"], "clips/s": 1e3 * N / row["ms"]}
        for name, row in found.items()
    ]
    show(f"A step of {N} clips", report["step"])
    del calls
    with tempfile.TemporaryDirectory() as folder:
        video, audio = {"dim": 768, "rate_hz": 1.0}, {"dim": 768, "rate_hz": 1.0}
        features = {"video": video, "audio": audio | {"modality": "audio"}}
        options = {"audio_streams": ["audio"], "text": "text768"}
        stores = {
            "2d, 3d, mel": make_clips(Path(folder), "published", published(2048)),
            "video, audio, text features": make_clips(Path(folder), "f", features, **options),
        }
        torch.set_num_threads(1)  # as in workers
        calls = {name: partial(read_all, clips) for name, clips in stores.items()}
        n = sum(len(clips) * clips.n_pair for clips in stores.values()) // 2
        report["loading"] = [
            {"store": name, "clips/s": 1e3 * n / row["ms"]}
            for name, row in take_turns(calls, 1 if QUICK else 3).items()
        ]
    show("Clips that one process reads, from memory", report["loading"])
    # A clip of 10 s: 11 rows of each stream at one a second, 16 at 1.5, 1000 of mel; 3 captions.
    report["paper"] = [
        on_paper("DAVEnet", PUBLISHED, 6144, 4096, 2 * (2048 * (11 + 16) + 40 * 1001)),
        on_paper("features", FEATURES, 1024, 16384, 2 * 768 * (11 + 11 + 3)),
    ]
    show("HowTo100M on paper, one H200 at 30 % of 989 TFLOP/s", report["paper"])
    save("features", report)


if __name__ == "__main__":
    main()
