"""Several processes (gloo): losses, gradients and BatchNorm equal to one process with all rows.

This file is also the program that every rank runs: ``python tests/test_distributed.py OUT``.
"""

import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from mcn_ext import distributed, encoders, ops, reference
from mcn_ext.clustering import OnlineClusters
from mcn_ext.train.log import read
from tests.conftest import ROOT, SMALL, run, torchrun
from tests.test_loss import NAMES, PAIRS, cluster, contrastive, everything, values

# Rows of each rank: equal parts, unequal ones, a rank without any; 303: a GPU's block holds
# positives of the second rank alone.
SPLITS = {
    1: [(203,)],
    2: [(152, 151), (203, 0)],
    3: [(80, 71, 52), (101, 0, 102)],
    4: [(51, 51, 51, 50), (3, 130, 0, 70)],
}
TEMPERATURE, BUDGETS = 0.0703125, (0, 2**31)


def rows_of_all(n=203, d=24):
    """Three modalities of correlated rows of uneven lengths; with rows that are not there, NaN."""
    g = torch.Generator().manual_seed(0)
    base = torch.randn(n, d, generator=g)
    rows = {
        name: (base + 0.7 * torch.randn(n, d, generator=g)) * torch.rand(n, 1, generator=g).add(0.1)
        for name in NAMES
    }
    rows["audio"][5], rows["audio"][150] = torch.nan, 0
    valid = {name: torch.rand(n, generator=g) > 0.2 for name in NAMES}
    valid["audio"][5], valid["audio"][150] = False, True
    valid["text"][:60] = False  # none is valid on a first rank
    labels = torch.randint(8, (n,), generator=g)
    ids = {pair: torch.randint(100, (n,), generator=g) for pair in PAIRS[:2]}
    bags, weight = torch.arange(n) // 3, torch.rand(n, generator=g).round(decimals=1)
    more = {"bags": bags, "weight": weight}
    return {"rows": rows, "labels": labels, "valid": valid, "ids": ids} | more


def part(value, sizes, rank):
    """A rank's rows of tensors with one row a clip, in dictionaries or not."""
    if isinstance(value, dict):
        return {key: part(v, sizes, rank) for key, v in value.items()}
    return value.split(list(sizes))[rank]


def cases(rows, labels, valid, ids, bags, weight, **group):
    """name: (loss, its rows, which of them are frozen)."""
    video, audio, text = rows.values()
    mu = torch.randn(9, video.shape[1], generator=torch.Generator().manual_seed(1))
    masked = {"valid": valid["audio"]} | group
    noisy = {"positives": bags, "weight": (weight, 1 - weight)} | masked
    all_terms = {"centroids": mu, "labels": labels, "valid": valid, "ids": ids} | group
    return {
        "contrastive": (contrastive(**group), [text, video], ()),
        "ids, valid": (contrastive(ids=ids[PAIRS[1]], **masked), [audio, video], ()),
        **{kind: (noisy_loss(kind, noisy), [audio, video], ()) for kind in reference.KINDS},
        # Which side is sent to the others depends on which of them learns.
        "columns frozen": (noisy_loss("rince", noisy), [audio, video], (1,)),
        "rows frozen": (noisy_loss("sigmoid", noisy), [audio, video], (0,)),
        "one side frozen": (contrastive(**group), [text, video], (0,)),
        "published": (contrastive(normalize=False, **group), [text / 4, video / 4], ()),
        "cluster": (cluster(mu, labels, **masked), [audio], ()),
        "mcn": (everything(**all_terms, cluster_weight=0.5), [video, audio, text], ()),
        "mcn, stage 2": (
            everything([PAIRS[0], PAIRS[2]], **all_terms, clustered=["text"]),
            [video, audio, text],
            (0, 1),
        ),
    }


def noisy_loss(kind, options):
    """Its bias is made of the temperature, so that its gradient is in the temperature's."""
    return lambda m, rows, t: m.contrastive_loss(
        *rows, temperature=t, kind=kind, q=0.5, bias=-2 * t, **options
    )


