"""--micro_batch: the whole batch's gradients, BatchNorm and all, from parts of it.

This file is also the program that every rank runs: ``python tests/test_microbatch.py OUT``.
"""

import contextlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from mcn_ext import distributed, encoders
from mcn_ext.microbatch import MicroBatched
from mcn_ext.model import MCN, MODALITIES
from mcn_ext.objective import Objective
from mcn_ext.train import checkpoint, training
from mcn_ext.train.log import read
from tests.conftest import ROOT, SMALL, call, run

SIZES = dict(
    video_dims={"2d": 12, "3d": 6}, word_dim=5, embd_dim=16, recon_dim=8, audio_width=0.0625
)
# (modalities, those that are frozen): every pair, one stage, every second stage
CASES = [
    ("AV", ""),
    ("VT", ""),
    ("AT", ""),
    ("AVT", ""),
    ("AVT", "AV"),
    ("AVT", "VT"),
    ("AVT", "AT"),
]
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
ONE = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def float64():
    """All in float64, what is cast to float, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)


def clips(n=12, frames=70):
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, frames + 1, (n,), generator=g)
    lengths[:5] = 0  # a part without any sound
    valid = {name: torch.rand(n, generator=g) > 0.2 for name in MODALITIES.values()}
    valid["audio"] &= lengths > 0
    return {
        "video": {"2d": torch.rand(n, 12, generator=g), "3d": torch.rand(n, 6, generator=g)},
        "audio": torch.randn(n, 40, frames, generator=g) * 20 - 40,
        "n_frames": lengths,
        "text": torch.randn(n, 4, 5, generator=g),
        "text_mask": torch.arange(4) < torch.randint(1, 5, (n, 1), generator=g),
        "valid": valid,
        "clip_id": torch.arange(n),
        "caption_id": torch.arange(n) // 2,
    }


def rows_of_rank(batch, n, rank):
    return {
        key: rows_of_rank(value, n, rank) if isinstance(value, dict) else value.chunk(n)[rank]
        for key, value in batch.items()
    }


def two_steps(modalities, frozen, n, dtype=None):
    """Parameters' gradients, buffers and losses of two backwards; ``n``: clips of a part, or 0."""
    torch.manual_seed(0)
    model = MCN(modalities, **SIZES)
    model.freeze(MODALITIES[m] for m in frozen)
    model.train()

    def autocast():
        return torch.autocast("cpu", dtype=dtype, enabled=dtype is not None)

    names = [MODALITIES[m] for m in modalities]
    objective = Objective(
        names,
        [name for name in names if name not in model.frozen],
        cluster_size=3,
        queue_size=1,
        refit_every=1,
        recon_weight=3.0,
    )
    net = MicroBatched(model, n, autocast) if n else model
    if not n and distributed.world() > 1:
        net = DistributedDataParallel(model)
    batch, losses = rows_of_rank(clips(), distributed.world(), distributed.rank()), []
    if torch.get_default_dtype() == torch.float64:  # k-means stays fp32
        objective.clusters.centroids = torch.eye(3, 16)
    for _ in range(2):
        model.zero_grad()
        with autocast():
            embeddings, errors = net(batch)
        terms = objective(embeddings, errors, batch)
        terms["total"].backward()
        if n:
            net.backward()
        losses.append(terms["total"].detach())
    return [*losses, *model.buffers(), *(p.grad for p in model.parameters() if p.requires_grad)]


def same(got, want):
    return (got - want).double().norm() <= 1e-10 * want.double().norm() + 1e-13


def largest(got, want):
    """The largest difference, relative to the largest entry of all tensors of its kind."""
    scale = max(float(w.double().norm()) for w in want)
    return (
        max(float((g.double() - w.double()).norm()) for g, w in zip(got, want, strict=True)) / scale
    )


def main(out):
    torch.set_num_threads(1)
    distributed.init("cpu")
    with float64():
        found = {case: [two_steps(*case, n) for n in (0, 4)] for case in CASES}
    if distributed.rank() == 0:
        torch.save(found, out)
    distributed.finish()


