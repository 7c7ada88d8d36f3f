"""Spherical k-means and the online clusters around it."""

import pytest
import torch

from mcn_ext.clustering import OnlineClusters, spherical_kmeans
from mcn_ext.reference import unit_rows


def blobs(k=8, per=50, d=16, noise=0.1, seed=0):
    g = torch.Generator().manual_seed(seed)
    centres = unit_rows(torch.randn(k, d, generator=g))
    return (centres.repeat_interleave(per, 0) + noise * torch.randn(k * per, d, generator=g),
            torch.arange(k).repeat_interleave(per))


def cosine_inertia(x, centroids, labels):
    return float((1 - (unit_rows(x.float()) * centroids[labels]).sum(1)).sum())


def test_finds_blobs():
    x, truth = blobs()
    centroids, labels = spherical_kmeans(x, 8, generator=torch.Generator().manual_seed(0))
    assert centroids.dtype == torch.float32 and labels.dtype == torch.int64
    torch.testing.assert_close(centroids.norm(dim=1), torch.ones(8))
    pairs = {(int(a), int(b)) for a, b in zip(truth, labels, strict=True)}
    assert len(pairs) == 8  # one label per blob and one blob per label


@pytest.mark.slow
def test_as_good_as_scikit_learn():
    cluster = pytest.importorskip("sklearn.cluster")
    x = unit_rows(torch.randn(1500, 24, generator=torch.Generator().manual_seed(3)))
    ours = min(cosine_inertia(x, *spherical_kmeans(x, 20, max_iter=100,
                                                   generator=torch.Generator().manual_seed(s)))
               for s in range(3))
    fitted = cluster.KMeans(20, n_init=3, random_state=0).fit(x.numpy())
    theirs = cosine_inertia(x, unit_rows(torch.from_numpy(fitted.cluster_centers_)),
                            torch.from_numpy(fitted.labels_).long())
    assert ours <= 1.01 * theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_seed_same_result_and_fp32_under_autocast(dtype):
    x, _ = blobs()
    x = x.to(dtype)
    first = spherical_kmeans(x, 12, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        second = spherical_kmeans(x, 12, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_rows_that_share_a_direction_do_not_collapse():
    """Cosines all above 0.999, where fp16 can tell no two rows apart: every cluster stays alive."""
    g = torch.Generator().manual_seed(0)
    x = (torch.ones(4000, 64) + 0.02 * torch.randn(4000, 64, generator=g)).half()
    _, labels = spherical_kmeans(x, 64, generator=g)
    counts = torch.bincount(labels, minlength=64)
    assert counts.min() > 0 and counts.max() < 400


def test_empty_clusters_are_reseeded():
    x, _ = blobs()
    init = torch.cat([x[:1], -x.mean(0, keepdim=True).repeat(7, 1) + 5])  # most are where no row is
    _, labels = spherical_kmeans(x, 8, init=init, max_iter=50)
    assert (torch.bincount(labels, minlength=8) > 0).all()


def test_degenerate_inputs_stay_finite():
    same = torch.ones(10, 4)
    centroids, labels = spherical_kmeans(same, 3)
    assert torch.isfinite(centroids).all() and centroids.norm(dim=1).allclose(torch.ones(3))
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    x[3], x[5], x[7] = 0, float("nan"), float("inf")
    centroids, labels = spherical_kmeans(x, 4)
    assert (torch.isfinite(centroids).all() and labels.shape == (20,)
            and (labels[[3, 5]] == 0).all())
    centroids, _ = spherical_kmeans(x[:2], 5)  # K > N
    assert centroids.shape == (5, 4) and torch.isfinite(centroids).all()
    with pytest.raises(ValueError, match="nothing to cluster"):
        spherical_kmeans(torch.zeros(4, 2), 2)
    with pytest.raises(ValueError, match="do not fit"):
        spherical_kmeans(x, 2, init=torch.zeros(3, 4))


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
    assert fitted == [False, False, False] + [True] * 9
    assert len(clusters.queue) == 3 and clusters.statistics["live_clusters"] == 4
    again = OnlineClusters(4, queue_size=3, refit_every=2)
    again.load_state_dict(state, torch.device("cpu"))
    for x in steps[7:]:
        again.push(x)
    assert torch.equal(again.centroids, clusters.centroids)
    assert torch.equal(again.label(steps[0]), clusters.label(steps[0]))


def test_queue_without_enough_usable_rows_waits():
    clusters = OnlineClusters(4, queue_size=1, refit_every=1)
    clusters.push(torch.cat([torch.zeros(10, 3), torch.full((5, 3), float("nan")),
                             torch.ones(2, 3)]))
    assert clusters.centroids is None
