"""Where in a video are the steps of a task? CrossTask's and MiningYouTube's protocols.

Scores (T, K) say how well each of K steps, in their order, fits each of T seconds.

- CrossTask (Zhukov et al., CVPR 2019; Miech et al., ICCV 2019): every step gets exactly one second,
  in order (:func:`assign`). Recall = steps whose second lies where they are annotated.
- MiningYouTube (Kuehne et al., 2019, arXiv 1906.01012): the seconds are aligned to the given order
  of steps (:func:`align`), measured by intersection over union (IoU) and over detection (IoD).

:func:`localize` does both for every video. All results are in percent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mcn_ext.data.store import Store, StoreError
from mcn_ext.evaluation.retrieval import similarity

BACKGROUND = -1
# Of align's background, in standard deviations of a step's scores over the video's seconds: set by
# an argument, not by annotated seconds. Half-way between a step's own seconds and the others, for a
# step that fills a share p of the video and stands out by d standard deviations of the others, is
# d (1/2 - p) / sqrt(1 + d^2 p (1 - p)): 0.44 for d = 1, 0.83 for d = 2 at p = 5 %, less for longer
# steps. Texts and seconds that never met in training stand out by little.
LEVEL = 0.5
ONE_TASK = "all"  # of MiningYouTube's videos, which have none
RESAMPLES = 2000
# ------------------------------------------------------------------------------------ predictions


def _array(scores: Tensor | np.ndarray) -> np.ndarray:
    """(T, K) float64; FloatingPointError for values that are not finite, ValueError for T < K."""
    scores = torch.as_tensor(scores).double().cpu().numpy()
    if scores.ndim != 2 or len(scores) < scores.shape[1]:
        raise ValueError(
            f"scores of shape {scores.shape}: expected (seconds, steps), and a second "
            "for each step at least"
        )
    bad = ~np.isfinite(scores)
    if bad.any():
        raise FloatingPointError(
            f"{bad.sum()} of {scores.size} scores are not finite: the embeddings are broken, "
            "there is nothing to compare"
        )
    return scores


def _best_from(values: np.ndarray) -> np.ndarray:
    """max(values[t:]) for each t."""
    return np.maximum.accumulate(values[::-1])[::-1]


def assign(scores: Tensor | np.ndarray) -> np.ndarray:
    """One second for each step, in their order, with the largest sum of scores: (K,) int64.

    CrossTask's inference, by dynamic programming over steps, the last first::

        V_k(t) = score[t, k] + max over t' > t of V_{k+1}(t'),   V_K = 0
        t_k    = the first maximum of V_k after t_{k-1}

    scores: (T, K), any float dtype, computed in float64. Of equal sums the earliest wins: each
    second is the first that step has in any best assignment (the steps' minima over two of them
    are one, too, so this is well defined). ValueError if T < K; FloatingPointError for scores that
    are not finite.
    """
    scores = _array(scores)
    n_seconds, n_steps = scores.shape
    totals = np.empty((n_steps, n_seconds))
    after = np.zeros(n_seconds)  # max of the next step's V beyond each second
    for k in reversed(range(n_steps)):
        totals[k] = scores[:, k] + after
        after = np.append(_best_from(totals[k])[1:], -np.inf)
    seconds, first = np.empty(n_steps, np.int64), 0
    for k in range(n_steps):
        seconds[k] = first + totals[k, first:].argmax()
        first = seconds[k] + 1
    return seconds


def standardize(scores: Tensor | np.ndarray) -> np.ndarray:
    """Each step's scores (T, K) less their mean over the seconds, in their standard deviations;
    zeros where a step's scores are all the same. float64."""
    scores = _array(scores)
    if not scores.size:
        return scores
    centred = scores - scores.mean(axis=0)
    # The mean of equal numbers may be off by rounding: no standard deviation to divide by.
    spread = np.where(np.ptp(scores, axis=0) > 0, centred.std(axis=0), np.inf)
    return centred / spread


