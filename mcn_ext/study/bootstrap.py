"""Intervals and tests of recall: a bootstrap over queries and seeds, for one comparison and for all
of a family at once."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import combinations

import numpy as np


@lru_cache(maxsize=1)  # a study compares many methods on the same queries
def _query_counts(n: int, resamples: int) -> np.ndarray:
    """How often each of n queries is in each resample, (n, resamples) fp32."""
    rng = np.random.default_rng(0)
    drawn = [np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(resamples)]
    return np.stack(drawn, axis=1).astype(np.float32)


def _bootstrap_means(values: np.ndarray, resamples: int) -> np.ndarray:
    """Bootstrap draws of the mean of ``values`` (seeds, queries), both resampled, crossed.

    Seeds and queries are two random samples that meet in every cell, so each is resampled as a
    whole (the pigeonhole bootstrap, Owen 2007)::

        draw = mean_q d_q + sqrt(S / (S - 1)) (1/S) sum_s (u_s - 1) d_s,  over the drawn queries q

    with u_s how often seed s was drawn. The root corrects that S draws from S seeds vary too
    little, which matters for two or three seeds. One seed is not resampled.
    """
    n_seeds, n = values.shape
    correction = np.sqrt(n_seeds / (n_seeds - 1)) if n_seeds > 1 else 0.0
    # (seeds, resamples): each seed's mean over the same drawn queries.
    per_seed = values.astype(np.float32) @ _query_counts(n, resamples) / n
    rng = np.random.default_rng([0, 1])  # another stream than the one that draws queries
    counts = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), resamples).T
    return per_seed.mean(axis=0) + correction * ((counts - 1) * per_seed).mean(axis=0)


# 97.5 % quantile of Student's t by degrees of freedom; in between, log t is linear in 1 / df.
STUDENT_T = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    6: 2.447,
    10: 2.228,
    20: 2.086,
    np.inf: 1.960,
}


def _degrees_of_freedom(values: np.ndarray, variance: float) -> float:
    """Satterthwaite's, of a mean whose ``variance`` the bootstrap has found: S - 1 where seeds are
    all the variance, many where queries are."""
    n_seeds = len(values)
    of_seeds = float(values.mean(axis=1).var(ddof=1)) / n_seeds if n_seeds > 1 else 0.0
    # df = V^2 / (V_s^2 / (S - 1)); the queries' share of V has many degrees. By chance V may be
    # below the seeds' V_s, hence max.
    return (n_seeds - 1) * max(1.0, variance / of_seeds) ** 2 if of_seeds else np.inf


def interval95(values: np.ndarray, resamples: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean of ``values`` (seeds, queries): t times the bootstrap's standard
    deviation. Two or three seeds say little about how much seeds vary, so t has few degrees of
    freedom."""
    mean = float(values.mean())
    variance = float(_bootstrap_means(values, resamples).var())
    df = _degrees_of_freedom(values, variance)
    inverse = [1 / x for x in STUDENT_T]
    # np.interp needs rising x: 1 / df falls along the table, so both are reversed.
    log_t = np.interp(1 / df, inverse[::-1], np.log(list(STUDENT_T.values()))[::-1])
    half = float(np.exp(log_t)) * variance**0.5
    return mean - half, mean + half


def recall_interval(ranks: np.ndarray, k: int = 10, resamples: int = 2000) -> tuple[float, float]:
    """95 % interval of R@k in percent, of ranks (seeds, queries)."""
    low, high = interval95(100.0 * (ranks <= k), resamples)
    # The interval is symmetric and may leave what a recall can be.
    return max(0.0, low), min(100.0, high)


def paired_bootstrap(a: np.ndarray, b: np.ndarray, k: int = 10, resamples: int = 2000) -> dict:
    """Compares R@k of two methods: ranks (seeds, queries) of the same seeds and the same queries.

    Returns "difference" in percentage points, its 95 % interval "ci95", and "significant", whether
    0 lies outside of it::

        difference = 100 / (S Q) sum_sq ([a_sq <= k] - [b_sq <= k])

    Pairing cancels what makes a query hard for both. With one seed the interval says nothing on how
    another seed would do. Raises ValueError if the shapes differ.
    """
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"ranks must be (seeds, queries), the same for both: {a.shape}, {b.shape}")
    # -100, 0 or 100 for each query: their mean is in percentage points.
    gain = 100.0 * ((a <= k).astype(np.float32) - (b <= k))
    low, high = interval95(gain, resamples)
    significant = low > 0 or high < 0
    return {"difference": float(gain.mean()), "ci95": (low, high), "significant": significant}