@pytest.mark.slow
@pytest.mark.parametrize("modalities, frozen", CASES)
def test_gradients_are_those_of_the_whole_batch(modalities, frozen):
    with float64():
        want = two_steps(modalities, frozen, 0)
        for n in (5, 12) if modalities == "AT" else (5,):
            got = two_steps(modalities, frozen, n)
            assert all(same(g, w) for g, w in zip(got, want, strict=True)), n


@pytest.mark.parametrize("dtype, bound", [(None, 1e-4), (torch.bfloat16, 0.05)])
def test_fp32_and_autocast_differ_by_rounding(dtype, bound):
    assert largest(two_steps("AVT", "", 5, dtype), two_steps("AVT", "", 0, dtype)) < bound


def test_statistics_of_a_part_would_be_another_model():
    """By the measure of the tests above: what they would not let pass."""
    with float64():
        whole = two_steps("AV", "", 0)
        with pytest.MonkeyPatch.context() as patch:
            fit = encoders.BatchNorm.fit
            patch.setattr(encoders.BatchNorm, "fit", lambda self, parts: fit(self, parts[-1:]))
            assert largest(two_steps("AV", "", 5), whole) > 1e-3


@pytest.mark.slow
def test_the_scripts_follow_the_same_curve(tmp_path, store_path):
    common = ("--data", store_path, *SMALL, "--max_steps", 3)
    for n in (0, 5):
        call(
            "train_stage1.py",
            "--pair",
            "AV",
            *common,
            "--micro_batch",
            n,
            "--out",
            f"one{n}",
            cwd=tmp_path,
        )
    call(
        "train_stage2.py",
        "--add",
        "T",
        "--init",
        "one5",
        "--max_steps",
        2,
        "--micro_batch",
        3,
        "--device",
        "cpu",
        "--log_every",
        1,
        "--out",
        "two",
        cwd=tmp_path,
    )
    whole, parts = (read(tmp_path / f"one{n}/log.jsonl") for n in (0, 5))
    for a, b in zip(whole, parts, strict=True):
        assert a["total"] == pytest.approx(b["total"], rel=5e-3)
    assert len(read(tmp_path / "two/log.jsonl")) == 2
    assert checkpoint.load(tmp_path / "one5/checkpoint.pt")["args"]["micro_batch"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [0, 5])
def test_a_bad_clip_leaves_no_trace_either_way(tmp_path, store_path, monkeypatch, micro_batch):
    read_batch, n_read = training.to_device, iter(range(100))

    def spoil(*args):
        batch = read_batch(*args)
        if next(n_read) == 1:
            batch["audio"][3, :, 0] = torch.nan
            batch["n_frames"][3] = batch["valid"]["audio"][3] = 16
        return batch

    monkeypatch.setattr(training, "to_device", spoil)
    done = call(
        "train_stage1.py",
        "--pair",
        "AV",
        "--data",
        store_path,
        *SMALL,
        "--max_steps",
        3,
        "--micro_batch",
        micro_batch,
        "--out",
        "run",
        cwd=tmp_path,
    )
    rows = read(tmp_path / "run/log.jsonl")
    assert "audio: input not finite in 1 of 16 clips" in done.stdout
    assert ["skipped" in row for row in rows] == [False, True, False]
    assert np.isfinite(rows[-1]["total"])
    detected = call(
        "train_stage1.py",
        "--pair",
        "AV",
        "--data",
        store_path,
        *SMALL,
        "--max_steps",
        3,
        "--micro_batch",
        micro_batch,
        "--out",
        "run",
        "--detect",
        cwd=tmp_path,
    )
    assert "first gradient that is not finite" in detected.stdout or "forward: first" in (
        detected.stdout
    )


@pytest.mark.slow
def test_two_ranks_have_the_gradients_of_one_process(tmp_path):
    run(*LAUNCH, __file__, tmp_path / "found.pt", cwd=ROOT, env=ONE)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    with float64():
        for case in CASES:
            one = two_steps(*case, 0)
            for way, got in zip(("whole", "parts"), found[case], strict=True):
                assert all(same(g, w) for g, w in zip(got[2:], one[2:], strict=True)), (case, way)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
