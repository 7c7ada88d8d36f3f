"""Feature queue and spherical k-means: the centroids every modality of a clip is pulled to.

All arithmetic is fp32 whatever the input's dtype and whatever autocast says. In fp16 the cosines of
rows that share a mean direction tie, argmax sends them all to one cluster, and that cluster's sum
overflows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mcn_ext import distributed
from mcn_ext.reference import unit_rows


def _plus_plus(x: Tensor, k: int, generator) -> Tensor:
    """k-means++ seeding (Arthur & Vassilvitskii 2007) on the sphere: |a - b|^2 = 2 - 2 cos."""
    n = len(x)
    chosen = [int(torch.randint(n, (1,), generator=generator))]
    nearest = torch.full((n,), float("inf"), device=x.device)
    draws = torch.rand(k - 1, generator=generator).tolist()
    for u in draws:
        nearest = torch.minimum(nearest, (1.0 - x @ x[chosen[-1]]).clamp_min(0.0))
        cumulative = nearest.double().cumsum(0)
        # With all chosen (fewer distinct rows than k), cumulative is 0 and row 0 is repeated.
        chosen.append(min(int(torch.searchsorted(cumulative, u * cumulative[-1:], right=True)),
                          n - 1))
    return x[chosen]


def _sums(x: Tensor, labels: Tensor, k: int) -> Tensor:
    """Sum of the rows of each cluster (k, D), in an order that never changes."""
    if x.is_cuda:  # index_add_ adds in whatever order threads arrive
        return torch.nn.functional.one_hot(labels, k).to(x.dtype).t() @ x
    return x.new_zeros(k, x.shape[1]).index_add_(0, labels, x)


def spherical_kmeans(x: Tensor, k: int, *, init: Tensor | None = None, max_iter: int = 20,
                     generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Cluster the directions of x's rows.

    Args:
        x: (N, D), any float dtype. Rows that are zero or not finite take no part; their label is 0.
        k: number of centroids.
        init: (k, D) to start from (default: k-means++ drawn from ``generator``, on CPU).

    Returns (centroids (k, D) fp32 unit rows, labels (N,) int64 of the nearest centroid). An empty
    cluster is reseeded from the row farthest from its centroid; with fewer distinct rows than k,
    centroids repeat. ValueError when no row is usable, k < 1 or init has another shape.
    """
    if k < 1 or (init is not None and init.shape != (k, x.shape[1])):
        raise ValueError(
            f"k = {k} and init {None if init is None else tuple(init.shape)} do not fit "
            f"x {tuple(x.shape)}: k must be at least 1 and init (k, D)")
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        rows = x.float()
        usable = torch.isfinite(rows).all(dim=1)
        rows = unit_rows(torch.where(usable[:, None], rows, torch.zeros_like(rows)))
        usable &= rows.square().sum(dim=1) > 0.5
        points = rows[usable]
        if len(points) == 0:
            raise ValueError(
                f"none of the {len(x)} rows is finite and non-zero: nothing to cluster")
        centroids = _plus_plus(points, k, generator) if init is None else unit_rows(init.float())
        labels = None
        for _ in range(max_iter):
            similarity, new = (points @ centroids.t()).max(dim=1)
            counts = torch.bincount(new, minlength=k)
            empty = (counts == 0).nonzero().flatten()
            if labels is not None and len(empty) == 0 and torch.equal(new, labels):
                break
            if len(empty):
                farthest = similarity.argsort(stable=True)[:len(empty)]
                new[farthest] = empty[:len(farthest)]
                counts = torch.bincount(new, minlength=k)
            labels = new
            sums = _sums(points, labels, k)
            # A cluster without rows (k > N), or whose rows cancel out, keeps its direction.
            keep = (counts == 0) | (sums.norm(dim=1) < 1e-6)
            centroids = torch.where(keep[:, None], centroids, unit_rows(sums))
        return centroids, (rows @ centroids.t()).argmax(dim=1)


class OnlineClusters:
    """Queue of the last steps' joint features, and centroids refitted on it now and then.

    Every ``refit_every`` steps, once the queue is full (``queue_size`` steps), k-means starts from
    the last centroids (warm start, across epochs too). Between refits a batch is labelled by its
    nearest centroid.
    """

    def __init__(self, k: int, queue_size: int, refit_every: int, seed: int = 0):
        self.k, self.queue_size, self.refit_every, self.seed = k, queue_size, refit_every, seed
        self.queue: list[Tensor] = []
        self.centroids: Tensor | None = None
        self.steps = 0
        self.statistics: dict[str, float] = {}

    def push(self, joint: Tensor) -> None:
        """Add a step's features (B, D) of the global batch, zero rows left out; refit when due."""
        self.queue = [*self.queue, joint.detach().float()][-self.queue_size:]
        self.steps += 1
        if len(self.queue) == self.queue_size and self.steps % self.refit_every == 0:
            self.refit()

    def refit(self) -> None:
        features = torch.cat(self.queue)
        usable = torch.isfinite(features).all(dim=1) & (features != 0).any(dim=1)
        n = int(usable.sum())
        if n < self.k:
            return  # too little to tell k clusters apart; the contrastive terms go on alone
        generator = torch.Generator().manual_seed(self.seed + self.steps)
        self.centroids, labels = spherical_kmeans(features, self.k, init=self.centroids,
                                                  generator=generator)
        distributed.broadcast(self.centroids)  # ranks on unlike hardware must not drift apart
        counts = torch.bincount(labels[usable], minlength=self.k)
        self.statistics = {"live_clusters": int((counts > 0).sum()),
                           "largest_share": float(counts.max() / n)}

    def label(self, joint: Tensor) -> Tensor:
        """(B, D) -> (B,) int64, the nearest centroid of each row."""
        with torch.no_grad(), torch.autocast(joint.device.type, enabled=False):
            return (unit_rows(joint.float()) @ self.centroids.t()).argmax(dim=1)

    def state_dict(self) -> dict:
        return {"queue": [q.cpu() for q in self.queue], "steps": self.steps,
                "statistics": self.statistics,
                "centroids": None if self.centroids is None else self.centroids.cpu()}

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        self.queue = [q.to(device) for q in state["queue"]][-self.queue_size:]
        self.steps, self.statistics = state["steps"], state["statistics"]
        self.centroids = None if state["centroids"] is None else state["centroids"].to(device)
