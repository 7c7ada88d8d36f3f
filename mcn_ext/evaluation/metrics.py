"""Retrieval metrics: ranks with a stated tie rule, R@K, median rank, bootstrap intervals."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

RECALLS = (1, 5, 10)


def check_finite(similarity: Tensor) -> None:
    """FloatingPointError if any similarity is not finite: such rows must not vanish from means."""
    # One pass, a NaN is both; isfinite().all() takes as long as the product of D = 256 before it.
    if similarity.numel() and not torch.stack(torch.aminmax(similarity)).isfinite().all():
        raise FloatingPointError(
            f"{int((~torch.isfinite(similarity)).sum())} of {similarity.numel()} similarities are "
            "not finite: the embeddings are broken, there is nothing to rank"
        )


def ranks(similarity: Tensor, answers: Tensor | None = None, *, finite: bool = True) -> np.ndarray:
    """Rank of each query's answer: 1 + number strictly better + half the number that tie with it.

    similarity: (queries, candidates). answers: (queries,) int64 column of the right candidate
    (default: the query's own number). A model that maps everything to one point ranks every answer
    in the middle, not first. ``finite``: :func:`check_finite` first.
    """
    if finite:
        check_finite(similarity)
    answers = (
        torch.arange(len(similarity), device=similarity.device) if answers is None else answers
    )
    own = similarity.gather(1, answers[:, None])
    better = (similarity > own).sum(dim=1)
    ties = (similarity == own).sum(dim=1) - 1
    return (1 + better + ties / 2).cpu().numpy().astype(np.float64)


def summarize(rank: np.ndarray, *, resamples: int = 2000, seed: int = 0) -> dict:
    """{"R@1", "R@1_ci95", ..., "MedR_ci95"} in percent; 95 % percentile bootstrap over queries."""
    rng = np.random.default_rng(seed)
    hits = {f"R@{k}": 100.0 * (rank <= k) for k in RECALLS}
    draws = {name: np.empty(resamples) for name in [*hits, "MedR"]}
    for i in range(resamples):
        chosen = rng.integers(0, len(rank), len(rank))
        for name, hit in hits.items():
            draws[name][i] = hit[chosen].mean()
        draws["MedR"][i] = np.median(rank[chosen])
    out = {}
    for name, values in draws.items():
        out[name] = round(float(np.median(rank) if name == "MedR" else hits[name].mean()), 3)
        out[f"{name}_ci95"] = [round(float(q), 3) for q in np.percentile(values, [2.5, 97.5])]
    return out


def keep(metrics: dict, name: str, entry: dict) -> None:
    """Put a result into ``metrics``. What is there of other data, checkpoint, step or similarity
    moves to the list ``replaced``, its newest 20; of the same, rows that ``entry`` lacks stay."""
    old = metrics.get(name, {})
    if any(
        old.get(key) != entry.get(key) for key in ("n", "data", "checkpoint", "step", "similarity")
    ):
        if old:
            metrics["replaced"] = [*metrics.get("replaced", []), {"set": name} | old][-20:]
        old = {}
    metrics[name] = old | entry


def table_rows(
    rows: dict[str, dict], n: int, what: str = "direction"
) -> tuple[list[str], list[list[str]]]:
    """Summaries {direction: summary} as (header, rows), with R@1's interval and chance's row."""
    body = [
        [
            name,
            f"{s['R@1']:.1f}",
            "{:.1f} to {:.1f}".format(*s["R@1_ci95"]),
            f"{s['R@5']:.1f}",
            f"{s['R@10']:.1f}",
            f"{s['MedR']:g}",
        ]
        for name, s in rows.items()
    ]
    chance = [
        "chance",
        f"{100 / n:.1f}",
        "",
        f"{100 * min(5 / n, 1):.1f}",
        f"{100 * min(10 / n, 1):.1f}",
        f"{(n + 1) / 2:g}",
    ]
    return ([f"{what} (n = {n})", "R@1", "95 % interval", "R@5", "R@10", "MedR"], [*body, chance])


def markdown(header: list[str], body: list[list[str]]) -> str:
    """A table, its first column to the left, the others to the right."""
    lines = [
        "|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|"
        for row in (header, *body)
    ]
    return "\n".join([lines[0], "|---" + "|---:" * (len(header) - 1) + "|", *lines[1:]])


def table(rows: dict[str, dict], n: int, what: str = "direction") -> str:
    """:func:`table_rows` in Markdown."""
    return markdown(*table_rows(rows, n, what))


def _crossed(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Bootstrap draws of the mean of ``values`` (seeds, queries), both drawn anew, crossed.

    Seeds and queries are two random samples that meet in every cell, so both are resampled, each as
    a whole (the pigeonhole bootstrap, Owen 2007)::

        draw = mean_q d_q + sqrt(S / (S - 1)) (1/S) sum_s (u_s - 1) d_s,  over the drawn queries q

    with u_s how often seed s was drawn. The root undoes that S draws from S seeds vary too little,
    which matters for the two or three seeds there are. One seed is not resampled.
    """
    n_seeds, n = values.shape
    grow = np.sqrt(n_seeds / (n_seeds - 1)) if n_seeds > 1 else 0.0
    per_seed = values.astype(np.float32) @ _times_drawn(n, resamples, seed) / n
    rng = np.random.default_rng([seed, 1])  # not the stream the queries are drawn from
    seeds = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), resamples).T
    return per_seed.mean(axis=0) + grow * ((seeds - 1) * per_seed).mean(axis=0)


