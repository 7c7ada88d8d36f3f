"""Measures of the embedding space, from the embeddings that evaluation has kept: modality gaps,
spread within a modality, whether clusters and top results share the captions' words."""

from __future__ import annotations

import re
import zipfile
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from mcn_ext.clustering import spherical_kmeans
from mcn_ext.data.store import Store, StoreError
from mcn_ext.modalities import MODALITIES

NAMES = [row.name for row in MODALITIES.values()]
CLUSTERS, CLIPS = 64, 1000  # of k-means


def load(path: Path, unit: bool = True) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{modality: (rows (n, D) fp32, which are valid (n,))} of an evaluation's npz; empty if it has
    no embeddings. unit: rows of length 1, whose dot products are cosines."""
    found = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for name in NAMES:
                if f"embedding:{name}" in file.files:
                    rows = file[f"embedding:{name}"].astype(np.float32)
                    norms = np.linalg.norm(rows, axis=1, keepdims=True) if unit else 1
                    found[name] = rows / np.maximum(norms, 1e-12), file[f"valid:{name}"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}
    return found


def gaps(rows: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """For each pair of modalities: ``gap``, the distance of their mean embeddings (Liang et al.,
    NeurIPS 2022; 0 to 2), and ``matched``, the mean cosine of a clip's two embeddings. For each
    modality: ``within``, the mean cosine of different clips."""
    found = {}
    for a, b in combinations(rows, 2):
        there = rows[a][1] & rows[b][1]
        x, y = rows[a][0][there], rows[b][0][there]
        n = len(x)
        if n < 2:
            continue
        means = x.mean(axis=0), y.mean(axis=0)
        found[f"gap {a}, {b}"] = float(np.linalg.norm(means[0] - means[1]))
        found[f"matched {a}, {b}"] = float((x * y).sum(axis=1).mean())
    for name, (x, valid) in rows.items():
        x = x[valid]
        if len(x) > 1:  # the mean of x_i x_j over i != j
            total = np.square(x.sum(axis=0)).sum() - np.square(x).sum()
            found[f"within {name}"] = float(total / (len(x) * (len(x) - 1)))
    return found


def words_of(captions: list[str]) -> np.ndarray:
    """Which words each caption has, (n, words) 0 or 1, for all words of the captions."""
    bags = [set(re.findall(r"\w+", text.lower())) for text in captions]
    column = {word: i for i, word in enumerate(sorted({word for bag in bags for word in bag}))}
    has = np.zeros((len(bags), len(column)))
    for row, bag in zip(has, bags, strict=True):
        row[[column[word] for word in bag]] = 1
    return has


def relevance(has: np.ndarray) -> np.ndarray:
    """How much captions have in common, (n, n) in [0, 1]: the shared words' weight over that of all
    words of both (Jaccard), a word's weight log(n / captions that have it)."""
    weight = np.log(len(has) / np.maximum(has.sum(axis=0), 1))
    shared = (has * weight) @ has.T
    own = np.diagonal(shared)
    return shared / np.maximum(own[:, None] + own - shared, 1e-12)


def _entropy(share: np.ndarray) -> np.ndarray:
    """Of a yes or no that is yes with this probability, in nats."""
    parts = [p * np.log(np.maximum(p, 1e-12)) for p in (share, 1 - share)]
    return -sum(parts)


def clusters(rows: dict[str, tuple[np.ndarray, np.ndarray]], has: np.ndarray) -> dict[str, float]:
    """K-means of all modalities' embeddings together, against the captions' words, in percent.

    ``words``: how much a cluster tells of the words of its clips' captions, I / H summed over
    words; 0: no more than if captions were shuffled between clips, 100: everything. That is the
    homogeneity of V-measure (Rosenberg & Hirschberg 2007) for clips of several concepts, adjusted
    for chance as by Vinh et al. (2010; here by 10 permutations). ``mixed``: entropy of the
    modalities in a clip's cluster over that of all, 0 where each modality has clusters of its own.
    If there are more than CLIPS clips, about CLIPS evenly spaced ones are used.
    """
    step = -(-len(has) // CLIPS)
    rows = {name: (x[::step], valid[::step]) for name, (x, valid) in rows.items()}
    has = has[::step]
    points = np.concatenate([x[valid] for x, valid in rows.values()])
    clip = np.concatenate([np.flatnonzero(valid) for _, valid in rows.values()])
    modality = np.repeat(range(len(rows)), [valid.sum() for _, valid in rows.values()])
    k = max(1, min(CLUSTERS, len(has) // 4))  # a cluster needs a few clips
    _, labels = spherical_kmeans(torch.from_numpy(points), k)
    member = np.eye(k)[labels.numpy()].T  # (clusters, points)
    weight = member.mean(axis=1)

    def tells(of: np.ndarray) -> float:
        """Mutual information of the clusters and the columns of ``of`` (points, columns)."""
        share = member @ of / np.maximum(member.sum(axis=1, keepdims=True), 1)
        return float(_entropy(of.mean(axis=0)).sum() - weight @ _entropy(share).sum(axis=1))

    rng = np.random.default_rng(0)
    chance = np.mean([tells(has[rng.permutation(len(has))[clip]]) for _ in range(10)])
    everything = _entropy(has[clip].mean(axis=0)).sum()
    found = {"words": 100 * (tells(has[clip]) - chance) / max(everything - chance, 1e-12)}
    of = np.eye(len(rows))[modality]
    share = member @ of / np.maximum(member.sum(axis=1, keepdims=True), 1)
    apart = -(share * np.log(np.maximum(share, 1e-12))).sum(axis=1)
    total = -(of.mean(axis=0) * np.log(np.maximum(of.mean(axis=0), 1e-12))).sum()
    return found | {"mixed": float(100 * weight @ apart / max(total, 1e-12))}


def ndcg(scores: np.ndarray, gains: np.ndarray, k: int = 10) -> np.ndarray:
    """nDCG@k of each query (n,): sum of gain / log2(1 + rank) over the first k, over its best."""
    k = min(k, scores.shape[1])
    discount = 1 / np.log2(np.arange(2, k + 2))
    first = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    found = np.take_along_axis(gains, first, axis=1) @ discount
    best = -np.sort(-gains, axis=1)[:, :k] @ discount
    return found / np.maximum(best, 1e-12)


def scores(rows: dict[str, tuple[np.ndarray, np.ndarray]], queries=slice(None)) -> np.ndarray:
    """text->video+audio by the sum over a clip's modalities, (queries, clips); -inf for a clip that
    has neither."""
    clips = sum(np.where(rows[name][1][:, None], rows[name][0], 0) for name in ("video", "audio"))
    there = rows["video"][1] | rows["audio"][1]
    return np.where(there, rows["text"][0][queries] @ clips.T, -np.inf)


def describe(path: Path, store: str, cache: dict) -> dict[str, float]:
    """:func:`gaps` of an evaluation's npz; with its captions also :func:`clusters` and ``nDCG@10``
    of text->video+audio, by cosines, by their :func:`relevance`. cache: {store: (words,
    relevance)}, as many runs share a store."""
    rows = load(path)
    found = gaps(rows)
    if store not in cache:
        try:
            has = words_of(list(Store(Path(store)).texts()))
        except (StoreError, OSError):
            has = np.zeros((0, 0))
        cache[store] = has, relevance(has)
    has, gains = cache[store]
    if len(rows) < 3 or len(rows["text"][0]) != len(has):
        return found
    there = rows["text"][1]
    found["nDCG@10"] = float(100 * ndcg(scores(rows)[there], gains[there]).mean())
    return found | clusters(rows, has)
