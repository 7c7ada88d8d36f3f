"""Several processes (gloo): losses, gradients and BatchNorm equal to one process with all rows.

This file is also the program that every rank runs: ``python tests/test_distributed.py OUT``.
"""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mcn_ext import distributed, encoders, ops, reference
from mcn_ext.train.log import read
from tests.conftest import ROOT, SMALL, run

NAMES = ("audio", "text", "video")
TRIANGLE = list(itertools.combinations(NAMES, 2))
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
ONE = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
# Rows of each rank: equal parts, unequal ones, a rank without any; 303: a GPU's block holds
# positives of the second rank alone.
SPLITS = {
    1: [(203,)],
    2: [(152, 151), (203, 0)],
    3: [(80, 71, 52), (101, 0, 102)],
    4: [(51, 51, 51, 50), (3, 130, 0, 70)],
}


def rows_of_all(n=203, d=24, dtype=torch.float32):
    """Three modalities of correlated rows of uneven lengths; with rows that are not there, NaN."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(n, d, generator=g)
    rows = {
        name: (
            (base + 0.7 * torch.randn(n, d, generator=g)) * torch.rand(n, 1, generator=g).add(0.1)
        ).to(dtype)
        for name in NAMES
    }
    rows["audio"][5], rows["audio"][150] = torch.nan, 0
    valid = {name: torch.rand(n, generator=g) > 0.2 for name in NAMES}
    valid["audio"][5], valid["audio"][150] = False, True
    valid["text"][:60] = False  # none is valid on a first rank
    options = {
        "centroids": torch.randn(9, d, generator=g),
        "cluster_weight": 0.5,
        "labels": torch.randint(8, (n,), generator=g),
        "valid": valid,
        "ids": {pair: torch.randint(100, (n,), generator=g) for pair in TRIANGLE[:2]},
    }
    return rows, options


# name: (loss of (rows by modality, all that goes with rows, a temperature, group), frozen ones)
CASES = {
    "contrastive": (
        lambda m, x, o, t, **g: m.contrastive_loss(x["text"], x["video"], temperature=t, **g),
        (),
    ),
    "contrastive, ids, valid": (
        lambda m, x, o, t, **g: m.contrastive_loss(
            x["audio"],
            x["video"],
            temperature=t,
            ids=o["ids"][TRIANGLE[0]],
            valid=o["valid"]["audio"],
            **g,
        ),
        (),
    ),
    "contrastive, one side frozen": (
        lambda m, x, o, t, **g: m.contrastive_loss(x["text"], x["video"], temperature=t, **g),
        ("text",),
    ),
    "published": (
        lambda m, x, o, t, **g: m.contrastive_loss(
            x["text"], x["video"], temperature=t * 16, normalize=False, **g
        ),
        (),
    ),
    "cluster": (
        lambda m, x, o, t, **g: m.cluster_loss(
            x["audio"], o["centroids"], o["labels"], temperature=t, valid=o["valid"]["audio"], **g
        ),
        (),
    ),
    "mcn": (lambda m, x, o, t, **g: m.mcn_loss(x, TRIANGLE, temperature=t, **o, **g).total, ()),
    "mcn, stage 2": (
        lambda m, x, o, t, **g: (
            m.mcn_loss(
                x,
                [("audio", "text"), ("text", "video")],
                clustered=["text"],
                temperature=t,
                **o,
                **g,
            ).total
        ),
        ("audio", "video"),
    ),
}


def part(value, sizes, rank):
    """A rank's rows of tensors with one row a clip, in dictionaries or not."""
    if isinstance(value, dict):
        return {key: part(v, sizes, rank) for key, v in value.items() if key != "centroids"} | (
            {"centroids": value["centroids"]} if "centroids" in value else {}
        )
    return value.split(list(sizes))[rank] if isinstance(value, torch.Tensor) else value


