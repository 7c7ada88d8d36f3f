"""The batches are those of a simple loader, bit by bit, whatever is in the store."""

import multiprocessing
import os
import shutil
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch

from mcn_ext.data.clips import (
    ClipReader,
    ClipSampler,
    TrainingClips,
    caption_id,
    caption_span,
    is_silent,
    make_loader,
    perturb_voice,
    to_device,
)
from mcn_ext.data.store import Store, StoreWriter
from mcn_ext.data.words import WordVectors, tokenize
from mcn_ext.data.workers import start_worker
from tests.conftest import STREAMS, WORDS, is_empty, stage1, started, wait_for

VECTORS = WordVectors(WORDS, np.arange(8.0 * 8).reshape(8, 8), "test")
FRAMES, N_WORDS = 150, 3


def awkward_store(path, **kwargs):
    """Ragged, silent, empty and broken videos; captions that overlap or lie past the end."""
    rng = np.random.default_rng(0)
    writer = StoreWriter(path, STREAMS, "test", **kwargs)
    for video in range(12):
        seconds = int(rng.integers(2, 40))
        looks = np.maximum(rng.normal(0, 1, (seconds, 12)), 0)
        moves = rng.normal(0, 1, (seconds * 3 // 2, 6))
        mel = rng.uniform(-80, 0, (seconds * 100 - video, 40))
        if video == 1:
            mel[:] = -80.0
        if video == 2:
            mel = None
        if video == 3:
            looks = moves = None
        if video == 4:
            looks[:, 5], moves[:, 1], mel[::400, 3] = np.nan, -np.nan, np.nan
        if video == 5:
            looks[0, 5], moves[1, 1], mel[7, 3] = np.inf, -np.inf, -np.inf
        if video == 6:
            looks[:], moves = 0, -np.abs(moves)
        n = int(rng.integers(1, 9))
        start = np.sort(rng.uniform(0, seconds * 1.3, n)).astype(np.float32)
        length = rng.uniform(0, 6, n).astype(np.float32)
        length[0] = 3600 if video == 8 else length[0]
        texts = [" ".join(rng.choice([*WORDS, "zebra"], 4)) for _ in range(n)]
        rows = {"2d": looks, "3d": moves, "mel": mel}
        writer.add(f"v{video}", rows, start, start + length, texts)
    return writer.close()


def read_all(files):
    """Each video's rows and captions, with libhdf5."""
    videos = []
    for path in files:
        with h5py.File(path) as file:
            for i in range(len(file["video/id"])):
                cut = {
                    name: slice(*file[f"{name}/offset"][i : i + 2])
                    for name in ("2d", "3d", "mel", "caption")
                }
                videos.append(
                    {name: file[f"{name}/data"][cut[name]] for name in STREAMS}
                    | {key: file[f"caption/{key}"][cut["caption"]] for key in ("start", "end")}
                    | {"text": file["caption/text"].asstr()[cut["caption"]]}
                )
    return videos


def spans_of(video, epoch, number, n_pair, seed):
    """(spans, the generator that drew them) of a video."""
    rng, spans = np.random.default_rng((seed, epoch, number)), {}
    for index in rng.permutation(len(video["start"])):
        spans[caption_span(video["start"], video["end"], index, 1.0)] = None
        if len(spans) == n_pair:
            break
    return [list(spans)[i % len(spans)] for i in range(n_pair)], rng


def simple_clip(video, first, last, augment, rng):
    """What a fast loader must make of a clip, and its sound (frames, 40)."""
    begin, stop = float(video["start"][first]), float(video["end"][last])
    out, good = {}, True
    for name in ("2d", "3d"):
        rate, dim = STREAMS[name]["rate_hz"], STREAMS[name]["dim"]
        rows = video[name][int(begin * rate) : int(stop * rate) + 1]
        row = rows.max(axis=0) if len(rows) else np.zeros(dim)
        row = row.astype(np.float32)
        usable = bool(np.isfinite(row).all() and row.any())
        out[name] = row if usable else np.zeros_like(row)
        good &= usable
    mel = video["mel"][int(begin * 100) : int(stop * 100) + 1][: 16 * FRAMES].astype(np.float32)
    silent = not len(mel) or not np.isfinite(mel).all() or np.ptp(mel) <= 0.1
    if augment and not silent:
        mel = perturb_voice(mel, rng, augment)
    mel, n_padded = mel[:FRAMES], min(len(mel), FRAMES)
    mel = mel[:0] if silent else mel
    words = tokenize(" ".join(video["text"][first : last + 1]))
    words = [WORDS.index(word) for word in words if word in WORDS][:N_WORDS]
    out |= {"valid.video": good, "valid.audio": not silent, "valid.text": bool(words)}
    out |= {
        "n_frames": len(mel),
        "caption_id": caption_id(np.int64(row).tobytes() for row in words),
    }
    return out | {"words": words + [-1] * (N_WORDS - len(words))}, mel, n_padded


def simple_batch(videos, keys, n_pair, seed, augment):
    """A batch, a clip at a time: what a fast loader must equal."""
    first_caption = np.cumsum([0] + [len(v["start"]) for v in videos])
    clips, sounds, longest = [], [], 16
    for epoch, number in keys:
        spans, rng = spans_of(videos[number], epoch, number, n_pair, seed)
        for first, last in spans:
            clip, mel, n_padded = simple_clip(videos[number], first, last, augment, rng)
            clip["clip_id"] = ((first_caption[number] + first) << 20) + last - first
            clips.append(clip)
            sounds.append(mel)
            longest = max(longest, n_padded)
    audio = np.zeros((len(sounds), 40, -(-longest // 16) * 16), np.float32)
    for into, mel in zip(audio, sounds, strict=True):
        into[:, : len(mel)] = mel.T
    return {key: np.array([clip[key] for clip in clips]) for key in clips[0]} | {"audio": audio}


@pytest.mark.parametrize(
    "workers,augment,name", [(0, 0.0, "s.h5"), (1, 0.0, "shards"), (0, 1.0, "s.h5")]
)
def test_batches_are_those_of_a_simple_loader(tmp_path, workers, augment, name):
    store = Store(awkward_store(tmp_path / name, shard_mib=0.5 if name == "shards" else 512))
    assert (len(store.files) > 1) == (name == "shards")
    sizes = {"audio_frames": FRAMES, "max_words": N_WORDS, "audio_augment": augment}
    streams = {"video_streams": ("2d", "3d"), "words": VECTORS}
    reader = ClipReader(store, "AV", **streams, **sizes)
    clips = TrainingClips(reader, n_pair=5, min_time=1.0, seed=3)
    sampler = ClipSampler(len(clips), 2, clips.seed)
    loader = make_loader(clips, sampler, workers, torch.device("cpu"))
    valid, videos = np.zeros(2), read_all(store.files)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        # All kept while the worker goes on, so that none may lie where a later one does.
        kept = list(loader)
        for keys, batch in zip(list(sampler), kept, strict=True):
            wanted = simple_batch(videos, keys, 5, 3, augment)
            words = batch["words"]
            batch = to_device(batch, torch.device("cpu"), torch.from_numpy(VECTORS.vectors))
            flat = batch["video"] | {f"valid.{k}": v for k, v in batch["valid"].items()}
            flat |= {k: batch[k] for k in ("audio", "clip_id", "n_frames", "caption_id")}
            flat["words"] = words
            for key, value in flat.items():
                value = value.numpy()
                assert value.dtype == wanted[key].dtype and value.shape == wanted[key].shape, key
                assert value.tobytes() == wanted[key].tobytes(), key
            assert batch["audio"].is_contiguous()
            valid += [wanted["valid.video"].mean(), wanted["valid.audio"].mean()]
    assert (valid > 2).all() and (valid < 12).all()  # both kinds were seen


@pytest.mark.parametrize("step", [0.0999, 0.1, 0.1001])
def test_sound_is_silent_within_a_tenth_of_a_decibel(step):
    for mel in ([[0, step]], [[-step, 0]], [[-40 - step, -40]]):
        mel = np.array(mel, np.float16)
        assert is_silent(mel) == (np.ptp(mel.astype(np.float64)) <= 0.1)


def test_training_with_little_shared_memory(tmp_path, store_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    done = stage1(store_path, "--max_steps 1 --workers 1", cwd=tmp_path, check=False)
    assert done.returncode == 1 and "--workers 1 on 1 rank(s) keep up to" in done.stderr
    assert "step 1 of 4" in stage1(store_path, "--max_steps 1 --out without", cwd=tmp_path).stdout


@pytest.mark.parametrize("gone", [False, True])
def test_a_worker_that_starts_after_its_run_was_killed_ends(monkeypatch, gone):
    if gone:
        monkeypatch.setattr(os, "getppid", lambda: 1)
    worker = multiprocessing.get_context("fork").Process(target=start_worker, args=(0,))
    worker.start()
    worker.join(60)
    assert worker.exitcode == gone


@pytest.mark.slow
@pytest.mark.parametrize("end", ["raise ValueError", "os.kill(os.getpid(), 9)"])
def test_workers_end_with_their_run(tmp_path, store_path, end):
    code = f"""
import os, torch
from mcn_ext.data.clips import *
from mcn_ext.data.store import Store
reader = ClipReader(Store({str(store_path)!r}), "A")
clips = TrainingClips(reader, n_pair=2, min_time=1, seed=0)
loader = make_loader(clips, ClipSampler(10, 2, 0), 2, torch.device("cpu"))
next(iter(loader))
{end}
"""
    (tmp_path / "ends.py").write_text(code)
    with started(tmp_path / "ends.py", cwd=tmp_path) as run:
        assert run.wait(60) in (1, -9)
        wait_for(lambda: is_empty(run.pid), seconds=60)
