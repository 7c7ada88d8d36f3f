"""What a stage checks and says before its first step."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

from mcn_ext.data.batch import collate
from mcn_ext.data.clips import PREFETCH, ClipReader, TrainingClips
from mcn_ext.data.shares import ANYWAY
from mcn_ext.data.store import Store
from mcn_ext.model import MCN
from mcn_ext.train import checkpoint, memory
from mcn_ext.train.log import read
from tests.conftest import ROOT, SMALL, STREAMS, call, write_store

STAGE1 = ("train_stage1.py", "--pair", "AV", *SMALL, "--max_steps", 2)


def start_ranks(folder, *commands):
    """One process for each rank, with a command line of its own -> their exit codes and errors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank, words in enumerate(commands):
        env = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        env |= {"WORLD_SIZE": str(len(commands)), "MASTER_PORT": str(port)}
        env |= {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT)}
        words = [sys.executable, str(ROOT / words[0]), *map(str, words[1:])]
        ranks.append(
            subprocess.Popen(words, cwd=folder, env=env, stderr=subprocess.PIPE, text=True)
        )
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    return [rank.returncode for rank in ranks], errors


@pytest.mark.slow
@pytest.mark.parametrize(
    "flag, first, second",
    [
        ("--lr", "0.001", "0.01"),
        ("--seed", "0", "1"),
        ("--cluster_weight", "0.1", "0.0"),
        ("--batch_size", "4", "8"),
        ("--pair", "AV", "VT"),
    ],
)
def test_ranks_with_unlike_flags_end_at_once(tmp_path, store_path, flag, first, second):
    command = (*STAGE1, "--data", store_path)
    codes, errors = start_ranks(tmp_path, (*command, flag, first), (*command, flag, second))
    for code, error in zip(codes, errors, strict=True):
        assert code == 1 and "ranks were started with unlike flags" in error
        assert f"{flag} {first} (rank 0) / {second} (rank 1)" in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_ranks_with_unlike_data_end_at_once(tmp_path, store_path):
    others = write_store(tmp_path / "others.h5", n_videos=9)
    codes, errors = start_ranks(
        tmp_path, (*STAGE1, "--data", store_path), (*STAGE1, "--data", others)
    )
    assert codes == [1, 1]
    for error in errors:
        assert "unlike data" in error and "videos 10 (rank 0) / 9 (rank 1)" in error


def test_a_run_goes_on_only_with_its_own_data(tmp_path):
    """The same path, prepared anew: as many videos, other contents."""
    store = tmp_path / "train.h5"
    call(*STAGE1, "--data", write_store(store), cwd=tmp_path)
    store.unlink()
    done = call(*STAGE1, "--data", write_store(store, seed=1), cwd=tmp_path, check=False)
    assert done.returncode == 1 and "train.h5 has been prepared anew since" in done.stderr
    store.unlink()
    assert "step 2 of 4" in call(*STAGE1, "--data", write_store(store), cwd=tmp_path).stdout


def test_a_flag_that_the_run_did_not_have_is_a_change(tmp_path, store_path):
    call(*STAGE1, "--data", store_path, cwd=tmp_path)
    folder = tmp_path / "runs/stage1-AV"
    args = json.loads((folder / "args.json").read_text())
    assert checkpoint.open_run(folder, args | {"extra_weight": 0.0}, resume=True)
    with pytest.raises(SystemExit, match=r"--extra_weight not there \(now 0.1\)"):
        checkpoint.open_run(folder, args | {"extra_weight": 0.1}, resume=True)


def test_another_optimiser_does_not_take_the_state(tmp_path):
    weights = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
    optimizer = torch.optim.Adam(weights, lr=0.1)
    sum(w.sum() for w in weights).backward()
    optimizer.step()
    state = optimizer.state_dict()
    checkpoint.load_optimizer(tmp_path, torch.optim.Adam(weights, lr=0.5, fused=True), state)
    groups = [{"params": weights[:1]}, {"params": weights[1:], "lr": 1.0}]
    for other, message in (
        (torch.optim.SGD(weights, lr=0.1), "betas .* without it"),
        (torch.optim.AdamW(weights, lr=0.1, weight_decay=0.02), r"weight_decay 0 \(now 0.02\)"),
        (torch.optim.Adam(groups, lr=0.1), r"groups of \[2\] parameters \(now \[1, 1\]\)"),
    ):
        with pytest.raises(SystemExit, match=f"another optimiser: .*{message}"):
            checkpoint.load_optimizer(tmp_path, other, state)


def test_content_is_said_and_too_little_of_it_ends_the_run(tmp_path, monkeypatch):
    def start(silent_every):
        store = tmp_path / f"{silent_every}.h5"
        if not store.exists():
            write_store(store, n_videos=16, silent_every=silent_every)
        return call(*STAGE1, "--data", store, "--out", store.stem, cwd=tmp_path, check=False)

    some = start(4)
    assert "of 64 clips looked at: 100% with video, 75% with audio" in some.stdout
    assert "WARNING" not in some.stdout
    none = start(1)
    assert none.returncode == 1 and "only 0% clips with audio: too few" in none.stderr
    monkeypatch.setenv(ANYWAY, "1")
    assert "WARNING: only 0% clips with audio" in start(1).stdout


