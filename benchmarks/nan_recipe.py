"""What goes NaN: the published objective and its k-means, as nan.py says, and cures for them."""

import math

import torch
from torch.nn import functional as F

from mcn_ext.reference import unit_rows

DIM, K, REFIT, QUEUE, MARGIN, TEMPERATURE = 256, 256, 20, 20, 0.001, 0.05


# ------------------------------------------------------------------------------------ fp16 on a CPU
def half(x):
    """x rounded to fp16, inf above 65,504; the gradient is rounded too."""
    return _Half.apply(x)


class _Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.half().float()

    @staticmethod
    def backward(ctx, grad):
        return grad.half().float()


def product(a, b):
    """a @ b^T as a tensor core computes it: fp16 factors, sums in fp32, an fp16 result."""
    return half(half(a) @ half(b).t())


# ------------------------------------------------------------------------------------- the recipe
CURES = {
    "divide": "clustering loss / number of its terms",
    "log_k": "clustering loss / (number of its terms x log K)",
    "temperature": "temperature 0.05",
    "fp32_kmeans": "k-means in fp32",
    "reseed": "empty clusters reseeded",
    "unit": "unit length",
    "no_clustering": "no clustering loss",
}
ALL = ("log_k", "temperature", "fp32_kmeans", "reseed", "unit")  # what ours has
ABLATION = (
    [(name,) for name in CURES] + [ALL] + [tuple(c for c in ALL if c != name) for name in ALL]
)


def title(cures):
    if len(cures) == 1:
        return f"+ {CURES[cures[0]]}"
    missing = [CURES[name] for name in ALL if name not in cures]
    return f"all five, without: {missing[0]}" if missing else "all five"


class Recipe:
    """The published objective and its k-means, with none or some of CURES.

    divide: the clustering loss, a sum over modalities, becomes their mean (the cure that was
    tried). log_k: and its unit log K, what a uniform guess costs. reseed: an empty cluster gets the
    row farthest from its centroid. unit: rows and centroids at unit length, in losses and queue.
    """

    def __init__(self, cures=()):
        self.cures, self.queue, self.centroids, self.steps = set(cures), [], None, 0
        self.scale = 1 / TEMPERATURE if "temperature" in cures else 1.0
        self.statistics = {}

    def __call__(self, video, audio, clip):
        if "unit" in self.cures:
            video, audio = unit_rows(video), unit_rows(audio)
        target = torch.arange(len(video))
        logits = half(product(video, audio) - MARGIN * torch.eye(len(video))) * self.scale
        contrastive = F.nll_loss(F.log_softmax(logits, 1), target) + F.nll_loss(
            F.log_softmax(logits.t(), 1), target
        )
        cluster, joint = torch.zeros(()), half((video.detach() + audio.detach()) / 2)
        if self.centroids is not None and "no_clustering" not in self.cures:
            mu = unit_rows(self.centroids) if "unit" in self.cures else self.centroids
            label = self.cosines(joint, mu).argmax(dim=1)
            own = MARGIN * F.one_hot(label, K)
            cluster = sum(
                F.cross_entropy(half(product(x, mu) - own) * self.scale, label)
                for x in (video, audio)
            )
            if self.cures & {"divide", "log_k"}:
                cluster = cluster / (2 * math.log(K) if "log_k" in self.cures else 2)
        self.queue, self.steps = [*self.queue, joint][-QUEUE:], self.steps + 1
        return contrastive + cluster, contrastive, cluster

    def after_step(self):
        """Every REFIT steps k-means, in up to 20 rounds."""
        if self.steps % REFIT or len(self.queue) < QUEUE:
            return
        x = torch.cat(self.queue)
        if self.centroids is None:
            draw = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
            self.centroids = x[draw[:K]].clone()
        for _ in range(20):
            score, label = self.cosines(x, self.centroids).max(dim=1)
            counts = torch.bincount(label, minlength=K).float()
            sums = torch.zeros(K, DIM).index_add_(0, label, x)
            if "fp32_kmeans" not in self.cures:
                sums = half(sums)  # onehot @ x, an fp16 result
            new = sums / counts[:, None]
            empty = (counts == 0).nonzero().flatten()
            if "reseed" in self.cures:
                new[empty] = x[score.argsort(stable=True)[: len(empty)]]
            new = torch.nan_to_num(new)
            moved = (new - self.centroids).square().sum()
            self.centroids = new
            if moved <= 1e-4:
                break
        counts = torch.bincount(self.cosines(x, self.centroids).argmax(dim=1), minlength=K)
        self.statistics = {
            "largest_share": float(counts.max() / counts.sum()),
            "live_clusters": int((counts > 0).sum()),
        }

    def cosines(self, x, mu):
        a, b = (rows / (rows.norm(dim=1, keepdim=True) + 1e-8) for rows in (x, mu))
        return a @ b.t() if "fp32_kmeans" in self.cures else product(a, b)
