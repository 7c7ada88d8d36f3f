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
from math import comb
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mcn_ext.data.store import Store, StoreError
from mcn_ext.evaluation.metrics import check_finite, resample
from mcn_ext.evaluation.retrieval import similarity

BACKGROUND = -1
# Of align's background, in standard deviations of a step's scores over the video's seconds: set by
# an argument, not by annotated seconds. Half-way between a step's own seconds and the others, for a
# step that fills a share p of the video and stands out by d standard deviations of the others, is
# d (1/2 - p) / sqrt(1 + d^2 p (1 - p)): 0.44 for d = 1, 0.83 for d = 2 at p = 5 %, less for longer
# steps. Texts and seconds that never met in training stand out by little.
LEVEL = 0.5
ONE_TASK = "all"  # of MiningYouTube's videos, which have none
# ------------------------------------------------------------------------------------ predictions


def _best_from(values: np.ndarray) -> np.ndarray:
    """max(values[t:]) for each t."""
    return np.maximum.accumulate(values[::-1])[::-1]


def _place(scores: np.ndarray, one_second: bool) -> list[tuple[int, int]]:
    """A run of seconds for each step, as (first, after the last), by dynamic programming.

    The runs are in the steps' order, do not overlap, last one second at least (``one_second``:
    exactly), and have the largest sum of scores (T, K), T >= K. Over steps, the last first::

        C_k(t) = sum of score[:t, k]
        E_k(e) = C_k(e) + N_{k+1}(e)                  step k ends before second e
        S_k(s) = max over e > s of E_k(e) - C_k(s)    step k starts at second s
        N_k(t) = max over s >= t of S_k(s),           N_K = 0

    For one second S_k(s) is score[s, k] + N_{k+1}(s + 1). Of equal sums every start and end is the
    earliest of any best choice (the steps' minima over two of them are one, too, so this is well
    defined).
    """
    n_seconds, n_steps = scores.shape
    # Prefix sums: the score of a run of seconds is one difference.
    sums = np.concatenate([np.zeros((1, n_steps)), scores.cumsum(axis=0)])
    starts, ends = np.empty((n_steps, n_seconds)), np.empty((n_steps, n_seconds + 1))
    after = np.zeros(n_seconds + 1)
    for k in reversed(range(n_steps)):
        ends[k] = sums[:, k] + after
        if one_second:  # not by differences of sums, whose rounding would decide between equals
            starts[k] = scores[:, k] + after[1:]
        else:
            starts[k] = _best_from(ends[k])[1:] - sums[:-1, k]
        # N_k(T) = -inf: no step can start after the last second.
        after = np.append(_best_from(starts[k]), -np.inf)
    runs, first = [], 0
    for k in range(n_steps):
        # argmax returns the first of equal values, so the earliest start.
        start = first + int(starts[k, first:].argmax())
        first = start + 1 + (0 if one_second else int(ends[k, start + 1 :].argmax()))
        runs.append((start, first))
    return runs


def assign(scores: np.ndarray) -> list[int]:
    """CrossTask's inference: one second for each step, in their order, with the largest sum of
    scores (T, K) float64."""
    return [start for start, _ in _place(scores, one_second=True)]


def align(scores: np.ndarray, background: float) -> np.ndarray:
    """A label for each second, (T,) int64: a step, 0 to K-1, or -1, background, with the largest
    sum over labelled seconds of (score - background). scores: (T, K) float64.

    background: the score from which on a second belongs to a step; :data:`LEVEL` says how
    :func:`localize` sets it. (MiningYouTube's decoder has log-probabilities of trained classes, a
    transcript and a model of lengths instead. Ours are similarities to texts, without a class for
    background.)
    """
    labels = np.full(len(scores), BACKGROUND)
    for k, (start, end) in enumerate(_place(scores - background, one_second=False)):
        labels[start:end] = k
    return labels


def standardize(scores: np.ndarray) -> np.ndarray:
    """Each step's scores (T, K) less their mean over the seconds, in their standard deviations;
    zeros where a step's scores are all the same."""
    centred = scores - scores.mean(axis=0)
    # The mean of equal numbers may be off by rounding: no standard deviation to divide by.
    return centred / np.where(np.ptp(scores, axis=0) > 0, centred.std(axis=0), np.inf)


# ---------------------------------------------------------------------------------------- metrics


def inside(n_seconds: int, n_steps: int, segments: list) -> np.ndarray:
    """Segments [step, first second, second after the last] -> (T, K) bool: second t is annotated
    with step k, in any of its segments."""
    truth = np.zeros((n_seconds, n_steps), bool)
    for step, first, last in segments:
        truth[first:last, step] = True
    return truth