@lru_cache(maxsize=1)  # a study compares many methods on the same queries
def _times_drawn(n: int, resamples: int, seed: int) -> np.ndarray:
    """How often each of n queries is in each resample, (n, resamples) fp32."""
    rng = np.random.default_rng(seed)
    return np.stack(
        [np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(resamples)], axis=1
    ).astype(np.float32)


# 97.5 % quantile of Student's t by degrees of freedom; between them, its logarithm over 1 / df.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 6: 2.447, 10: 2.228, 20: 2.086, np.inf: 1.960}


def _interval95(values: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """95 % interval of the mean of ``values`` (seeds, queries): t times the standard deviation of
    :func:`_crossed`'s draws. Two or three seeds say little about how much seeds vary, so t has
    Satterthwaite's degrees of freedom: S - 1 where seeds are all the variance, many where queries
    are."""
    variance, n_seeds = float(_crossed(values, resamples, seed).var()), len(values)
    of_seeds = float(values.mean(axis=1).var(ddof=1)) / n_seeds if n_seeds > 1 else 0.0
    df = (n_seeds - 1) * max(1.0, variance / of_seeds) ** 2 if of_seeds else np.inf
    inverse = [1 / x for x in _T]
    t = np.exp(np.interp(1 / df, inverse[::-1], np.log(list(_T.values()))[::-1]))
    half = float(t) * variance**0.5
    return float(values.mean()) - half, float(values.mean()) + half


def recall_interval(
    rank: np.ndarray, k: int = 10, *, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of R@k in percent, of ranks (seeds, queries), over both (:func:`_crossed`)."""
    low, high = _interval95(100.0 * (rank <= k), resamples, seed)
    return max(0.0, low), min(100.0, high)


def paired_bootstrap(
    a: np.ndarray, b: np.ndarray, k: int = 10, *, resamples: int = 2000, seed: int = 0
) -> dict:
    """Is R@k of ``a`` really above that of ``b``? Ranks (seeds, queries) of two methods, of the
    same seeds and the same queries in the same order -> {"difference", "ci95", "real"}.

    The difference in percentage points, of paired queries and seeds::

        D = 100 / (S Q) sum_sq ([a_sq <= k] - [b_sq <= k])

    "ci95" is the interval of D from resampling queries and seeds (:func:`_crossed`,
    :func:`_interval95`), "real" whether it leaves out 0. Both methods answer the same queries: what
    makes a query hard cancels, and the interval is narrower than those of two recalls on their own.
    With one seed it says nothing on how another seed would do. ValueError if the shapes differ.
    """
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"ranks must be (seeds, queries), the same of both: {a.shape}, {b.shape}")
    gain = 100.0 * ((a <= k).astype(np.float32) - (b <= k))
    low, high = _interval95(gain, resamples, seed)
    return {"difference": float(gain.mean()), "ci95": (low, high), "real": low > 0 or high < 0}
