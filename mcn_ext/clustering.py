"""Feature queue and spherical k-means: the centroids every modality of a clip is pulled to.

All arithmetic is fp32 whatever the input's dtype and whatever autocast says. In fp16 the cosines of
rows that share a mean direction tie, argmax sends them all to one cluster, and that cluster's sum
overflows. fp32 cosines tie too, only later: 1 - cos is the square of a small angle. So rows and
centroids are compared less their common mean, where |x - mu|^2 = 2 - 2 cos keeps its digits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mcn_ext import distributed
from mcn_ext.reference import unit_rows

# Rows compared at once, by device: their similarities to k centroids stay in a CPU's cache; a GPU
# is not filled by less.
BLOCK = {"cpu": 1024, "cuda": 16384}
COPIED = 1024  # rows copied at once, of full width: little memory beside that of all
SAME = 1e-12  # |x - mu|^2 at or below it, an angle of 1e-6, is one direction
ROUNDING = 1e-6  # of |x|^2 + |y|^2 - 2 x.y, relative to |x|^2
TRIES = 16  # rows tried for each draw: all cost one pass over the points
FARTHEST = 4.0  # the largest |x - y|^2 on the unit sphere


def _block(x: Tensor) -> int:
    return BLOCK.get(x.device.type, BLOCK["cuda"])


def _directions(x: Tensor) -> tuple[Tensor, Tensor]:
    """(unit rows fp32 of x's rows that are finite and not zero, which those are (N,) bool)."""
    if x.numel() == 0:
        return x.float(), x.new_zeros(len(x), dtype=torch.bool)
    # NaN or inf if any entry is.
    largest = torch.cat([block.abs().amax(dim=1) for block in x.split(COPIED)]).float()
    usable = torch.isfinite(largest) & (largest > 0)
    index = usable.nonzero().flatten()
    unit = x.new_empty((len(index), x.shape[1]), dtype=torch.float32)
    for rows, at in zip(unit.split(COPIED), index.split(COPIED), strict=True):
        rows.copy_(x.index_select(0, at))
        rows /= largest[at, None]  # first: 1e-20 and 1e30 have a direction too, and no square
        rows /= rows.norm(dim=1, keepdim=True)
    return unit, usable


class _Sphere:
    """Points on the unit sphere less their mean, what k-means asks of them, and its random draws.

    ``points`` (n, D) and every centroid (k, D) here are fp32 deviations from ``mean``. ``shared``:
    all ranks hold the same points, and each compares its part of them with the centroids.
    """

    def __init__(self, unit: Tensor, generator: torch.Generator, shared: bool = False):
        self.mean = unit.mean(dim=0)
        self.points = unit.sub_(self.mean)
        self.square = self.points.norm(dim=1).square()  # no second (n, D)
        self.generator = generator
        self.shared, self.part = shared, slice(None)
        if shared:  # whole blocks: their products do not depend on the number of ranks
            block = _block(unit)
            self.n_part = -(-len(unit) // (block * distributed.world())) * block
            begin = distributed.rank() * self.n_part
            self.part = slice(begin, begin + self.n_part)

    def nearest(self, centroids: Tensor, before: Tensor | None = None) -> Tensor:
        """Label (n,) int64 of each point's nearest centroid."""
        labels = self._nearest(self.points[self.part], self.square[self.part], centroids, before)
        if not self.shared:
            return labels
        labels = F.pad(labels, (0, self.n_part - len(labels)))  # the last ranks have less, or none
        return distributed.stack(labels).flatten()[: len(self.points)]

    def _nearest(
        self, points: Tensor, square: Tensor, centroids: Tensor, before: Tensor | None
    ) -> Tensor:
        """The same for ``points`` (n, D) with squares (n,), always the same ones.

        ``before``: the centroids of the last call. Then all points are compared with the eighth of
        the centroids that moved farthest, and with all centroids only if another may have come
        nearer than the own, by the triangle inequality (Hamerly 2010): ``upper`` bounds a point's
        distance to its own centroid, ``lower`` that to any other.
        """
        doubt = None
        if before is not None and len(centroids) >= 8:
            moved, order = (centroids - before).norm(dim=1).sort(descending=True)
            far = order[: len(centroids) // 8]
            to_far = (
                torch.addmm(
                    centroids[far].square().sum(dim=1), points, centroids[far].t(), alpha=-2.0
                )
                + square[:, None]
            )
            to_far = to_far.clamp_min_(0.0).sqrt_()
            own = self.labels[:, None] == far
            self.upper += torch.empty_like(moved).index_copy_(0, order, moved)[self.labels]
            self.upper = torch.where(own.any(dim=1), (to_far * own).sum(dim=1), self.upper)
            self.lower -= moved[len(far)]
            self.lower = torch.minimum(self.lower, to_far.masked_fill_(own, torch.inf).amin(dim=1))
            slack = (SAME + ROUNDING * square).sqrt()
            doubt = (self.upper + slack >= self.lower - slack).nonzero().flatten()
            if 2 * len(doubt) > len(points):
                doubt = None
        if doubt is not None:
            points, square = points[doubt], square[doubt]
        offset = -0.5 * centroids.square().sum(dim=1)
        label, best, second = [], [], []
        for block in points.split(_block(points)):
            score = torch.addmm(offset, block, centroids.t())
            top, at = score.max(dim=1)
            label.append(at)
            best.append(top)
            second.append(score.scatter_(1, at[:, None], -torch.inf).amax(dim=1))
        upper, lower = (
            (square - 2.0 * torch.cat(score)).clamp_min(0.0).sqrt() for score in (best, second)
        )
        if doubt is None:
            self.labels, self.upper, self.lower = torch.cat(label), upper, lower
        else:
            self.labels = self.labels.index_copy(0, doubt, torch.cat(label))
            self.upper[doubt], self.lower[doubt] = upper, lower
        return self.labels

    def distance(self, labels: Tensor, centroids: Tensor) -> Tensor:
        """|point - its centroid|^2 (n,), from the differences: exact where they are small."""
        square = torch.cat(
            [
                (block - centroids[label]).square().sum(dim=1)
                for block, label in zip(
                    self.points.split(COPIED), labels.split(COPIED), strict=True
                )
            ]
        )
        return torch.where(square > SAME, square, torch.zeros_like(square))

    def draw(self, distance: Tensor, n: int) -> Tensor:
        """n rows (n, D), each far from all before it: greedy k-means++ (Arthur & Vassilvitskii
        2007, section 5). distance (n_points,): squared, to what there is already.

        Of a few rows drawn with probability proportional to ``distance``, the one that lowers its
        sum most. When no row is left that differs, rows repeat. Nothing here waits for a GPU.
        """
        draws = torch.rand(n, TRIES, generator=self.generator, dtype=torch.float64)
        draws, rows = draws.to(distance.device), []
        for u in draws:
            cumulative = distance.double().cumsum(0)
            index = torch.searchsorted(cumulative, u * cumulative[-1], right=True)
            index = torch.where(cumulative[-1] > 0, index, u * len(distance)).long()
            index = index.clamp_max(len(distance) - 1)
            tried = self.points[index]
            square = torch.addmm(self.square[index], self.points, tried.t(), alpha=-2.0)
            square += self.square[:, None]
            square *= square > SAME + ROUNDING * self.square[:, None]
            closer = torch.minimum(square, distance[:, None])
            best = closer.sum(dim=0).argmin().reshape(1)  # of one dimension: [best] would wait
            rows.append(tried.index_select(0, best))
            distance = closer.index_select(1, best).flatten()
        return self.agreed(torch.cat(rows))

    def agreed(self, x: Tensor) -> Tensor:
        """Rank 0's, where ranks share the work: on unlike hardware theirs may differ."""
        if self.shared:
            distributed.broadcast(x)
        return x

    def means(self, labels: Tensor, centroids: Tensor) -> Tensor:
        """Each cluster's mean direction; a cluster whose rows cancel out keeps the one it has."""
        counts = torch.bincount(labels, minlength=len(centroids))
        # Sums in an order that never changes, on a GPU too: no atomics.
        sums = F.embedding_bag(
            labels.argsort(stable=True), self.points, counts.cumsum(0) - counts, mode="sum"
        )
        whole = self.mean + sums / counts.clamp_min(1)[:, None]
        keep = (counts == 0) | (whole.norm(dim=1) < 1e-6)
        return torch.where(keep[:, None], centroids, unit_rows(whole) - self.mean)

    def revive(self, centroids: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(centroids, labels): empty clusters move onto rows far from every centroid.

        A cluster on a row keeps that row, so each pass leaves fewer empty, and one is the rule;
        until none is, or no row is left that differs from its centroid.
        """
        last = len(centroids) + 1
        while True:
            labels = self.nearest(centroids, before)
            empty = (torch.bincount(labels, minlength=len(centroids)) == 0).nonzero().flatten()
            if len(empty) == 0 or len(empty) >= last:
                return centroids, labels
            distance, last = self.distance(labels, centroids), len(empty)
            if not self.agreed(distance.any().int()):
                return centroids, labels
            before = centroids
            centroids = before.index_copy(0, empty, self.draw(distance, len(empty)))


def spherical_kmeans(
    x: Tensor,
    k: int,
    *,
    init: Tensor | None = None,
    max_iter: int = 20,
    generator: torch.Generator | None = None,
    shared: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cluster the directions of x's rows.

    Args:
        x: (N, D), any float dtype. Rows that are zero or not finite take no part; their label is 0.
        k: number of centroids.
        init: (m, D) with m <= k to start from. What is missing, zero or not finite in it is drawn
            by greedy k-means++, all of it by default.
        generator: of those draws, on CPU (default: one seeded with 0, the same on every rank).
        shared: all ranks call this with the same arguments, and share the work.

    Returns (centroids (k, D) fp32 unit rows, labels (N,) int64 of the nearest centroid). Every
    cluster has a row, as far as rows differ by more than about 1e-3 of their distance from the mean
    of all. With fewer than k distinct directions, each has a cluster and the other centroids repeat
    some; they come to life at the next fit from there that finds more. The same input gives the
    same result on one rank or several, and whatever autocast says. Takes one fp32 copy of x.
    ValueError when no row is usable, k < 1 or init has another shape.
    """
    if (
        k < 1
        or x.dim() != 2
        or (init is not None and (init.dim() != 2 or len(init) > k or init.shape[1] != x.shape[1]))
    ):
        raise ValueError(
            f"k = {k} and init {None if init is None else tuple(init.shape)} do not fit "
            f"x {tuple(x.shape)}: k must be at least 1, x (N, D) and init (k, D) or less rows"
        )
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        unit, usable = _directions(x)
        if len(unit) == 0:
            raise ValueError(
                f"none of the {len(x)} rows is finite and non-zero: nothing to cluster"
            )
        sphere = _Sphere(
            unit, generator or torch.Generator().manual_seed(0), shared and distributed.world() > 1
        )
        start, alive = _directions(x[:0] if init is None else init.to(x.device))
        start -= sphere.mean
        centroids = sphere.points.new_empty(k, x.shape[1])
        slots = torch.zeros(k, dtype=torch.bool, device=x.device)
        slots[: len(alive)] = alive
        centroids[slots] = start
        if len(start) < k:
            distance = sphere.square.new_full((len(unit),), FARTHEST)
            if len(start):
                distance = sphere.distance(sphere.nearest(start), start)
            centroids[~slots] = sphere.draw(distance, k - len(start))
        centroids, labels = sphere.revive(centroids)
        for _ in range(max_iter):
            last = labels
            centroids, labels = sphere.revive(sphere.means(labels, centroids), centroids)
            if torch.equal(labels, last):
                break
        everything = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        everything[usable] = labels
        return unit_rows(centroids + sphere.mean), everything


class OnlineClusters:
    """Queue of the last steps' joint features, and centroids refitted on it now and then.

    Every ``refit_every`` steps, once the queue is full (``queue_size`` steps), k-means starts from
    the last centroids (warm start, across epochs too). Between refits a batch is labelled by its
    nearest centroid. Centroids are always finite unit rows, whatever is pushed or loaded.
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
        return -(-self.queue_size // self.refit_every) * self.refit_every

    def push(self, joint: Tensor) -> None:
        """Add a step's features (B, D) of the global batch; refit when due. Rows that are zero or
        not finite are kept as zero rows, which take no part: no size depends on their number."""
        rows = joint.detach().float()
        rows = torch.where(torch.isfinite(rows).all(dim=1, keepdim=True), rows, 0.0)
        if self.queue and self.queue[0].shape[1] != rows.shape[1]:
            raise ValueError(
                f"features are {rows.shape[1]} wide, the queue holds "
                f"{self.queue[0].shape[1]}: start with an empty queue"
            )
        self.queue = [*self.queue, rows][-self.queue_size :]
        self.steps += 1
        if len(self.queue) == self.queue_size and self.steps % self.refit_every == 0:
            self.refit()

    def refit(self) -> None:
        features = torch.cat(self.queue)
        usable = (features != 0).any(dim=1)
        n = int(usable.sum())
        if n < self.k:
            return  # too little to tell k clusters apart; the contrastive terms go on alone
        generator = torch.Generator().manual_seed(self.seed + self.steps)
        self.centroids, labels = spherical_kmeans(
            features, self.k, init=self.centroids, generator=generator, shared=True
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
        """What was saved with another queue_size or k is cut; the next refit draws what lacks."""
        self.queue = [q.to(device) for q in state["queue"]][-self.queue_size :]
        self.steps, self.statistics = state["steps"], state["statistics"]
        self.centroids = state["centroids"]
        if self.centroids is not None:
            finite = torch.isfinite(self.centroids).all(dim=1)
            kept = self.centroids[finite][: self.k].to(device)
            self.centroids = kept if len(kept) else None
