"""Retrieval metrics: ranks with a stated tie rule, R@K, median rank, bootstrap intervals."""

from __future__ import annotations

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
    # Its own column ties with itself.
    ties = (similarity == own).sum(dim=1) - 1
    return (1 + better + ties / 2).cpu().numpy().astype(np.float64)


def summarize(rank: np.ndarray, *, resamples: int = 2000, seed: int = 0) -> dict:
    """{"R@1", "R@1_ci95", ..., "MedR_ci95"} in percent; 95 % percentile bootstrap over queries."""
    rng = np.random.default_rng(seed)
    drawn = [rank[rng.integers(0, len(rank), len(rank))] for _ in range(resamples)]
    # k=k stores this k: else all lambdas would use the last one.
    statistics = {f"R@{k}": lambda ranks, k=k: 100.0 * (ranks <= k).mean() for k in RECALLS}
    out = {}
    for name, statistic in (statistics | {"MedR": np.median}).items():
        interval = np.percentile([statistic(ranks) for ranks in drawn], [2.5, 97.5])
        out[name] = round(float(statistic(rank)), 3)
        out[f"{name}_ci95"] = [round(float(end), 3) for end in interval]
    return out


def resample(sums: np.ndarray, counts: np.ndarray, rng, resamples: int = 2000) -> np.ndarray:
    """Sum of ``sums`` (n,) / sum of ``counts`` (n,) of rows that are drawn anew, (resamples,): a
    bootstrap of clusters, such as the sentences of each video."""
    # How often each row is drawn is enough: two products then give the sums of all draws.
    times = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), resamples)
    return (times @ sums) / (times @ counts)


def gains(found: dict[str, np.ndarray], prefix: str) -> dict[str, dict]:
    """{row: {"R@1": points more than the row without ``prefix`` in its name, "R@1_ci95", ...}} of
    ranks (n,) by row. 95 % intervals: both rows' queries are resampled together."""
    out = {}
    for name, rank in found.items():
        before = name.replace(f"({prefix}sum)", "").replace(prefix, "").strip()
        if prefix in name:
            out[name] = {"than": before}
            for k in RECALLS:
                more = 100.0 * ((rank <= k).astype(float) - (found[before] <= k))
                draws = resample(more, np.ones(len(more)), np.random.default_rng(0))
                out[name][f"R@{k}"] = round(float(more.mean()), 3)
                out[name][f"R@{k}_ci95"] = np.percentile(draws, [2.5, 97.5]).round(3).tolist()
    return out


def gain_rows(rows: dict[str, dict]) -> tuple[list, list]:
    """:func:`gains` as (header, rows)."""
    keys = [f"R@{k}" for k in RECALLS]
    body = [
        [f"{name} less {row['than']}"]
        + ["{:+.1f} ({:+.1f} to {:+.1f})".format(row[key], *row[f"{key}_ci95"]) for key in keys]
        for name, row in rows.items()
    ]
    return ["more found", *keys], body


def keep(metrics: dict, name: str, entry: dict) -> None:
    """Put a result into ``metrics``. What is there of other data, checkpoint, step or similarity
    moves to the list ``replaced``, its newest 20; of the same, rows that ``entry`` lacks stay."""
    old = metrics.get(name, {})
    settings = ("n", "data", "checkpoint", "step", "similarity", "gallery")
    if any(old.get(key) != entry.get(key) for key in settings):
        if old:
            metrics["replaced"] = [*metrics.get("replaced", []), {"set": name} | old][-20:]
        old = {}
    metrics[name] = old | entry


def table_rows(rows: dict[str, dict], n: int, what: str = "direction") -> tuple[list, list]:
    """Summaries {direction: summary} as (header, rows), with R@1's interval and chance's row."""
    body = []
    for name, row in rows.items():
        interval = "{:.1f} to {:.1f}".format(*row["R@1_ci95"])
        recalls = [f"{row[f'R@{k}']:.1f}" for k in RECALLS]
        body.append([name, recalls[0], interval, *recalls[1:], f"{row['MedR']:g}"])
    recalls = [f"{100 * min(k / n, 1):.1f}" for k in RECALLS]
    body.append(["chance", recalls[0], "", *recalls[1:], f"{(n + 1) / 2:g}"])
    return [f"{what} (n = {n})", "R@1", "95 % interval", "R@5", "R@10", "MedR"], body


def markdown(header: list[str], body: list[list[str]]) -> str:
    """A table, its first column to the left, the others to the right."""
    lines = []
    for row in (header, *body):
        lines.append("|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|")
    lines.insert(1, "|---" + "|---:" * (len(header) - 1) + "|")
    return "\n".join(lines)