def every_way(data, **group):
    """(case, way): loss, terms and gradients: compiled, in tiles and not, and one in PyTorch."""
    found = {}
    for (case, (call, rows, frozen)), budget in itertools.product(
        cases(**data, **group).items(), BUDGETS
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MCN_LOSS_BUDGET", str(budget))
            patch.setattr(ops, "_tile", 0 if budget else 33)
            found[case, budget] = values(ops, call, rows, TEMPERATURE, frozen)
    call, rows, frozen = cases(**data, **group)["mcn"]
    found["mcn", "reference"] = values(reference, call, rows, TEMPERATURE, frozen)
    return found


def mean_over_ranks(value, sizes, rank):
    """As DDP takes it; of rows: each rank's in their place among all."""
    if value.dim() == 2:
        whole = value.new_zeros(sum(sizes), value.shape[1])
        whole.split(list(sizes))[rank].copy_(value)
        value = whole
    return distributed.total(value) / len(sizes)


def main(out):
    """What every rank does: all cases, splits and ways; rank 0 keeps what belongs together."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # and memory that nobody has written holds NaN
    distributed.init("cpu")
    rank, world, group = distributed.rank(), distributed.world(), distributed.default_group()
    found = {}
    for sizes in SPLITS[world]:
        data = part(rows_of_all(sum(sizes)), sizes, rank)
        for way, got in every_way(data, group=group).items():
            same = distributed.stack(got[0])
            assert (same == same[0]).all(), "ranks see different losses"
            found[(sizes, *way)] = [mean_over_ranks(v, sizes, rank) for v in got]
    ones, t = torch.ones(2, 3), torch.tensor(0.07)
    for differs in (ones, t):  # in whether it wants a gradient
        differs.requires_grad_(rank == 0)
        with pytest.raises(ValueError, match="ranks disagree about what to compute"):
            ops.contrastive_loss(ones, torch.ones(2, 3), temperature=t, group=group)
        differs.requires_grad_(False)

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
    found["clusters"] = online_clusters(rank, world)
    if rank == world - 1:
        torch.save(found, out)
    distributed.finish()


def online_clusters(rank=0, world=1):
    clusters = OnlineClusters(16, queue_size=3, refit_every=2)
    for step in range(8):
        rows = torch.randn(48, 12, generator=torch.Generator().manual_seed(step)) + 0.5
        clusters.push(distributed.gather(rows.chunk(world)[rank], distributed.default_group()))
    return clusters.centroids


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
    """(number of ranks, what they found)"""
    out = tmp_path_factory.mktemp("ranks") / "found.pt"
    torchrun(request.param, __file__, out, cwd=ROOT)
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
    for sizes in SPLITS[n]:
        for way, want in every_way(rows_of_all(sum(sizes))).items():
            assert distance(found[(sizes, *way)], want) <= 1e-6, (sizes, way)


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
def test_any_number_of_ranks_finds_the_same_clusters(ranks):
    assert torch.equal(ranks[1]["clusters"], online_clusters())


@pytest.mark.slow
def test_four_ranks_follow_the_curve_of_one(tmp_path, store_path):
    """AV, with BatchNorm and clustering, over 12 steps. In float64: in fp32 one process with two
    threads is as far from one with one thread."""
    command = (ROOT / "tests/float64.py", "--pair AV --data", store_path, *SMALL, "--epochs 6")
    run(*command, "--out one", cwd=tmp_path)
    torchrun(4, *command, "--out four", cwd=tmp_path)
    one, four = (read(tmp_path / name / "log.jsonl") for name in ("one", "four"))
    assert len(one) == 12 and one[-1]["cluster"] > 0
    for term in ("total", "contrastive", "cluster", "reconstruction", "grad_norm"):
        for a, b in zip(one, four, strict=True):
            assert a[term] == pytest.approx(b[term], rel=1e-10), (term, a["step"])


@pytest.mark.slow
def test_a_dead_rank_ends_the_job_and_is_named(tmp_path, store_path):
    """Rank 1 kills itself once there are three rows in the log."""
    (tmp_path / "dies.py").write_text(DIES)
    command = (tmp_path / "dies.py", "--pair AV --data", store_path, *SMALL, "--epochs 2000")
    done = torchrun(2, *command, cwd=tmp_path, check=False)
    assert done.returncode and "local_rank: 1 (pid: " in done.stderr, done.stderr[-3000:]
    assert "Signal 9 (SIGKILL)" in done.stderr


DIES = """
import os, signal, sys
import train_stage1
from mcn_ext.train import guard
check, calls = guard.Guard.check, []
def dies(*args):
    calls.append(1)
    if len(calls) == 4 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return check(*args)
guard.Guard.check = dies
train_stage1.main(sys.argv[1:])
"""


def test_the_fewest_rows_are_sent():
    """A pair's second side is what all ranks see: rows there, gradients back."""

    def sent(pairs, wanted):
        return sum(1 + wanted[i] for i in ops._columns(pairs, wanted)[1])

    assert sent([0, 1], [1, 1]) == 2 and sent([0, 1], [1, 0]) == 1
    assert sent([0, 1, 0, 2, 1, 2], [1, 1, 1]) == 4
    assert sent([0, 1, 1, 2], [0, 1, 0]) == 2  # stage 2: the new modality against two fixed ones


if __name__ == "__main__":
    main(Path(sys.argv[1]))