def hits(seconds: list[int] | np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Steps whose second (K,) is annotated with them in truth (T, K): (K,) bool. A step that is
    not annotated is no hit."""
    return truth[seconds, np.arange(truth.shape[1])]


def overlaps(labels: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(IoU, IoD) of each annotated step, in [0, 1].

    P are the seconds labelled with a step, G those annotated with it: IoU = |P and G| / |P or G|,
    the Jaccard index; IoD = |P and G| / |P|, intersection over detection, 0 where P is empty
    (Bojanowski et al., ECCV 2014; Kuehne et al., 2019). labels: (T,), truth: (T, K) bool.
    """
    # A step that is not annotated has no IoU: there is nothing to find.
    steps = np.flatnonzero(truth.any(axis=0))
    truth, predicted = truth[:, steps], labels[:, None] == steps
    both = (predicted & truth).sum(axis=0)
    return both / (predicted | truth).sum(axis=0), both / np.maximum(predicted.sum(axis=0), 1)


def right_seconds(labels: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(T,) bool: the label is one of the second's steps, or background where it has none."""
    # As the last column, background is column -1, which is its label.
    with_background = np.column_stack([truth, ~truth.any(axis=1)])
    return with_background[np.arange(len(labels)), labels]


def expected_hits(truth: np.ndarray) -> np.ndarray:
    """Probability that each step (K,) is hit by K different seconds drawn at random, then sorted.

    Second t is the k-th of them with probability C(t, k) C(T - 1 - t, K - 1 - k) / C(T, K), k from
    0: exact. Zeros where T < K.
    """
    n_seconds, n_steps = truth.shape
    steps = np.nonzero(truth)[1]
    every = max(comb(n_seconds, n_steps), 1)  # where it is 0, so are the products below
    p = [
        comb(t, k) * comb(n_seconds - 1 - t, n_steps - 1 - k) / every
        for t, k in np.argwhere(truth).tolist()
    ]
    return np.bincount(steps, p, n_steps)


def spread_evenly(n_seconds: int, n_steps: int) -> np.ndarray:
    """The seconds in the middle of K equal parts of a video of T >= K seconds, (K,) int64."""
    return ((np.arange(n_steps) + 0.5) * n_seconds / n_steps).astype(np.int64)


# ----------------------------------------------------------------------------------- all of a set


def load_steps(store: str | os.PathLike) -> dict:
    """The steps and segments beside a store, ``<store>.steps.json``, as prepare crosstask and
    miningyoutube write it. StoreError names the file that is missing or of another form."""
    path = Path(f"{store}.steps.json")
    try:
        steps = json.loads(path.read_text(encoding="utf-8"))
        if steps["protocol"] not in ("crosstask", "miningyoutube") or not steps["videos"]:
            raise ValueError(f"protocol {steps['protocol']!r}")
        for name, video in steps["videos"].items():
            step, first, last = np.array(video["segments"], np.int64).reshape(-1, 3).T
            known = (0 <= step) & (step < len(video["steps"]))
            if not (known & (0 <= first) & (first < last) & (last <= video["seconds"])).all():
                raise ValueError(f"video {name}: segments of other steps or seconds")
    except Exception as error:  # of any JSON but the right one, a dozen types
        raise StoreError(
            f"{path.absolute()}: not the steps of a store ({type(error).__name__}: {error}); make "
            "it again with python -m mcn_ext.prepare crosstask or miningyoutube --overwrite"
        ) from error
    return steps


Score = Callable[[str, int, list], "tuple[Tensor, Tensor] | None"]


def localize(steps: dict, score: Score, *, background: float = LEVEL, seed: int = 0) -> dict:
    """Both protocols over all videos of :func:`load_steps`; the table's numbers, in percent.

    Args:
        score: (video id, T seconds, K step texts) -> (T, K) scores, and which steps can be
            asked for (K,) bool, the others being missed; or None where there is nothing to compare:
            then all its steps are missed, all its seconds wrong, and it is counted.
        background: of :func:`align`, in standard deviations of each step's scores in the video.

    Returns:
        "videos", "missing" (score was None), "too_short" (T < K: missed, too), "unknown" (annotated
        steps that cannot be asked for), "steps" (annotated ones), "tasks": counts.
        "recall": mean over tasks of matched steps / annotated steps of a task's videos, as
        CrossTask's code counts (Zhukov et al., CVPR 2019); "recall_per_task"; "recall_ci95":
        videos are drawn anew within their task, as the tasks are the benchmark's, not a sample.
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

    FloatingPointError, naming the video, for scores that are not finite; ValueError if no step of
    any video is annotated.
    """
    rows: list[dict] = []
    counts = dict.fromkeys(("missing", "too_short", "unknown"), 0)
    for name, video in tqdm(steps["videos"].items(), desc="steps", unit="video", mininterval=0.5):
        shape = n_seconds, n_steps = video["seconds"], len(video["steps"])
        truth = inside(*shape, video["segments"])
        annotated = truth.any(axis=0)
        row = dict.fromkeys(("matched", "evenly", "iou", "iod", "right", "right_steps"), 0.0)
        row["task"] = video["task"] if steps["protocol"] == "crosstask" else ONE_TASK
        row["annotated"], row["chance"] = annotated.sum(), expected_hits(truth).sum()
        # Added before the checks below: a video without scores counts as missed.
        rows.append(row)
        # assign and align need a second for each step.
        if n_seconds < n_steps:
            counts["too_short"] += 1
            continue
        row["evenly"] = hits(spread_evenly(*shape), truth).sum()
        found = score(name, n_seconds, video["steps"])
        if found is None:
            counts["missing"] += 1
            continue
        scores, asked = found[0].double(), found[1].numpy()
        try:
            check_finite(scores)
        except FloatingPointError as error:
            raise FloatingPointError(f"video {name}: {error}") from None
        labels = align(standardize(scores.numpy()), background)
        row["matched"] = (hits(assign(scores.numpy()), truth) & asked).sum()
        counts["unknown"] += int((annotated & ~asked).sum())
        # A label of -1 reads the last step's entry, and can only become -1 again.
        labels[~asked[labels]] = BACKGROUND  # where a step nobody asked for would lie
        right = right_seconds(labels, truth)
        row["right"] = right.mean()
        if annotated.any():
            row["iou"], row["iod"] = (values.mean() for values in overlaps(labels, truth))
            row["right_steps"] = right[truth.any(axis=1)].mean()
    if not any(row["annotated"] for row in rows):
        raise ValueError("no step of any video is annotated: there is nothing to find")
    return {"videos": len(rows)} | counts | _summary(rows, background, seed)


def _percent(values) -> float:
    return round(100.0 * float(np.mean(values)), 3)


def _summary(rows: list[dict], background: float, seed: int) -> dict:
    """:func:`localize`'s numbers from those of each video."""
    right = _percent([row["right"] for row in rows])
    # Videos without an annotated step have neither recall nor IoU.
    rows = [row for row in rows if row["annotated"]]
    column = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    # Not a set: tasks stay in the order of the file.
    annotated, tasks = column["annotated"], list(dict.fromkeys(column["task"].tolist()))
    task = np.array([tasks.index(name) for name in column["task"]])

    def per_task(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
        return np.bincount(task, values) / np.bincount(task, counts)

    # A video with more annotated steps counts more here, unlike in recall_by_video.
    recall = per_task(column["matched"], annotated)
    rng, of = np.random.default_rng(seed), [task == k for k in range(len(tasks))]
    # Videos and not steps: steps of one video are found or missed together.
    draws = [resample(column["matched"][videos], annotated[videos], rng) for videos in of]
    return {
        "steps": int(annotated.sum()),
        "tasks": len(tasks),
        "recall": _percent(recall),
        "recall_ci95": [_percent(end) for end in np.percentile(np.mean(draws, 0), [2.5, 97.5])],
        "recall_per_task": {name: _percent(x) for name, x in zip(tasks, recall, strict=True)},
        "recall_by_video": _percent(per_task(column["matched"] / annotated, annotated > 0)),
        "IoU": _percent(column["iou"]),
        "IoD": _percent(column["iod"]),
        "frame_accuracy": right,
        "frame_accuracy_steps": _percent(column["right_steps"]),
        "background": background,
        "chance": _percent(per_task(column["chance"], annotated)),
        "evenly": _percent(per_task(column["evenly"], annotated)),
    }


def scorer(embedder, store: Store, kind: str = "cosine") -> Score:
    """Scores of an :class:`.Embedder`: similarity of each step's text with what is
    seen and heard in each second. A second with nothing in it scores as the worst of the step."""
    number = {name: i for i, name in enumerate(store.ids())}

    def score(name: str, n_seconds: int, steps: list[str]) -> tuple[Tensor, Tensor] | None:
        if name not in number:
            return None
        # Second t lasts from t to t + 1.
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
