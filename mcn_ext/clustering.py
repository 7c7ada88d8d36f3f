"""Feature queue and spherical k-means: the centroids that every modality of a clip is pulled to.

All arithmetic is fp32, whatever the input's dtype and whatever autocast says. In fp16 the cosines
of rows that share a mean direction tie: argmax sends all rows to one cluster, and its sum
overflows. fp32 cosines tie too, only later: 1 - cos is the square of a small angle. So k-means
works on rows less their mean, where |x - y|^2 = 2 - 2 cos keeps its digits. That is what keeps
clusters alive when all embeddings point the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mcn_ext import distributed
from mcn_ext.reference import unit_rows

# Points compared at once, by device: a CPU wants their distances in its cache, a GPU more work.
BLOCK = {"cpu": 1024, "cuda": 16384}
TRIES = 16  # points tried for each draw of k-means++
SAME = 1e-12  # |x - y|^2 at or below it, an angle of 1e-6, is one direction
ROUNDING = 1e-6  # error of |x|^2 + |y|^2 - 2 x.y in fp32, relative to |x|^2


def _directions(x: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows (n, D) fp32 of the rows that are finite and not zero, and which are (N,) bool."""
    largest = torch.linalg.vector_norm(x, torch.inf, dim=1).float()  # NaN where a row has one
    usable = torch.isfinite(largest) & (largest > 0)
    unit = x[usable].float()
    unit /= largest[usable, None]  # first, as the squares of 1e-30 and 1e30 are not in fp32
    unit /= unit.norm(dim=1, keepdim=True)
    return unit, usable


def _nearest(points: Tensor, centroids: Tensor) -> Tensor:
    """Number (n,) int64 of each point's nearest centroid: argmin |x - c|^2 over c."""
    # |x - c|^2 = |x|^2 - 2 (x.c - |c|^2 / 2), and |x|^2 is the same for every c: so argmax.
    offset = -0.5 * centroids.square().sum(dim=1)
    blocks = points.split(BLOCK[points.device.type])
    return torch.cat([torch.addmm(offset, x, centroids.t()).argmax(dim=1) for x in blocks])


def _distance(points: Tensor, centroids: Tensor, labels: Tensor) -> Tensor:
    """|point - its centroid|^2 (n,) from the differences, which is exact where they are small."""
    blocks = zip(points.split(1024), labels.split(1024), strict=True)
    square = torch.cat([(x - centroids[label]).square().sum(dim=1) for x, label in blocks])
    return square * (square > SAME)