def test_unknown_words_are_said(tmp_path, store_path):
    def start(*words):
        vectors = tmp_path / "vectors.txt"
        rows = [f"{word} {i} 1 2" for i, word in enumerate(words)]
        vectors.write_text("\n".join([f"{len(rows)} 3", *rows]) + "\n")
        command = ("train_stage1.py", "--pair", "VT", *SMALL, "--max_steps", 1, "--no-resume")
        command = (*command, "--data", store_path, "--word2vec", vectors)
        return call(*command, "--out", f"run{len(words)}", cwd=tmp_path, check=False)

    few = start("now", "it", "fry")  # "now fry it" is a caption
    assert "words: 3 of 10 known" in few.stdout and "captions without any: 0 of 60" in few.stdout
    none = start("onion")
    assert "WARNING: only" in none.stdout or "too few to learn from" in none.stderr


def clips_of(store_path, n_pair=4):
    reader = ClipReader(Store(store_path), "AV", audio_frames=190)
    return TrainingClips(reader, n_pair=n_pair, min_time=1.0, seed=0)


def test_a_step_that_does_not_fit_the_memory_ends_the_run(tmp_path, store_path, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda: 100_000)
    done = call(*STAGE1, "--data", store_path, cwd=tmp_path, check=False)
    assert done.returncode == 1 and "0.0 GB are free. Lower --batch_size" in done.stderr
    assert not list(tmp_path.glob("runs/*/checkpoint.pt"))


def test_the_estimate_is_of_what_backward_keeps(store_path):
    """Against the bytes that are allocated, counted by torch's profiler, for 40 clips."""
    clips = clips_of(store_path)
    model = MCN("AV", video_dims={"2d": 12, "3d": 6}, embd_dim=64, recon_dim=32, audio_width=0.25)
    model.train()
    batch = collate([clips[0, i] for i in range(10)])
    statistics = [buffer.clone() for buffer in model.buffers()]
    estimate = memory.step_bytes(model, batch, len(batch["clip_id"]), None)
    assert all(map(torch.equal, statistics, model.buffers()))  # nothing was learnt by trying
    batch = memory.to_device(batch, torch.device("cpu"), None)
    with torch.profiler.profile(profile_memory=True) as profile:
        embeddings, errors = model(batch)
    held = sum(event.self_cpu_memory_usage for event in profile.key_averages())
    learnt = 3 * sum(p.nbytes for p in model.parameters())
    assert 0.7 < (estimate - learnt) / memory.PEAK / held < 1.5


def test_a_lack_of_shared_memory_ends_the_run(store_path, monkeypatch):
    batch = collate([clips_of(store_path)[0, i] for i in range(3)])
    needed = 2 * (PREFETCH + 1) * sum(x.nbytes for x in batch.values())

    def check(free, workers=2):
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr(memory.shutil, "disk_usage", lambda path: usage)
        memory.check_shared_memory(batch, 12, workers)

    check(needed), check(0, workers=0)
    advice = "Use --workers 1, or, in a container, docker run --shm-size 1g"
    with pytest.raises(SystemExit, match=f"--workers 2 on 1 rank.* keep up to 0.00 GB.*{advice}"):
        check(needed - 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="on 2 rank"):
        check(needed)
    monkeypatch.setenv(ANYWAY, "1")
    check(0)


def test_a_store_without_captions_is_named(tmp_path, store_path):
    from mcn_ext.data.store import StoreWriter

    writer = StoreWriter(tmp_path / "silent.h5", STREAMS, "test")
    writer.add("a", {"2d": np.ones((4, 12)), "3d": None, "mel": None}, [], [], [])
    done = call(*STAGE1, "--data", writer.close(), cwd=tmp_path, check=False)
    assert "no video in it has captions" in done.stderr


def test_progress_shows_the_loss_as_a_sum(tmp_path, store_path):
    done = call(*STAGE1, "--data", store_path, "--queue_size", 1, cwd=tmp_path)
    row = read(tmp_path / "runs/stage1-AV/log.jsonl")[-1]
    shown = f"loss {row['total']:.3f} = contrastive {row['contrastive']:.3f} + "
    assert shown + f"0.1 x cluster {row['cluster']:.3f} + 1 x recon" in done.stderr
    total = row["contrastive"] + 0.1 * row["cluster"] + row["reconstruction"]
    assert row["total"] == pytest.approx(total, rel=1e-5)
    assert row["contrastive_audio_video"] == pytest.approx(row["contrastive"], rel=1e-5)
    parts = row["cluster_audio"], row["cluster_video"]
    assert row["cluster"] == pytest.approx(sum(parts) / 2, rel=1e-5)
