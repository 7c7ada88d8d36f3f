"""Spherical k-means and the online clusters around it."""

import pytest
import torch

from mcn_ext.clustering import OnlineClusters, spherical_kmeans
from mcn_ext.reference import unit_rows

THREADS = 2  # of this process: the same result again is to be the same with several


def blobs(k=8, per=50, d=16, noise=0.1, seed=0):
    g = torch.Generator().manual_seed(seed)
    centres = unit_rows(torch.randn(k, d, generator=g))
    return (
        centres.repeat_interleave(per, 0) + noise * torch.randn(k * per, d, generator=g),
        torch.arange(k).repeat_interleave(per),
    )


def cosine_inertia(x, centroids, labels):
    return float((1 - (unit_rows(x.float()) * centroids[labels]).sum(1)).sum())


@pytest.mark.slow
@pytest.mark.parametrize("data", ["blobs", "one ball"])
def test_as_good_as_scikit_learn(data):
    """The mean of several fits is within 1 % of scikit-learn's, or better: single fits scatter."""
    cluster = pytest.importorskip("sklearn.cluster")
    x, k = (blobs(64, 64, 32)[0], 64) if data == "blobs" else (spread(1500, 24, 3), 20)
    x = unit_rows(x)
    ours, theirs = [], []
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        fit = spherical_kmeans(x, k, max_iter=100, generator=generator)
        ours.append(cosine_inertia(x, *fit))
        fitted = cluster.KMeans(k, n_init=1, max_iter=100, random_state=seed).fit(x.numpy())
        centroids = unit_rows(torch.from_numpy(fitted.cluster_centers_))
        labels = torch.from_numpy(fitted.labels_).long()
        theirs.append(cosine_inertia(x, centroids, labels))
    assert sum(ours) <= 1.01 * sum(theirs)


def test_rows_that_share_a_direction_do_not_collapse():
    """Cosines all above 0.999, where fp16 can tell no two rows apart: every cluster stays alive."""
    g = torch.Generator().manual_seed(0)
    x = (torch.ones(4000, 64) + 0.02 * torch.randn(4000, 64, generator=g)).half()
    _, labels = spherical_kmeans(x, 64, generator=g)
    counts = torch.bincount(labels, minlength=64)
    assert counts.min() > 0 and counts.max() < 400