def _draw(points: Tensor, distance: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Draw n points (n, D), each far from all before: greedy k-means++.

    ``distance`` (n_points,) is squared, to the centroids there are already. Of a few points drawn
    with probability proportional to it, take the one that lowers its sum most (Arthur and
    Vassilvitskii 2007, section 5). Where no point differs from what there is, points repeat.
    """
    own = points.norm(dim=1, keepdim=True).square()
    drawn = []
    for _ in range(n):
        weights = distance if distance.any() else torch.ones_like(distance)
        # On the CPU, where the generator is.
        index = torch.multinomial(weights.cpu(), TRIES, replacement=True, generator=generator)
        tried = points[index.to(points.device)]
        square = torch.addmm(own + tried.square().sum(dim=1), points, tried.t(), alpha=-2.0)
        # What may be rounding alone becomes 0, else near copies of a centroid would be drawn.
        square *= square > SAME + ROUNDING * own
        closer = torch.minimum(square, distance[:, None])
        best = closer.sum(dim=0).argmin()
        drawn.append(tried[best])
        distance = closer[:, best]
    return torch.stack(drawn)


def _means(points: Tensor, mean: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    """Mean direction of each cluster; one that is empty, or cancels out, keeps its centroid."""
    counts = torch.bincount(labels, minlength=len(centroids))
    # A sum whose order never changes, on a GPU too: index_add_ has atomics there.
    order = labels.argsort(stable=True)
    sums = F.embedding_bag(order, points, counts.cumsum(0) - counts, mode="sum")
    # Points are given less ``mean``; it is added before the length is divided out.
    whole = mean + sums / counts.clamp(min=1)[:, None]
    keep = (counts == 0) | (whole.norm(dim=1) < 1e-6)
    return torch.where(keep[:, None], centroids, unit_rows(whole) - mean)


def _assign(points: Tensor, centroids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(centroids, labels) after empty clusters have moved to points far from every centroid.

    A moved cluster has at least the point it lies on, so that each pass leaves fewer empty; until
    none is, or no point is left that differs from its centroid.
    """
    n_before = len(centroids) + 1
    while True:
        labels = _nearest(points, centroids)
        empty = (torch.bincount(labels, minlength=len(centroids)) == 0).nonzero().flatten()
        if not 0 < len(empty) < n_before:
            return centroids, labels
        n_before = len(empty)
        distance = _distance(points, centroids, labels)
        if not distance.any():
            return centroids, labels
        rows = _draw(points, distance, n_before, generator)
        centroids = centroids.index_copy(0, empty, rows)


@torch.no_grad()
def spherical_kmeans(
    x: Tensor,
    k: int,
    *,
    init: Tensor | None = None,
    max_iter: int = 20,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Cluster the directions of x's rows by Lloyd's algorithm.

    Args:
        x: (N, D), any float dtype. Rows that are zero or not finite take no part; their label is 0.
        k: number of centroids.
        init: (m, D) with m <= k to start from. Rows that are missing, zero or not finite in it are
            drawn by greedy k-means++; by default all are.
        generator: of those draws, on CPU (default: one seeded with 0).

    Returns (centroids (k, D) fp32 unit rows, labels (N,) int64 of the nearest centroid). Every
    cluster has a row, as far as rows differ by more than about 1e-3 of their distance from the mean
    of all. With fewer than k distinct directions the other centroids repeat some, and come to life
    at the next fit from there that finds more. The same input gives the same result.
    ValueError when no row is usable, k < 1 or init has another shape.
    """
    shape = None if init is None else tuple(init.shape)
    if k < 1 or x.dim() != 2 or shape and (shape[1:] != x.shape[1:] or shape[0] > k):
        raise ValueError(
            f"k = {k} and init {shape} do not fit x {tuple(x.shape)}: k must be at least 1, "
            "x (N, D) and init (k, D) or fewer rows"
        )
    generator = generator or torch.Generator().manual_seed(0)
    with torch.autocast(x.device.type, enabled=False):
        points, usable = _directions(x)
        if len(points) == 0:
            raise ValueError(f"none of {len(x)} rows is finite and non-zero: nothing to cluster")
        mean = points.mean(dim=0)
        points -= mean
        centroids = _directions(x[:0] if init is None else init.to(x.device))[0] - mean
        if missing := k - len(centroids):
            distance = torch.full_like(points[:, 0], 4.0)  # the largest on the unit sphere
            if len(centroids):
                distance = _distance(points, centroids, _nearest(points, centroids))
            centroids = torch.cat([centroids, _draw(points, distance, missing, generator)])
        centroids, labels = _assign(points, centroids, generator)
        for _ in range(max_iter):
            before = labels
            means = _means(points, mean, labels, centroids)
            centroids, labels = _assign(points, means, generator)
            # Equal labels have equal means: the fit has converged.
            if torch.equal(labels, before):
                break
        all_labels = usable.long()  # rows that took no part: 0
        all_labels[usable] = labels
        return unit_rows(centroids + mean), all_labels


class OnlineClusters:
    """Queue of the last steps' joint features, and centroids refitted on it now and then.

    Every ``refit_every`` steps, once the queue is full (``queue_size`` steps), k-means starts from
    the last centroids (warm start, across epochs too). Between refits a batch is labelled by its
    nearest centroid. All ranks push the same global batch, and fit the same centroids. Centroids
    are always finite unit rows, whatever is pushed or loaded.
    """

    def __init__(self, k: int, queue_size: int, refit_every: int, seed: int = 0):
        self.k, self.queue_size, self.refit_every, self.seed = k, queue_size, refit_every, seed
        self.queue: list[Tensor] = []
        self.centroids: Tensor | None = None
        self.steps = 0
        self.statistics: dict[str, float] = {}

    @property
    def first_fit(self) -> int:
        """The step of a new run at which k-means first runs."""
        # queue_size, rounded up to a multiple of refit_every.
        return -(-self.queue_size // self.refit_every) * self.refit_every

    def push(self, joint: Tensor) -> None:
        """Add a step's features (B, D) of the global batch; refit when due.

        Rows that are zero or not finite become zero rows, which take no part in a fit.
        """
        # No graph: the queue would keep the activations of its last steps alive.
        rows = joint.detach().float()
        rows = torch.where(torch.isfinite(rows).all(dim=1, keepdim=True), rows, 0.0)
        self.queue = [*self.queue, rows][-self.queue_size :]
        self.steps += 1
        if len(self.queue) == self.queue_size and self.steps % self.refit_every == 0:
            self.refit()

    def refit(self) -> None:
        """Fit the centroids to the queue, from those of before."""
        features = torch.cat(self.queue)
        usable = (features != 0).any(dim=1)
        n = int(usable.sum())
        if n < self.k:
            return  # too few to tell k clusters apart; the contrastive terms go on alone
        # A seed a step: a run that is resumed draws what it would have drawn.
        generator = torch.Generator().manual_seed(self.seed + self.steps)
        self.centroids, labels = spherical_kmeans(
            features, self.k, init=self.centroids, generator=generator
        )
        distributed.broadcast(self.centroids)  # ranks on unlike hardware must not drift apart
        counts = torch.bincount(labels[usable], minlength=self.k)
        self.statistics = {
            "live_clusters": int((counts > 0).sum()),
            "largest_share": float(counts.max() / n),
        }

    def label(self, joint: Tensor) -> Tensor:
        """(B, D) -> (B,) int64, the nearest centroid of each row."""
        with torch.no_grad(), torch.autocast(joint.device.type, enabled=False):
            # Less what the centroids share: the same nearest, but cosines near 1 keep their digits.
            apart = self.centroids - self.centroids.mean(dim=0)
            return (unit_rows(joint.float()) @ apart.t()).argmax(dim=1)

    def state_dict(self) -> dict:
        return {
            "queue": [q.cpu() for q in self.queue],
            "steps": self.steps,
            "statistics": self.statistics,
            "centroids": None if self.centroids is None else self.centroids.cpu(),
        }

    def load_state_dict(self, state: dict, device: torch.device) -> None:
        """Of a state saved with another queue_size or k, load what fits; the next refit draws the
        missing centroids."""
        self.queue = [q.to(device) for q in state["queue"]][-self.queue_size :]
        self.steps, self.statistics = state["steps"], state["statistics"]
        self.centroids = state["centroids"]
        if self.centroids is not None:
            # A NaN centroid would be the nearest of every row: argmax prefers NaN.
            finite = torch.isfinite(self.centroids).all(dim=1)
            kept = self.centroids[finite][: self.k].to(device)
            self.centroids = kept if len(kept) else None
