"""mcn_ext's spherical k-means against others: time of a fit and how good it is.

    python benchmarks/kmeans.py

Unit rows around twice as many directions as there are centroids, fp32, the same start for all, at
most 20 rounds. "refit" starts from the centroids of an earlier sample, as in training; "cold" (on a
CPU) draws its own start: ours greedy k-means++, plain random rows. "plain" is what a training
script would write: cosines and means by PyTorch. Inertia: the sum of 1 - cosine to the own
centroid; live: clusters with a row. On a GPU at the published size, and ours with other numbers of
points compared at once (BLOCK of mcn_ext/clustering.py).
"""

from functools import partial

import torch
from common import DEVICE, QUICK, describe, save, show, take_turns
from torch.nn import functional as F

from mcn_ext import clustering
from mcn_ext.reference import unit_rows

N, D, K = (2048, 32, 8) if QUICK else (81920, 6144, 256) if DEVICE == "cuda" else (8192, 512, 256)
ROUNDS = 20


def mixture(seed):
    """Rows around directions that are the same for every seed."""
    g = {"generator": torch.Generator(DEVICE).manual_seed(0), "device": DEVICE}
    centres = unit_rows(torch.randn(2 * K, D, **g))
    g["generator"].manual_seed(seed)
    return unit_rows(
        centres[torch.randint(2 * K, (N,), **g)] + torch.randn(N, D, **g) * 1.5 / D**0.5
    )


def ours(x, start, block=None):
    chosen = clustering.BLOCK
    clustering.BLOCK = chosen | ({DEVICE: block} if block else {})
    try:
        return clustering.spherical_kmeans(x, K, init=start, max_iter=ROUNDS)
    finally:
        clustering.BLOCK = chosen


def plain(x, start):
    centroids = x[torch.randperm(len(x), device=DEVICE)[:K]] if start is None else start
    for _ in range(ROUNDS):
        labels = (x @ centroids.t()).argmax(1)
        centroids = F.normalize(torch.zeros_like(centroids).index_add_(0, labels, x))
    return centroids, labels


def measure():
    """A row for each implementation and start."""
    fits = {"ours": ours, "plain": plain}
    if DEVICE == "cuda":
        fits |= {f"ours, block {n}": partial(ours, block=n) for n in (1024, 4096, 65536)}
    x, start, rows = mixture(2), clustering.spherical_kmeans(mixture(1), K)[0], []
    starts = {"refit": start} if DEVICE == "cuda" else {"refit": start, "cold": None}
    for kind, init in starts.items():
        calls = {name: partial(fit, x, init) for name, fit in fits.items()}
        taken = take_turns(calls, 1 if QUICK or DEVICE == "cuda" else 3)
        for name, call in calls.items():
            centroids, labels = call()
            loss = (1 - (x * unit_rows(centroids)[labels]).sum(1)).double().sum().item()
            row = {"fit": kind, "k-means": name, "ms": taken[name]["ms"]}
            rows.append(row | {"inertia": loss, "live": len(labels.unique())})
    return rows


def main():
    rows = measure()
    show(f"N {N}, D {D}, K {K}", rows)
    save("kmeans", describe() | {"n": N, "d": D, "k": K, "rows": rows})


if __name__ == "__main__":
    main()