def align(scores: Tensor | np.ndarray, background: float) -> np.ndarray:
    """A label for each second, (T,) int64: a step, 0 to K-1, or -1, background.

    Each step gets one run of at least one second, in their order; before, between and after may be
    background. Of all such alignments, one with the largest sum over labelled seconds of (score -
    background)::

        C_k(t) = sum over seconds before t of (score[:, k] - background)
        E_k(e) = C_k(e) + N_{k+1}(e)                  step k ends before second e
        S_k(s) = max over e > s of E_k(e) - C_k(s)    step k starts at second s
        N_k(t) = max over s >= t of S_k(s),           N_K = 0

    scores: (T, K), any float dtype, computed in float64. background: the score from which on a
    second belongs to a step; :data:`LEVEL` says how :func:`localize` sets it. (MiningYouTube's
    decoder has log-probabilities of trained classes, a transcript and a model of lengths instead.
    Ours are similarities to texts, without a class for background.) Of equal sums every start and
    end is the earliest of any best alignment. ValueError if T < K; FloatingPointError for scores
    that are not finite.
    """
    scores = _array(scores)
    n_seconds, n_steps = scores.shape
    gain = scores - background
    sums = np.concatenate([np.zeros((1, n_steps)), gain.cumsum(axis=0)])
    starts, ends = np.empty((n_steps, n_seconds)), np.empty((n_steps, n_seconds + 1))
    after = np.zeros(n_seconds + 1)
    for k in reversed(range(n_steps)):
        ends[k] = sums[:, k] + after
        starts[k] = _best_from(ends[k])[1:] - sums[:-1, k]
        after = np.append(_best_from(starts[k]), -np.inf)
    labels, first = np.full(n_seconds, BACKGROUND), 0
    for k in range(n_steps):
        start = first + int(starts[k, first:].argmax())
        first = start + 1 + int(ends[k, start + 1 :].argmax())
        labels[start:first] = k
    return labels


# ---------------------------------------------------------------------------------------- metrics


def inside(n_seconds: int, n_steps: int, segments: list) -> np.ndarray:
    """Segments [step, first second, second after the last] -> (T, K) bool: second t is annotated
    with step k, in any of its segments."""
    truth = np.zeros((n_seconds, n_steps), bool)
    for step, first, last in segments:
        truth[first:last, step] = True
    return truth