def compare_ranks(a: dict[int, np.ndarray], b: dict[int, np.ndarray]) -> dict | None:
    """:func:`paired_bootstrap` of {seed: ranks} on the common seeds, which "seeds" lists; None if
    there is none."""
    pairs = {seed: (a[seed], b[seed]) for seed in sorted(a.keys() & b.keys())}
    pairs = {s: pair for s, pair in pairs.items() if all(ranks is not None for ranks in pair)}
    n = {len(ranks) for pair in pairs.values() for ranks in pair}
    if len(n) != 1:  # no common seed, or seeds that were evaluated on different stores
        return None
    return paired_bootstrap(*np.stack(list(pairs.values()), axis=1)) | {"seeds": list(pairs)}


# ------------------------------------------------------------------- all against all, in one test
POWER = 0.84  # 80 % quantile of the normal distribution
DRAWS_OF_T = 20  # of the denominator of t, for each resample


def compare_family(
    ranks: Mapping[str, Mapping[int, np.ndarray]], k: int = 10, resamples: int = 2000
) -> list[dict]:
    """R@k of every method against every other: {method: {seed: ranks}} on the common seeds.

    Of each pair "a", "b" (in the order of ``ranks``): the "difference" a - b in points; "ci95",
    its interval by itself; "simultaneous", intervals that *all* hold with 95 %; "p", step-down
    (Holm's procedure, with the joint distribution): with 95 % none is below 0.05 where nothing
    differs; "significant": 0 is outside of the simultaneous interval; "detectable": a true
    difference that would be found in 4 of 5 studies of as many seeds. Empty without two methods and
    common seeds and queries.

    The intervals are those of max |T| over the same draws for all pairs (Westfall & Young 1993)::

        T_p = (draw_p - mean_p) / (sd_p sqrt(chi2_df / df))

    with df the smallest Satterthwaite degrees of freedom of any pair, as in :func:`interval95`.
    """
    seeds = sorted(set.intersection(*(set(of) for of in ranks.values()))) if ranks else []
    sizes = {len(of[seed]) for of in ranks.values() for seed in seeds}
    if len(ranks) < 2 or len(sizes) != 1:
        return []
    hits = {
        name: np.stack([of[seed] <= k for seed in seeds]).astype(np.float32)
        for name, of in ranks.items()
    }
    pairs = list(combinations(hits, 2))
    gains = [100 * (hits[a] - hits[b]) for a, b in pairs]
    draws = np.stack([_bootstrap_means(gain, resamples) for gain in gains])  # (pairs, resamples)
    means, deviations = np.array([g.mean() for g in gains]), draws.std(axis=1)
    known = np.maximum(deviations, 1e-9)  # 0: every query and seed has the same gain
    df = min(_degrees_of_freedom(g, d**2) for g, d in zip(gains, known, strict=True))
    t = ((draws - draws.mean(axis=1, keepdims=True)) / known[:, None])[:, None]
    if np.isfinite(df):
        rng = np.random.default_rng([0, 2])
        t = t / np.sqrt(rng.chisquare(df, (DRAWS_OF_T, resamples)) / df)
    sizes_of_t = np.abs(t).reshape(len(pairs), -1)
    width = float(np.quantile(sizes_of_t.max(axis=0), 0.95))
    found = np.abs(means) / known
    adjusted, largest = np.empty(len(pairs)), 0.0
    order = np.argsort(-found)
    for i, pair in enumerate(
        order
    ):  # the largest against all, the next against those that are left
        above = (sizes_of_t[order[i:]].max(axis=0) >= found[pair]).sum()
        # One is added, as a p of 0 is more than draws can tell.
        largest = max(largest, (1 + above) / (1 + sizes_of_t.shape[1]))
        adjusted[pair] = largest
    return [
        {
            "a": a,
            "b": b,
            "difference": float(means[i]),
            "ci95": interval95(gains[i], resamples),
            "simultaneous": (means[i] - width * deviations[i], means[i] + width * deviations[i]),
            "p": float(adjusted[i]),
            "significant": bool(found[i] > width),
            "detectable": float((width + POWER) * deviations[i]),
            "seeds": seeds,
        }
        for i, (a, b) in enumerate(pairs)
    ]
