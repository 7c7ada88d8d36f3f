"""What an order does to the space itself: gaps between modalities, spread, and whether what is
found first means the same, of the embeddings that evaluation has kept."""

from __future__ import annotations

import re
from itertools import combinations
from pathlib import Path

import numpy as np

from mcn_ext.data.store import Store, StoreError
from mcn_ext.modalities import MODALITIES

NAMES = [row.name for row in MODALITIES.values()]


def load(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{modality: (unit rows (n, D), which are valid (n,))} of an evaluation's npz; empty if it has
    no embeddings."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {}
            for name in NAMES:
                if f"embedding:{name}" in file.files:
                    rows = file[f"embedding:{name}"].astype(np.float64)
                    norms = np.linalg.norm(rows, axis=1, keepdims=True)
                    found[name] = rows / np.maximum(norms, 1e-12), file[f"valid:{name}"]
            return found
    except (OSError, ValueError):
        return {}


def gaps(rows: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Of each pair: ``gap``, the distance of the two modalities' means (the modality gap, Liang et
    al., NeurIPS 2022: 0 to 2); ``within``, mean cosine of different clips of the modalities, and
    ``matched``, that of a clip's two."""
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


def relevance(captions: list[str]) -> np.ndarray:
    """How much captions have in common, (n, n) in [0, 1]: the shared words' weight over that of all
    words of both (Jaccard), a word's weight log(n / captions that have it)."""
    bags = [set(re.findall(r"\w+", text.lower())) for text in captions]
    words = sorted({word for bag in bags for word in bag})
    column = {word: i for i, word in enumerate(words)}
    has = np.zeros((len(bags), len(words)))
    for row, bag in zip(has, bags, strict=True):
        row[[column[word] for word in bag]] = 1
    weight = np.log(len(bags) / np.maximum(has.sum(axis=0), 1))
    shared = (has * weight) @ has.T
    own = np.diagonal(shared)
    return shared / np.maximum(own[:, None] + own - shared, 1e-12)


def ndcg(scores: np.ndarray, gains: np.ndarray, k: int = 10) -> np.ndarray:
    """nDCG@k of each query (n,): sum of gain / log2(1 + rank) over the first k, over its best."""
    k = min(k, scores.shape[1])
    discount = 1 / np.log2(np.arange(2, k + 2))
    first = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    found = np.take_along_axis(gains, first, axis=1) @ discount
    best = -np.sort(-gains, axis=1)[:, :k] @ discount
    return found / np.maximum(best, 1e-12)


def describe(path: Path, store: str, cache: dict) -> dict[str, float]:
    """:func:`gaps` of an evaluation's npz, and ``nDCG@10`` of text->video+audio (sum of cosines) by
    the :func:`relevance` of captions; cache: {store: relevance}."""
    rows = load(path)
    found = gaps(rows)
    if store not in cache:
        try:
            cache[store] = relevance(list(Store(Path(store)).texts()))
        except (StoreError, OSError):
            cache[store] = None
    gains = cache[store]
    if gains is None or len(rows) < 3 or len(rows["text"][0]) != len(gains):
        return found
    text, there = rows["text"]
    scores = sum(np.where(rows[n][1][:, None], rows[n][0], 0) for n in ("video", "audio")) @ text.T
    found["nDCG@10"] = float(100 * ndcg(scores.T[there], gains[there]).mean())
    return found