def hits(seconds: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Steps whose second (K,) is annotated with them in truth (T, K): (K,) bool. A step that is
    not annotated is no hit."""
    return truth[seconds, np.arange(truth.shape[1])]


def overlaps(labels: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(IoU, IoD) of each annotated step, in [0, 1].

    P are the seconds labelled with a step, G those annotated with it: IoU = |P and G| / |P or G|,
    the Jaccard index; IoD = |P and G| / |P|, intersection over detection, 0 where P is empty
    (Bojanowski et al., ECCV 2014; Kuehne et al., 2019). labels: (T,), truth: (T, K) bool.
    """
    steps = np.flatnonzero(truth.any(axis=0))
    truth, predicted = truth[:, steps], labels[:, None] == steps
    both = (predicted & truth).sum(axis=0)
    return both / (predicted | truth).sum(axis=0), both / np.maximum(predicted.sum(axis=0), 1)


def right_seconds(labels: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(T,) bool: the label is one of the second's steps, or background where it has none."""
    own = truth[np.arange(len(labels)), np.maximum(labels, 0)] if truth.shape[1] else labels >= 0
    return np.where(labels == BACKGROUND, ~truth.any(axis=1), own)


def expected_hits(truth: np.ndarray) -> np.ndarray:
    """Probability that each step (K,) is hit by K different seconds drawn at random, then sorted.

    Second t is the k-th of them with probability C(t, k) C(T - 1 - t, K - 1 - k) / C(T, K), k from
    0: exact. Zeros where T < K.
    """
    n_seconds, n_steps = truth.shape
    if n_seconds < n_steps:
        return np.zeros(n_steps)
    log_factorial = np.concatenate([[0.0], np.log(np.arange(1, n_seconds + 1)).cumsum()])

    def log_choose(n, k):
        possible = (k >= 0) & (k <= n)
        k = np.where(possible, k, 0)
        return np.where(
            possible, log_factorial[n] - log_factorial[k] - log_factorial[n - k], -np.inf
        )

    t, k = np.nonzero(truth)
    log_p = (
        log_choose(t, k)
        + log_choose(n_seconds - 1 - t, n_steps - 1 - k)
        - log_choose(n_seconds, n_steps)
    )
    return np.bincount(k, np.exp(log_p), n_steps)


def spread_evenly(n_seconds: int, n_steps: int) -> np.ndarray:
    """The seconds in the middle of K equal parts of a video of T >= K seconds, (K,) int64."""
    return ((np.arange(n_steps) + 0.5) * n_seconds / n_steps).astype(np.int64)


def recall_per_task(matched: np.ndarray, annotated: np.ndarray, tasks: list[str]) -> dict:
    """{task: matched steps of its videos / annotated steps of its videos}, fractions.

    matched, annotated: (n,) counts of each video, its task in ``tasks``. As CrossTask's code counts
    (Zhukov et al., CVPR 2019); the published MCN code takes the mean of its videos' recalls
    instead. Tasks without an annotated step are left out.
    """
    tasks = np.asarray(tasks)
    rows = {str(task): tasks == task for task in dict.fromkeys(tasks)}
    return {
        task: float(matched[r].sum() / annotated[r].sum())
        for task, r in rows.items()
        if annotated[r].sum()
    }


def recall_interval(
    matched: np.ndarray,
    annotated: np.ndarray,
    tasks: list[str],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean over tasks of :func:`recall_per_task`, a fraction.

    Videos are drawn anew within their task: the tasks are the benchmark's, not a sample.
    """
    rng, tasks = np.random.default_rng(seed), np.asarray(tasks)
    draws = []
    for task in dict.fromkeys(tasks):
        rows = np.flatnonzero((tasks == task) & (annotated > 0))
        if n := len(rows):
            times = rng.multinomial(n, np.full(n, 1 / n), resamples)
            draws.append(times @ matched[rows] / (times @ annotated[rows]))
    low, high = np.percentile(np.mean(draws, axis=0), [2.5, 97.5])
    return float(low), float(high)


# ----------------------------------------------------------------------------------- all of a set


def load_steps(store: str | os.PathLike) -> dict:
    """The steps and segments beside a store, ``<store>.steps.json``, as prepare crosstask and
    miningyoutube write it. StoreError names the file that is missing or of another form."""
    path = Path(f"{store}.steps.json")
    fix = "make it again with python -m mcn_ext.prepare crosstask or miningyoutube --overwrite"
    try:
        steps = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{path}: cannot be read ({error}); {fix}") from error
    try:
        if steps["protocol"] not in ("crosstask", "miningyoutube") or not steps["videos"]:
            raise ValueError(f"protocol {steps['protocol']!r}")
        for name, video in steps["videos"].items():
            n_seconds, n_steps = video["seconds"], len(video["steps"])
            segments = np.array(video["segments"], np.int64).reshape(-1, 3)
            step, first, last = segments.T
            if not (
                0 < n_seconds < 10**6
                and all(isinstance(text, str) for text in [video["task"], *video["steps"]])
                and ((0 <= step) & (step < n_steps)).all()
                and ((0 <= first) & (first < last) & (last <= n_seconds)).all()
            ):
                raise ValueError(f"video {name}")
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise StoreError(
            f"{path}: not the steps of a store ({type(error).__name__}: {error}); {fix}"
        ) from error
    return steps


Score = Callable[[str, int, list], "Tensor | np.ndarray | tuple | None"]


def localize(steps: dict, score: Score, *, background: float = LEVEL, seed: int = 0) -> dict:
    """Both protocols over all videos of :func:`load_steps`; the table's numbers, in percent.

    Args:
        score: (video id, T seconds, K step texts) -> (T, K) scores, also with which steps can be
            asked for (K,) bool, the others being missed; or None where there is nothing to compare:
            then all its steps are missed, all its seconds wrong, and it is counted.
        background: of :func:`align`, in standard deviations of each step's scores in the video.

    Returns:
        "videos", "missing" (score was None), "too_short" (T < K: missed, too), "unknown" (annotated
        steps that cannot be asked for), "steps" (annotated ones), "tasks": counts.
        "recall": mean over tasks of :func:`recall_per_task`, "recall_ci95", "recall_per_task".
        MiningYouTube is one task.
        "recall_by_video": mean over tasks of the mean of videos' recalls, as the published MCN code
        counts.
        "IoU", "IoD": :func:`overlaps`, mean over a video's annotated steps, then over videos.
        "frame_accuracy": :func:`right_seconds`, mean over a video's seconds, then over videos;
        "frame_accuracy_steps": over its annotated seconds alone, as background is easy to get right
        and much of a video. "background": as given.
        "chance": "recall" expected of seconds drawn at random (:func:`expected_hits`), "evenly":
        of steps spread evenly (:func:`spread_evenly`), without looking; both over all videos,
        missing ones, too.

    FloatingPointError or ValueError, naming the video, for scores that are not finite or of
    another shape; ValueError if no step of any video is annotated.
    """
    rows: list[dict] = []
    counts = dict.fromkeys(("missing", "too_short", "unknown"), 0)
    for name, video in tqdm(steps["videos"].items(), desc="steps", unit="video", mininterval=0.5):
        shape = n_seconds, n_steps = video["seconds"], len(video["steps"])
        truth = inside(*shape, video["segments"])
        row = dict.fromkeys(("matched", "evenly", "iou", "iod", "right", "right_steps"), 0.0)
        row["task"] = video["task"] if steps["protocol"] == "crosstask" else ONE_TASK
        row["annotated"] = int(truth.any(axis=0).sum())
        row["chance"] = expected_hits(truth).sum()
        rows.append(row)
        if n_seconds < n_steps:
            counts["too_short"] += 1
            continue
        row["evenly"] = hits(spread_evenly(*shape), truth).sum()
        found = score(name, n_seconds, video["steps"])
        if found is None:
            counts["missing"] += 1
            continue
        scores, asked = found if isinstance(found, tuple) else (found, np.ones(n_steps))
        asked = np.asarray(asked, bool)
        if tuple(scores.shape) != shape:
            raise ValueError(
                f"video {name}: scores of shape {tuple(scores.shape)}, expected "
                f"{shape} (seconds, steps)"
            )
        try:
            labels = align(standardize(scores), background)
            row["matched"] = (hits(assign(scores), truth) & asked).sum()
        except FloatingPointError as error:
            raise FloatingPointError(f"video {name}: {error}") from None
        counts["unknown"] += int((truth.any(axis=0) & ~asked).sum())
        labels[~asked[labels]] = BACKGROUND  # where a step nobody asked for would lie
        right = right_seconds(labels, truth)
        row["right"] = right.mean()
        if row["annotated"]:
            row["iou"], row["iod"] = (values.mean() for values in overlaps(labels, truth))
            row["right_steps"] = right[truth.any(axis=1)].mean()
    if not any(row["annotated"] for row in rows):
        raise ValueError("no step of any video is annotated: there is nothing to find")
    column = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    return {"videos": len(rows)} | counts | _summary(column, background, seed)


def _percent(values) -> float:
    return round(100.0 * float(np.mean(values)), 3)


def _summary(column: dict[str, np.ndarray], background: float, seed: int) -> dict:
    """:func:`localize`'s numbers from those of each video, {name: (n,)}."""
    annotated, tasks = column["annotated"], column["task"]
    some = annotated > 0  # videos without an annotated step have neither recall nor IoU

    def recalls(key: str) -> list[float]:
        return list(recall_per_task(column[key], annotated, tasks).values())

    per_task = recall_per_task(column["matched"], annotated, tasks)
    by_video = recall_per_task(column["matched"][some] / annotated[some], some[some], tasks[some])
    interval = recall_interval(column["matched"], annotated, tasks, seed=seed)
    return {
        "steps": int(annotated.sum()),
        "tasks": len(per_task),
        "recall": _percent(recalls("matched")),
        "recall_ci95": [_percent(end) for end in interval],
        "recall_per_task": {task: _percent(recall) for task, recall in per_task.items()},
        "recall_by_video": _percent(list(by_video.values())),
        "IoU": _percent(column["iou"][some]),
        "IoD": _percent(column["iod"][some]),
        "frame_accuracy": _percent(column["right"]),
        "frame_accuracy_steps": _percent(column["right_steps"][some]),
        "background": background,
        "chance": _percent(recalls("chance")),
        "evenly": _percent(recalls("evenly")),
    }


def scorer(embedder, store: Store, kind: str = "cosine") -> Score:
    """Scores of an :class:`.Embedder`: similarity of each step's text with what is
    seen and heard in each second. A second with nothing in it scores as the worst of the step."""
    number = {name: i for i, name in enumerate(store.ids())}

    def score(name: str, n_seconds: int, steps: list[str]) -> tuple[Tensor, Tensor] | None:
        if name not in number:
            return None
        begin = np.arange(n_seconds, dtype=float)
        # Not the next second's row: [t, t + 1) of streams of 1, 1.5 and 100 rows a second.
        clips = embedder.stretches(store, number[name], begin, begin + 0.999)
        there = torch.stack(list(clips[1].values())).any(dim=0)
        if not there.any():
            return None
        asked = embedder.texts(steps)
        scores = similarity(asked, clips, "text->" + "+".join(clips[0]), kind).T
        return torch.where(there[:, None], scores, scores[there].amin(dim=0)), asked[1]["text"]

    return score


def table_rows(result: dict) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of :func:`localize`'s result."""
    n = f"n = {result['steps']} of {result['videos']} videos, {result['tasks']} tasks"
    own = [f"{result[key]:.1f}" for key in ("recall", "IoU", "IoD", "frame_accuracy")]
    own.insert(1, "{:.1f} to {:.1f}".format(*result["recall_ci95"]))
    names = {"spread evenly": "evenly", "chance": "chance"}
    return (
        [f"steps ({n})", "recall", "95 % interval", "IoU", "IoD", "seconds right"],
        [["this run", *own]]
        + [[name, f"{result[key]:.1f}", "", "", "", ""] for name, key in names.items()],
    )


def notice(result: dict) -> str:
    """What is counted as missed, whatever the model, in words; empty if nothing."""
    what = {
        "missing": "videos not in the store or without content",
        "too_short": "videos shorter than their steps",
        "unknown": "steps without a known word",
    }
    parts = [f"{result[key]} {text}" for key, text in what.items() if result[key]]
    return ", ".join(parts) + ": misses" if parts else ""