def value_and_gradients(module, case, rows, options, group=None, budget=2**31):
    """Loss, the temperature's gradient, and each modality's, in one list."""
    call, frozen = CASES[case]
    rows = {name: x.clone().requires_grad_(name not in frozen) for name, x in rows.items()}
    t = torch.tensor(0.07, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MCN_LOSS_BUDGET", str(budget))
        patch.setattr(ops, "_tile", 0 if budget else 33)
        loss = call(module, rows, options, t, group=group)
        loss.backward()
    zero = torch.zeros_like
    return [loss.detach(), t.grad, *(zero(x) if x.grad is None else x.grad for x in rows.values())]


def wrong(scheme, x, y, group):
    """Gradient of x under the schemes in use that are not the global batch's loss."""
    n = dist.get_world_size(group)
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    if scheme == "negatives of the own rank only":
        reference.contrastive_loss(x, y).backward()
        return x.grad
    both = []
    for side in (x, y):
        parts = [torch.empty_like(side) for _ in range(n)]
        dist.all_gather(parts, side.detach(), group=group)
        parts[dist.get_rank(group)] = side  # so that its own rows get a gradient
        both.append(torch.cat(parts))
    reference.contrastive_loss(*both).backward()
    return x.grad


WRONG = ("negatives of the own rank only", "gather without gradients, averaged by DDP")


def main(out):
    """What every rank does: all cases, splits and ways; rank 0 keeps what belongs together."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # and memory that nobody has written holds NaN
    distributed.init("cpu")
    rank, world, group = distributed.rank(), distributed.world(), distributed.default_group()
    found = {}

    def collect(key, scalars, gradients, sizes):
        """Means over ranks, as DDP takes them, of whole gradients."""
        whole = []
        for g in gradients:
            full = torch.zeros(sum(sizes), *g.shape[1:])
            begin = sum(sizes[:rank])
            full[begin : begin + len(g)] = g
            whole.append(distributed.total(full) / world)
        found[key] = [*(distributed.total(s) / world for s in scalars), *whole]

    for sizes in SPLITS[world]:
        rows, options = (part(v, sizes, rank) for v in rows_of_all(sum(sizes)))
        for case, budget in itertools.product(CASES, (0, 2**31)):
            values = value_and_gradients(ops, case, rows, options, group, budget)
            collect((sizes, case, budget), values[:2], values[2:], sizes)
            same = [torch.empty_like(values[0]) for _ in range(world)]
            dist.all_gather(same, values[0])
            assert all(torch.equal(s, same[0]) for s in same), "ranks see different losses"
        values = value_and_gradients(reference, "mcn", rows, options, group)
        collect((sizes, "mcn", "reference"), values[:2], values[2:], sizes)
    for scheme in WRONG:
        x, y = (rows_of_all(200)[0][name].split(200 // world)[rank] for name in ("text", "video"))
        collect(scheme, [], [wrong(scheme, x, y, group)], [200 // world] * world)
    with pytest.raises(ValueError, match="ranks disagree about what to compute"):
        x = torch.ones(2, 3, requires_grad=rank == 0)
        ops.contrastive_loss(x, torch.ones(2, 3), group=group)
    with pytest.raises(ValueError, match="ranks disagree about what to compute"):
        t = torch.tensor(0.07, requires_grad=rank == 0)
        ops.contrastive_loss(torch.ones(2, 3), torch.ones(2, 3), temperature=t, group=group)

    sizes = SPLITS[world][-1]
    mel, frames, target = (t.split(list(sizes))[rank] for t in sounds())
    for checkpointed in (False, True):
        torch.manual_seed(0)
        net = encoders.ResDAVEnet(0.0625, checkpoint_activations=checkpointed).double()
        net = DistributedDataParallel(net)
        for _ in range(2):
            loss = ((net(mel, frames) - target) * torch.arange(64.0)).square().sum() * world
            loss.backward()
        found["BatchNorm", checkpointed] = [p.grad for p in net.parameters()] + list(net.buffers())
    if rank == 0:
        torch.save(found, out)
    distributed.finish()


def sounds(n=203):
    """Spectrograms (n, 40, 48) with n_frames; most of a part of them are silent."""
    g = torch.Generator().manual_seed(1)
    frames = torch.randint(1, 48, (n,), generator=g)
    frames[:60] = 0
    return (
        torch.randn(n, 40, 48, generator=g).double() * 20 - 40,
        frames,
        torch.randn(n, 64, generator=g),
    )


@pytest.fixture(scope="module", params=[2, 3, 4])
def ranks(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks") / "found.pt"
    run(*LAUNCH, request.param, __file__, out, cwd=ROOT, env=ONE)
    return request.param, torch.load(out, weights_only=True)


def distance(got, want):
    """The largest relative one of a tensor."""
    assert all(torch.isfinite(t).all() for t in (*got, *want))
    return max(
        float((g - w).norm() / w.norm().clamp_min(1e-30)) for g, w in zip(got, want, strict=True)
    )


@pytest.mark.slow
def test_losses_and_gradients_are_those_of_one_process(ranks):
    n, found = ranks
    for sizes, (case, way) in itertools.product(
        SPLITS[n], [*itertools.product(CASES, (0, 2**31)), ("mcn", "reference")]
    ):
        rows = rows_of_all(sum(sizes))
        if way == "reference":
            want = value_and_gradients(reference, case, *rows)
        else:
            want = value_and_gradients(ops, case, *rows, budget=way)
        assert distance(found[sizes, case, way], want) <= 1e-6, (sizes, case, way)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", WRONG)
def test_the_usual_schemes_are_wrong_by_the_same_measure(ranks, scheme):
    x, y = (rows_of_all(200)[0][name].requires_grad_() for name in ("text", "video"))
    ops.contrastive_loss(x, y).backward()
    assert distance(ranks[1][scheme], [x.grad[: len(ranks[1][scheme][0])]]) > 1e-2


@pytest.mark.slow
def test_batch_norm_is_over_the_global_batch(ranks):
    torch.manual_seed(0)
    net, (mel, frames, target) = encoders.ResDAVEnet(0.0625).double(), sounds()
    for _ in range(2):
        ((net(mel, frames) - target) * torch.arange(64.0)).square().sum().backward()
    want = [p.grad for p in net.parameters()] + list(net.buffers())
    for checkpointed in (False, True):
        got = ranks[1]["BatchNorm", checkpointed]
        assert distance([t.double() for t in got], [t.double() for t in want]) < 1e-10


@pytest.mark.slow
def test_four_ranks_follow_the_curve_of_one(tmp_path, store_path):
    """AV, with BatchNorm and clustering, over 12 steps. In float64: in fp32 one process with two
    threads is as far from one with one thread."""
    flags = ("--pair", "AV", "--data", store_path, *SMALL, "--epochs", 6)
    run(ROOT / "tests/float64.py", *flags, "--out", "one", cwd=tmp_path)
    run(*LAUNCH, 4, ROOT / "tests/float64.py", *flags, "--out", "four", cwd=tmp_path, env=ONE)
    one, four = (read(tmp_path / name / "log.jsonl") for name in ("one", "four"))
    assert len(one) == 12 and one[-1]["cluster"] > 0
    for term in ("total", "contrastive", "cluster", "reconstruction", "grad_norm"):
        for a, b in zip(one, four, strict=True):
            assert a[term] == pytest.approx(b[term], rel=1e-10), (term, a["step"])


def ranks_of(torchrun):
    """{rank: process id} of a torchrun's processes, which have sessions of their own."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        rank = [int(line[5:]) for line in environment if line.startswith(b"RANK=")]
        if parent == torchrun and rank:
            found[rank[0]] = int(entry.name)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds ranks in /proc")
def test_a_dead_rank_ends_the_job_and_is_named(tmp_path, store_path):
    command = [*LAUNCH, 2, ROOT / "train_stage1.py", "--pair", "AV", "--data", store_path, *SMALL]
    process = subprocess.Popen(
        [sys.executable, *map(str, command), "--epochs", "2000"],
        cwd=tmp_path,
        env=os.environ | ONE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    ranks = {}
    try:
        log = tmp_path / "runs/stage1-AV/log.jsonl"
        for _ in range(600):
            if log.exists() and len(read(log)) > 3:
                break
            time.sleep(0.1)
        ranks = ranks_of(process.pid)
        os.kill(ranks[1], signal.SIGKILL)
        said = process.communicate(timeout=90)[1]
        assert process.returncode and f"local_rank: 1 (pid: {ranks[1]})" in said, said[-3000:]
    finally:
        for pid in (process.pid, *ranks.values()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_the_fewest_rows_are_sent():
    """A pair's second side is what all ranks see: rows there, gradients back."""

    def sent(pairs, wanted):
        ordered, second = ops._columns(pairs, wanted)
        assert second == set(ordered[1::2])
        assert sorted(map(sorted, zip(ordered[::2], ordered[1::2], strict=True))) == sorted(
            map(sorted, zip(pairs[::2], pairs[1::2], strict=True))
        )
        return sum(1 + wanted[i] for i in second)

    assert sent([0, 1], [1, 1]) == 2 and sent([0, 1], [1, 0]) == 1
    assert sent([0, 1, 0, 2, 1, 2], [1, 1, 1]) == 4
    assert sent([0, 1, 1, 2], [0, 1, 0]) == 2  # stage 2: the new modality against two fixed ones


if __name__ == "__main__":
    main(Path(sys.argv[1]))