def spread(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def adversaries():
    """name -> (rows, number of distinct directions among the usable ones)"""
    one = spread(1, 8)
    scaled = spread(60, 8) * torch.logspace(-20, 20, 60)[:, None]
    broken = spread(60, 8)
    broken[3], broken[5], broken[7], broken[9, 2] = 0, float("nan"), float("inf"), -float("inf")
    outliers = torch.cat([one + 1e-3 * spread(4000, 8), -spread(3, 8, 1)])
    return {
        "all equal": (one.repeat(50, 1), 1),
        "five directions": (spread(5, 8).repeat_interleave(torch.tensor([1, 1, 1, 1, 996]), 0), 5),
        "zero rows": (torch.cat([torch.zeros(50, 8), spread(40, 8)]), 40),
        "one giant cluster": (outliers, 4003),
        "norms 1e-20 to 1e20": (scaled, 60),
        "not finite": (broken, 56),
        "fewer rows than k": (spread(7, 8), 7),
        "opposite rows": (torch.cat([spread(30, 8), -spread(30, 8)]), 60),
        # 1 - cos is about 1e-10: no two cosines differ in fp32
        "nearly equal": (torch.ones(2000, 8) + 1e-5 * spread(2000, 8), 2000),
        "one dimension": (spread(50, 1), 2),
    }


@pytest.mark.parametrize("name", list(adversaries()))
def test_no_centroid_is_not_finite_and_no_cluster_dead(name):
    x, distinct = adversaries()[name]
    for k in (1, 3, 16, 64):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            centroids, labels = spherical_kmeans(x, k)
        assert centroids.shape == (k, x.shape[1]) and labels.shape == (len(x),)
        torch.testing.assert_close(centroids.norm(dim=1), torch.ones(k))
        usable = torch.isfinite(x).all(1) & (x != 0).any(1)
        live = len(labels[usable].unique())
        assert live == min(k, distinct)
        again = spherical_kmeans(x, k)
        assert torch.equal(centroids, again[0]) and torch.equal(labels, again[1])
        # Whatever came out is a start from which rows that differ use every cluster.
        _, labels = spherical_kmeans(spread(300, x.shape[1], 5), k, init=centroids)
        assert len(labels.unique()) == (k if x.shape[1] > 1 else min(k, 2))


@pytest.mark.parametrize("noise", [pytest.param(1e-4, marks=pytest.mark.slow), 3e-4])
def test_tight_groups_far_apart_keep_most_clusters(noise):
    """Rows that differ by less than 1e-3 of their distance from the mean of all: fp32's limit."""
    x = unit_rows(spread(2, 8)).repeat(1000, 1) + noise * spread(2000, 8, 1)
    centroids, labels = spherical_kmeans(x, 256)
    torch.testing.assert_close(centroids.norm(dim=1), torch.ones(256))
    assert len(labels.unique()) >= 230


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_rows_are_clustered_in_fp32(dtype):
    x = blobs()[0].to(dtype)
    for got, want in zip(spherical_kmeans(x, 8), spherical_kmeans(x.float(), 8), strict=True):
        assert torch.equal(got, want)


def test_labels_are_the_nearest_centroids():
    x = spread(2500, 16)  # more than one block
    centroids, labels = spherical_kmeans(x, 30)
    similarity = unit_rows(x) @ centroids.t()
    own = similarity.gather(1, labels[:, None])
    assert (own >= similarity - 1e-6).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_a_start_is_mended_not_believed(bad):
    x, _ = blobs()
    good, _ = spherical_kmeans(x, 8)
    start = good.clone()
    start[2] = bad
    for init in (start, good[:3]):  # the rest is drawn
        centroids, labels = spherical_kmeans(x, 8, init=init)
        assert torch.isfinite(centroids).all() and len(labels.unique()) == 8
    same, _ = spherical_kmeans(x, 8, init=good)
    torch.testing.assert_close(same, good)  # it had converged


def test_what_cannot_be_clustered_is_refused():
    with pytest.raises(ValueError, match="nothing to cluster"):
        spherical_kmeans(torch.zeros(4, 2), 2)
    for x, k, init in (
        (spread(9, 2), 2, torch.zeros(3, 4)),
        (spread(9, 2), 0, None),
        (spread(9, 2), 2, spread(3, 2)),
        (spread(1, 9)[0], 2, None),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            spherical_kmeans(x, k, init=init)


def test_online_clusters_fit_when_full_warm_start_and_resume():
    torch.manual_seed(0)
    steps = [torch.randn(16, 8) for _ in range(12)]
    clusters = OnlineClusters(4, queue_size=3, refit_every=2)
    fitted = []
    for i, x in enumerate(steps):
        clusters.push(x)
        fitted.append(clusters.centroids is not None)
        if i == 6:
            state = clusters.state_dict()
    # Full after 3 steps, fitted at the next multiple of 2.
    assert fitted == [False, False, False] + [True] * 9 and clusters.first_fit == 4
    assert len(clusters.queue) == 3 and clusters.statistics["live_clusters"] == 4
    again = OnlineClusters(4, queue_size=3, refit_every=2)
    again.load_state_dict(state, torch.device("cpu"))
    for x in steps[7:]:
        again.push(x)
    assert torch.equal(again.centroids, clusters.centroids)
    assert torch.equal(again.label(steps[0]), clusters.label(steps[0]))


def test_a_poisoned_or_resized_state_is_mended():
    clusters = OnlineClusters(6, queue_size=4, refit_every=1)
    for i in range(5):
        clusters.push(spread(20, 8, i))
    state = clusters.state_dict()
    state["centroids"] = state["centroids"].clone()
    state["centroids"][1] = float("nan")
    for k, queue_size in ((6, 4), (4, 2), (10, 8)):
        again = OnlineClusters(k, queue_size=queue_size, refit_every=1)
        again.load_state_dict(state, torch.device("cpu"))
        assert len(again.label(spread(20, 8))) == 20 and torch.isfinite(again.centroids).all()
        for i in range(8):
            again.push(spread(20, 8, 10 + i))
        assert again.centroids.shape == (k, 8) and again.statistics["live_clusters"] == k
    state["centroids"].fill_(float("inf"))
    again.load_state_dict(state, torch.device("cpu"))
    assert again.centroids is None


def test_rows_that_are_not_finite_do_not_enter_the_queue_and_too_few_wait():
    clusters = OnlineClusters(3, queue_size=2, refit_every=1)
    rows = spread(12, 4)
    rows[2], rows[5, 1], rows[7] = float("nan"), float("inf"), 0
    for _ in range(2):
        clusters.push(rows)
    assert all(torch.isfinite(q).all() for q in clusters.queue)
    assert torch.isfinite(clusters.centroids).all() and clusters.statistics["largest_share"] < 1
    waiting = OnlineClusters(10, queue_size=1, refit_every=1)
    waiting.push(rows)  # nine are usable
    assert waiting.centroids is None
